"""Many linear heads are trained at once on one frozen backbone, each as if it were alone, and the best is exported."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from forked import Forks
from launch import environment, start_ranks
from pydantic import ValidationError
from saved_runs import call, make_calls
from shapes import make_shapes, metrics
from tiny import first_weights, in_parts, random_batch
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.config import BackboneConfig, RunConfig, load_run
from m3i_scale.config.optim import learning_rate
from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective, initialize_module, scales_of
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.targets.category import FeatureNorm
from m3i_scale.run.hooks.evaluation import Evaluation

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SHAPE = SIZES | {"image_size": 32, "patch_size": 8}
CLASSES = {"shapes": ["bar", "disc", "square"]}
SWEEP: dict[str, Any] = {"blocks": [1, 2], "mean": [False, True], "lr_scales": [0.01, 1.0]}
HEADS = [f"last{blocks}{mean}_lr{scale}" for blocks in (1, 2) for mean in ("", "_mean") for scale in ("0_01", "1")]
STEPS = 6


def task(**sweep: Any) -> dict[str, Any]:
    return {"kind": "classification", "freeze": True, "sweep": SWEEP | sweep}


def objective_of(task: dict[str, Any], **optim: Any) -> tuple[Objective, RunConfig]:
    backbone = {"preset": "vit-ti/16", "config": SHAPE}
    run = RunConfig.model_validate({"task": task, "backbone": backbone, "optim": {"clip_grad_norm": 0.0} | optim})
    objective = build_objective(run, CLASSES, None)
    first_weights(objective, seed=0)
    assert run.task is not None
    run.task.prepare(objective, 3)
    return objective, run


# ---------------------------------------------------------------- what heads read


@pytest.mark.parametrize(("preset", "shape"), [("vit-ti/16", SHAPE), ("dinov2-s/14", SHAPE), ("clip-b/16", SHAPE)])
def test_class_tokens_are_those_of_the_last_layers_normalised(preset: str, shape: dict[str, int]) -> None:
    fields = {key: value for key, value in shape.items() if key != "intermediate_size" or preset != "dinov2-s/14"}
    backbone = build_backbone(backbone_config(BackboneConfig(preset=preset, config=fields))).eval()
    for module in backbone.modules():
        initialize_module(backbone.model, module)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cls, tokens = backbone.encode_whole(images, blocks=2)
        whole = backbone.encode_whole(images)
        states = backbone.model(images, output_hidden_states=True).hidden_states
        norm = backbone.model.post_layernorm if preset.startswith("clip") else backbone.model.layernorm
        wanted = norm(states[-2][:, 0])
    torch.testing.assert_close(cls[:, 1:], whole[0])
    torch.testing.assert_close(tokens, whole[1])
    torch.testing.assert_close(cls[:, 0], wanted)
    assert not torch.allclose(cls[:, 0], cls[:, 1], atol=1e-3)


# ---------------------------------------------------------------- every head is as if it were alone


def test_a_head_has_the_gradient_that_it_has_alone() -> None:
    objective, _ = objective_of(task())
    assert list(objective.heads) == HEADS
    batch = replace(random_batch(6, image=32), labels_B=torch.arange(6) % 3, label_sets_B=torch.zeros(6).long())
    loss, _ = objective(batch)
    loss.backward()
    for blocks, mean, scale, name in ((1, False, 1.0, "last1_lr1"), (2, True, 0.01, "last2_mean_lr0_01")):
        alone, _ = objective_of(task(blocks=[blocks], mean=[mean], lr_scales=[scale]))
        assert list(alone.heads) == [name]
        alone.load_state_dict(
            {key: value for key, value in objective.state_dict().items() if key in alone.state_dict()}
        )
        alone(batch)[0].backward()
        for key, parameter in alone.heads[name].named_parameters():
            gradient = objective.heads[name].get_parameter(key).grad
            assert gradient is not None
            assert gradient.abs().sum() > 0
            torch.testing.assert_close(gradient, parameter.grad)
    assert all(parameter.grad is None for parameter in objective.student.parameters())


def test_the_protocol_trains_by_sgd_at_the_published_rates() -> None:
    published = load_run("in1k_linear")
    optim = published.optim
    schedule = optim.model_copy(update={"lr": 0.1 * 1024 / 256, "momentum_correction": True})
    objective, run = objective_of(task(lr_scales=[0.001, 0.02]))
    other, _ = objective_of(task(lr_scales=[0.001, 0.02]))
    batch = replace(random_batch(6, image=32), labels_B=torch.arange(6) % 3, label_sets_B=torch.zeros(6).long())
    scales = scales_of(objective, run)
    groups = parameter_groups(objective, optim.weight_decay, scales)
    assert {group["lr_scale"] for group in groups} == {0.001, 0.02}
    ours = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    named = {name: parameter for name, parameter in other.named_parameters() if parameter.requires_grad}
    theirs = torch.optim.SGD([{"params": [parameter]} for parameter in named.values()], lr=1.0, momentum=0.9)
    for step in range(30):
        for group in ours.param_groups:
            group["lr"] = learning_rate(step, optim) * group["lr_scale"]
        for name, group in zip(named, theirs.param_groups, strict=True):
            group["lr"] = learning_rate(step, schedule) * scales[name]
        for module, optimizer in ((objective, ours), (other, theirs)):
            optimizer.zero_grad()
            module(batch)[0].backward()
            optimizer.step()
    for name, parameter in named.items():
        torch.testing.assert_close(objective.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_batch_norm_is_the_one_of_torch_without_a_learnt_scale() -> None:
    ours, theirs = FeatureNorm(5, SingleProcess()), torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    assert not list(ours.parameters())
    for _ in range(3):
        x = torch.randn(7, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "values",
    [
        {"freeze": False, "sweep": {}},
        {"freeze": False, "batch_norm": True},
        {"freeze": True, "sweep": {}, "pool": "mean_pool"},
        {"freeze": True, "sweep": {"lr_scales": [0.1, 2.0]}},
        {"freeze": True, "sweep": {"lr_scales": [0.1, 0.1]}},
        {"freeze": True, "sweep": {"blocks": [0]}},
        {"freeze": True, "sweep": {"mean": []}},
    ],
)
def test_choices_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"task": {"kind": "classification", **values}})


def test_more_layers_than_there_are_cannot_be_read() -> None:
    with pytest.raises(ConfigError) as caught:
        objective_of(task(blocks=[1, 3]))
    assert "last3" in str(caught.value.where)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"optim": {"clip_grad_norm": 1.0}}, "optim.clip_grad_norm"),
        ({"data": {"datasets": {"shapes": {"path": "/data/shards/train"}}}}, "data.validation"),
        ({"guard": {"spike": {}}}, "guard.spike"),
    ],
)
def test_heads_that_depend_on_others_or_cannot_be_chosen_are_refused(changes: dict[str, Any], where: str) -> None:
    values = {"task": task(), "backbone": {"from_pretrained": "/data/export"}, "optim": {"clip_grad_norm": 0.0}}
    run = RunConfig.model_validate(values | changes)
    with pytest.raises(ConfigError) as caught:
        run.task.check(run, backbone_config(BackboneConfig(preset="vit-ti/16", config=SHAPE)))
    assert where in str(caught.value.where)


@pytest.mark.parametrize("preset", ["internimage-h", "siglip-b/16"])
def test_without_a_class_token_there_is_nothing_to_sweep(preset: str) -> None:
    values = {"task": task(), "backbone": {"from_pretrained": "/data/export"}, "optim": {"clip_grad_norm": 0.0}}
    run = RunConfig.model_validate(values)
    with pytest.raises(ConfigError) as caught:
        run.task.check(run, backbone_config(BackboneConfig(preset=preset)))
    assert caught.value.where == "task.sweep"


@pytest.mark.parametrize(("stopping", "wanted"), [(False, [4, 6]), (True, [4])])
def test_the_last_step_is_evaluated_where_the_data_end_before(stopping: bool, wanted: list[int]) -> None:
    class Evaluated(Evaluation):
        def evaluate(self) -> dict[str, float]:
            return {}

    found: list[int] = []
    run = RunConfig.model_validate({"task": task(), "optim": {"steps": 9}, "evaluation": {"every_steps": 4}})
    state: Any = SimpleNamespace(
        step=0,
        stopping=False,
        resolved=SimpleNamespace(run=run),
        timeouts=SimpleNamespace(outside_of_steps=lambda what: nullcontext()),
        callbacks=SimpleNamespace(on_evaluation=lambda step, figures: found.append(step)),
    )
    stream: Any = SimpleNamespace(state_dict=dict)
    hook = Evaluated(state, stream)
    for state.step in range(1, 7):
        hook.post_step()
    state.stopping = stopping  # what is stopped goes on later
    hook.on_finish()
    assert found == wanted


# ---------------------------------------------------------------- runs


RATE = 3e-3
"""Of SGD with momentum 0.9, for a head whose share is 1."""


def write(folder: Path, source: Path, shards: Path, engine: str, *, batch_norm: bool) -> Path:
    folder.mkdir(parents=True)
    (folder / "in_parts.json").write_text(json.dumps(in_parts(engine)))
    run = {
        "name": "sweep",
        "output_dir": str(folder / "out"),
        "task": task() | {"batch_norm": batch_norm},
        "backbone": {"from_pretrained": str(source)},
        "data": {
            "datasets": {"shapes": {"path": str(shards / "train")}},
            "validation": {"val": {"path": str(shards / "val")}},
            "streams": 4,
            "augment": {"crop_scale": [1.0, 1.0], "flip": 0.0, "color_jitter_p": 0.0, "grayscale": 0.0},
        },
        # AdamW at so large an eps forgives no factor in a gradient.
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": STEPS, "warmup_steps": 0, "lr": RATE * 1e7}
        | {"eps": 1e6, "betas": [0.9, 0.999], "momentum_correction": False, "clip_grad_norm": 0.0, "weight_decay": 0.0},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"every_steps": 4, "batches": 3},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": str(folder / "in_parts.json"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "export"
    torch.manual_seed(3)
    ViTModel(ViTConfig(**SHAPE, layer_norm_eps=1e-6), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(shards: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    stages = {"one": "zero1_cpu_fp32", "two": "zero1_cpu_fp32", "stage 3": "zero3_bf16"}
    paths = {
        name: write(root / name, source, shards, engine, batch_norm=name != "stage 3")
        for name, engine in stages.items()
    }
    folders = {name: path.parent for name, path in paths.items()}
    calls = {name: call(folders[name], faults=[]) for name in ("two", "stage 3")}
    done = make_calls(calls, folders, root / "results")
    assert {name: told.codes for name, told in done.items()} == {"two": [0, 0], "stage 3": [0, 0]}, done
    rates = [str(Path(__file__).parent / "rates.py"), str(root / "one" / "rates.json")]
    batches = ["optim.micro_batch_size=8"]
    job = start_ranks([*rates, "train", str(paths["one"]), *batches], 1, root / "logs")
    assert job.wait() == [0], job.text()[-4000:]
    return paths


def evaluations(path: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (path.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "evaluation"}


def weights(path: Path) -> dict[str, Tensor]:
    return dict(saved_weights(path.parent / "out" / "checkpoints" / f"step-{STEPS:08d}", "student"))


def test_one_rank_and_two_are_one_run(ran: dict[str, Path]) -> None:
    one, two = (metrics(ran[name]) for name in ("one", "two"))
    assert sorted(one) == sorted(two) == list(range(1, STEPS + 1))
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-5)
        assert one[step]["grad_norm"] == pytest.approx(two[step]["grad_norm"], rel=1e-4)
    of_two = weights(ran["two"])
    assert {name.rpartition(".")[2] for name in of_two} >= {"running_mean", "running_var"}
    for name, value in weights(ran["one"]).items():
        torch.testing.assert_close(of_two[name], value, rtol=1e-3, atol=1e-5)
    first, second = (evaluations(ran[name]) for name in ("one", "two"))
    assert sorted(first) == sorted(second) == [4, STEPS]  # the last step too, whose heads are exported
    for head in HEADS:
        key = f"evaluation/{head}/top_1"
        assert first[STEPS][key] == pytest.approx(second[STEPS][key])


def test_the_engine_has_the_rate_of_every_head(ran: dict[str, Path]) -> None:
    found = json.loads((ran["one"].parent / "rates.json").read_text())
    assert {scale for _, scale, _ in found["groups"]} == {0.01, 1.0}
    assert all(rate == pytest.approx(found["lr"] * scale) for rate, scale, _ in found["groups"])


def test_it_trains_in_bf16_in_parts(ran: dict[str, Path]) -> None:
    first, last = (evaluations(ran["stage 3"])[step] for step in (4, STEPS))
    for fast in [head for head in HEADS if head.endswith("_lr1")]:
        slow = fast.replace("_lr1", "_lr0_01")  # hardly leaves its first weights in so few steps
        figure = f"evaluation/{fast}/loss"
        assert last[figure] < first[figure]
        assert last[figure] < last[f"evaluation/{slow}/loss"] - 0.005


def with_best(path: Path, best: str, folder: Path) -> Path:
    """A copy of a run's output that has measured this head as the best."""
    out = shutil.copytree(path.parent / "out", folder / "out")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "evaluation":
            line |= {f"evaluation/{head}/top_1": 0.5 + 0.25 * (head == best) for head in HEADS}
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.mark.parametrize(
    ("run", "best", "kind"),
    [
        ("stage 3", "last1_lr0_01", "ViTForImageClassification"),
        ("two", "last1_mean_lr1", "Dinov2ForImageClassification"),
    ],
)
def test_the_best_head_alone_is_a_stock_classifier(
    ran: dict[str, Path], forks: Forks, tmp_path: Path, run: str, best: str, kind: str
) -> None:
    """`export` itself proves that the outputs are those of the training modules."""
    out, folder = with_best(ran[run], best, tmp_path), tmp_path / "classifier"
    done = forks.run("export", str(out), "--output", str(folder), "--task", "classification")
    assert done.returncode == 0, done.stderr
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model).__name__ == kind
    trained, head = weights(ran[run]), f"heads.{best}."
    rows = trained[f"{head}sets.0.weight"]
    if run == "two":  # batch norm is in the classifier
        rows = rows * (trained[f"{head}norm.running_var"] + 1e-6).rsqrt()
    torch.testing.assert_close(model.classifier.weight, rows)
    told = json.loads((folder / "export.json").read_text())["heads"]
    assert (told["chosen"], told["step"], sorted(told["top_1"])) == (best, STEPS, sorted(HEADS))


def test_batch_norm_is_not_rounded_into_rows(ran: dict[str, Path], forks: Forks, tmp_path: Path) -> None:
    out = with_best(ran["two"], "last1_lr1", tmp_path)
    options = ["--output", str(tmp_path / "no"), "--task", "classification", "--dtype", "bfloat16"]
    assert forks.run("export", str(out), *options).returncode == 2
    assert not (tmp_path / "no").exists()


def test_a_head_of_several_layers_is_kept_beside_features(ran: dict[str, Path], forks: Forks, tmp_path: Path) -> None:
    best = "last2_mean_lr1"
    out = with_best(ran["two"], best, tmp_path)
    refused = forks.run("export", str(out), "--output", str(tmp_path / "no"), "--task", "classification")
    assert refused.returncode == 2
    done = forks.run("export", str(out), "--output", str(tmp_path / "features"))
    assert done.returncode == 0, done.stderr
    objective = json.loads((tmp_path / "features" / "heads" / "objective.json").read_text())
    assert [target["name"] for target in objective["run"]["recipe"]["targets"]] == [best]


def test_heads_that_nobody_has_measured_are_not_exported(ran: dict[str, Path], forks: Forks, tmp_path: Path) -> None:
    out = shutil.copytree(ran["two"].parent / "out", tmp_path / "out")
    (out / "metrics.jsonl").unlink()
    done = forks.run("export", str(out), "--output", str(tmp_path / "no"))
    assert done.returncode == 2
    assert not (tmp_path / "no").exists()


def test_finetune_takes_the_protocol(source: Path, shards: Path, forks: Forks, tmp_path: Path) -> None:
    options = ["--data", str(shards), "--protocol", "in1k_linear", "--epochs", "1", "--json"]
    fields = [f"output_dir={tmp_path / 'out'}", "backbone.config.image_size=32", "deepspeed=zero1_cpu_fp32"]
    fields += ["task.sweep.blocks=[1, 2]", "optim.batch_size=7", "optim.micro_batch_size=7", "log.progress=false"]
    fields += ["optim.lr=1e5", "task.sweep.lr_scales=[0.01, 1.0]", "data.streams=7"]
    command = ["finetune", "classification", str(source), *options, *fields]
    done = forks.run(*command, "--dry-run", env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published"]["number"] == 86.5
    done = forks.run(*command, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "finetune.json").read_text())
    told = json.loads((Path(found["export"]) / "export.json").read_text())["heads"]
    assert sorted(told["top_1"]) == sorted(HEADS)
    assert found["heads"] == told
    # The run has measured the same crops of the same 21 images once.
    assert found["top_1"] == pytest.approx(100 * max(told["top_1"].values()))
