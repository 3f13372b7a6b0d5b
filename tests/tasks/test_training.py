"""A classifier is fine-tuned by the trainer of pre-training, with its ranks, checkpoints and exports."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forks
from launch import start_ranks
from safetensors.torch import load_file
from saved_runs import call, make_calls
from shapes import make_shapes, metrics
from tiny import first_weights, in_parts
from transformers import AutoModelForImageClassification, pipeline

from m3i_scale.backbones.build import backbone_config, backbone_source
from m3i_scale.backbones.load_plan import plan_load
from m3i_scale.checkpoint_tools.consolidate import Which, saved_weights
from m3i_scale.config import BackboneConfig, load_run
from m3i_scale.objective.build import build_objective, scales_of
from m3i_scale.plan.planning import Model, Vocabulary
from m3i_scale.plan.settings import groups_of

pytestmark = pytest.mark.slow

STEPS = 8
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 32}
MODEL["patch_size"] = 8
EMA = 0.3  # reached in the fourth step
DECAYS = [1 / 10, 2 / 11, 3 / 12, EMA, EMA, EMA, EMA, EMA]
AUGMENT = {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25}
KINDS: tuple[Which, ...] = ("student", "ema")


def run_file(folder: Path, shards: Path, *, ds_config: str = "zero3_cpu_fp32", **task: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "in_parts.json").write_text(json.dumps(in_parts(ds_config)))
    run = {
        "name": "classify",
        "output_dir": str(folder / "out"),
        "task": {"kind": "classification", **task},
        "backbone": {"preset": "dinov2-s/14", "config": MODEL},
        "data": {"datasets": {"shapes": {"path": str(shards / "train")}}, "streams": 4, "augment": AUGMENT},
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": STEPS, "warmup_steps": 2, "lr": 1e-3},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": str(folder / "in_parts.json"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


def test_it_trains_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path / "run", shards, layer_decay=0.65, drop_path=0.1, mixup=0.8, label_smoothing=0.1)
    done = make_calls({"run": call(path.parent, faults=[])}, {"run": path.parent}, tmp_path / "results")["run"]
    assert done.codes == [0, 0], done.texts
    assert sorted(metrics(path)) == list(range(1, STEPS + 1))


def weights(path: Path, which: Which = "student", step: int = STEPS) -> dict[str, torch.Tensor]:
    return dict(saved_weights(path.parent / "out" / "checkpoints" / f"step-{step:08d}", which))


def first_averages(path: Path) -> dict[str, torch.Tensor]:
    """What the average of a run starts from: the weights before the first step."""
    run = load_run(str(path))
    meta = json.loads((path.parent / "out" / "checkpoints" / f"step-{STEPS:08d}" / "meta.json").read_text())
    objective = build_objective(run, meta["label_sets"], None)
    first_weights(objective, run.seed)
    return {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}


@pytest.mark.parametrize("ds_config", ["zero1_cpu_fp32", "zero3_cpu_fp32", "zero1_bf16", "zero2_bf16"])
def test_the_engine_has_a_rate_for_every_layer(shards: Path, tmp_path: Path, ds_config: str) -> None:
    path = run_file(tmp_path / "run", shards, ds_config=ds_config, layer_decay=0.65)
    told = tmp_path / "rates.json"
    job = start_ranks([str(Path(__file__).parent / "rates.py"), str(told), "train", str(path)], 1, tmp_path / "logs")
    assert job.wait() == [0], job.text()[-4000:]
    assert "Max_MA" not in job.text()  # of every group, by DeepSpeed
    found = json.loads(told.read_text())
    assert sorted({scale for _, scale, _ in found["groups"]}) == pytest.approx([0.65**3, 0.65**2, 0.65, 1.0])
    assert all(rate == pytest.approx(found["lr"] * scale) for rate, scale, _ in found["groups"])
    assert {decay for *_, decay in found["groups"]} == {0.0, 0.05}
    objective = build_objective(load_run(str(path)), {"shapes": ["bar", "disc", "square"]}, None)
    model = Model(load_run(str(path)), Vocabulary({"shapes": ["bar", "disc", "square"]}, 0, ()), 1, "fp32")
    trained = [place for place, parameter in enumerate(model.parameters) if parameter.role == "trained"]
    planned = [sum(model.parameters[place].numel for place in group) for group in groups_of(model.parameters, trained)]
    assert planned == pytest.approx(found["sizes"], abs=4)  # groups are padded; in the order of the engine
    scales, wanted, has = scales_of(objective, load_run(str(path))), Counter[float](), Counter[float]()
    for name, parameter in objective.named_parameters():
        wanted[round(scales.get(name, 1.0), 6)] += parameter.numel()
    for (_, scale, _), size in zip(found["groups"], found["sizes"], strict=True):
        has[round(scale, 6)] += size
    assert has == pytest.approx(wanted, abs=64)  # groups are padded


def test_one_rank_and_two_are_one_run_and_so_is_a_run_that_was_stopped(shards: Path, tmp_path: Path) -> None:
    """Every rank draws for itself which branches it drops, so that the first pair drops none."""
    plain = {
        name: run_file(tmp_path / name, shards, pool="mean_pool", layer_decay=0.65, ema=EMA) for name in ("one", "two")
    }
    dropped = {
        name: run_file(tmp_path / name, shards, layer_decay=0.65, ema=EMA, drop_path=0.3, mixup=0.8, cutmix=1.0)
        for name in ("whole", "stopped")
    }
    stop = {"rank": 1, "at": "write", "what": "signals", "numbers": [signal.SIGTERM], "seconds": 0.5, "step": 4}
    calls = {name: call(path.parent, faults=[]) for name, path in (plain | dropped).items() if name != "one"}
    calls["stopped"]["faults"] = [stop]
    folders = {name: path.parent for name, path in (plain | dropped).items()}
    done = make_calls(calls, folders, tmp_path / "results")
    codes = {name: told.codes for name, told in done.items()}
    assert codes == {"two": [0, 0], "whole": [0, 0], "stopped": [75, 75]}, done
    every_step = ["checkpoint.every_steps=1", f"checkpoint.keep_latest={STEPS}"]
    job = start_ranks(["-m", "m3i_scale", "train", str(plain["one"]), *every_step], 1, tmp_path / "logs")
    assert job.wait() == [0], job.text()[-4000:]
    one, two = (metrics(plain[name]) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-5)
    for which in KINDS:
        of_two = weights(plain["two"], which)
        for name, value in weights(plain["one"], which).items():
            torch.testing.assert_close(of_two[name], value, rtol=1e-3, atol=1e-5)
    averages = first_averages(plain["one"])
    for step in range(1, STEPS + 1):
        online, saved = weights(plain["one"], "student", step), weights(plain["one"], "ema", step)
        assert saved.keys() == online.keys()
        assert {name.partition(".")[0] for name in saved} == {"student", "decoders", "heads"}
        for name, value in saved.items():
            averages[name] = DECAYS[step - 1] * averages[name] + (1 - DECAYS[step - 1]) * online[name]
            torch.testing.assert_close(value, averages[name], rtol=1e-5, atol=1e-7)
    assert not any(torch.equal(value, online[name]) for name, value in saved.items())
    random = dropped["whole"].parent / "out" / "checkpoints" / f"step-{STEPS:08d}" / "random"
    states = [load_file(random / f"rank-{rank:05d}.safetensors")["host"] for rank in range(2)]
    assert not torch.equal(*states)
    again = {"stopped": call(folders["stopped"], faults=[])}
    assert make_calls(again, folders, tmp_path / "again")["stopped"].codes == [0, 0]
    assert metrics(dropped["stopped"]) == metrics(dropped["whole"])
    for which in KINDS:
        stopped = weights(dropped["stopped"], which)
        assert all(torch.equal(value, stopped[name]) for name, value in weights(dropped["whole"], which).items())


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    path = run_file(root / "run", shards, pool="class_token", ema=EMA)
    assert make_calls({"run": call(path.parent, faults=[])}, {"run": path.parent}, root / "results")["run"].codes == [
        0,
        0,
    ]
    return path.parent


def test_the_result_is_a_stock_classifier(trained: Path, shards: Path, forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    done = forks.run("export", str(trained / "out"), "--output", str(folder), "--task", "classification")
    assert done.returncode == 0, done.stderr
    answers = pipeline("image-classification", str(folder))(str(next((shards.parent / "images").rglob("*.png"))))
    assert {answer["label"] for answer in answers} == {"bar", "disc", "square"}
    data = ["--data", str(shards / "val"), "--measure", "classifier", "--json"]
    done = forks.run("evaluate", str(folder), *data)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["measures"]["classifier"]["top-1"]["value"] <= 1
    start = BackboneConfig(from_pretrained=str(folder))
    plan = plan_load(backbone_source(start), backbone_config(start))
    assert plan.report["left_out"] == {"classifier": ["classifier.bias", "classifier.weight"]}
    has = weights(trained / "run.yaml")
    for name, value in zip(plan.names, plan.tensors(), strict=True):
        assert torch.equal(value, has[f"student.model.{name}"])


def test_the_average_is_exported_as_the_same_class(trained: Path, forks: Forks, tmp_path: Path) -> None:
    run, models = trained / "run.yaml", {}
    for which in KINDS:
        options = ["--output", str(tmp_path / which), "--task", "classification", "--weights", which]
        done = forks.run("export", str(trained / "out"), *options)
        assert done.returncode == 0, done.stderr
        models[which] = AutoModelForImageClassification.from_pretrained(tmp_path / which)
    assert type(models["student"]) is type(models["ema"])
    for which, other in (KINDS, KINDS[::-1]):
        has, has_not = weights(run, which), weights(run, other)
        model = models[which]
        exported = {
            "student.model.embeddings.cls_token": model.dinov2.embeddings.cls_token,
            "heads.category.sets.0.weight": model.classifier.weight[:, : MODEL["hidden_size"]],
        }
        for name, value in exported.items():
            assert torch.equal(value, has[name])
            assert not torch.equal(value, has_not[name])
