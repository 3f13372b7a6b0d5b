"""What differs between a checkpoint and a run is told field by field; published weights fill a backbone."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml
from published import FULL, model_of, published_folder

from m3i_scale.backbones.build import backbone_config, backbone_source, build_backbone
from m3i_scale.backbones.load_plan import plan_load
from m3i_scale.config import BackboneConfig, OptimConfig, RunConfig, parse_section
from m3i_scale.config.optim import Poly, learning_rate
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.run.resume import _difference, check_resume
from m3i_scale.run.setup import print_start, resolve_engine


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"width": 64, "depth": 2}, {"width": 64, "depth": 3}, "backbone.depth was 2, is 3"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 5]}}, "backbone.a.b.1 was 2, is 5"),
        ({"a": [1]}, {"a": [1, 2]}, "backbone.a was [1], is [1, 2]"),
        ({}, {"new": True}, "backbone.new was null, is true"),
        (None, {"width": 64}, 'backbone was null, is {"width": 64}'),
        ({"name": "a", "x": 1}, {"name": "a", "x": 2}, "backbone.x was 1, is 2"),
    ],
)
def test_the_field_that_changed_is_named(before, now, told):
    assert _difference("backbone", before, now) == told


def plan_of(compares):
    """A plan on one rank, and the meta.json of a run as it is."""
    plan = SimpleNamespace(
        identity={"vocab_size": 7, "label_sets": {}},
        deepspeed=SimpleNamespace(config={"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}),
        run=RunConfig.model_validate(
            {
                "optim": {"steps": 10, "micro_batch_size": 4},
                "data": {"datasets": {"pets": {"path": "/data/pets"}}},
            }
        ),
        recipe=SimpleNamespace(uses_batch_statistics=compares),
    )
    shape = {"world_size": 1, "zero_stage": 3, "precision": "bf16", "compared": 4}
    return plan, {"identity": plan.identity, "step": 10, **shape}


@pytest.mark.parametrize(
    ("changed", "compares", "told"),
    [
        ({"world_size": 2}, None, ["resharded: world_size was 2, is 1"]),
        ({"zero_stage": 2}, None, ["resharded: zero_stage was 2, is 3"]),
        ({"precision": "fp16"}, None, ["resharded: precision was fp16, is bf16"]),
        ({"compared": 8}, None, []),
        ({"compared": 8}, "contrasts", ["the global contrastive batch is 4, was 8"]),
    ],
)
def test_another_shape_is_told(tmp_path, changed, compares, told):
    plan, fits = plan_of(compares)
    (tmp_path / "meta.json").write_text(json.dumps(fits | changed))
    notes = check_resume(plan, tmp_path, 1)
    assert len(notes) == len(told)
    assert all(note.startswith(start) for note, start in zip(notes, told, strict=True))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, []),
        ({"steps": 40, "warmup_steps": 4}, ["optim.steps was 40, is 20, optim.warmup_steps was 4, is 2"]),
        ({"lr": 2e-3}, ["optim.lr was 0.002, is 0.001"]),
        ({"schedule": Poly(power=0.9)}, ["optim.schedule"]),
        ({"batch_size": 8}, []),
    ],
)
def test_another_schedule_is_told(tmp_path, changed, told):
    plan, fits = plan_of(None)
    optim = OptimConfig(steps=20, warmup_steps=2, lr=1e-3, batch_size=4, micro_batch_size=4)
    plan.run = plan.run.model_copy(update={"optim": optim})
    before = plan.run.optim.model_copy(update=changed)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"optim": before.model_dump(mode="json")}))
    (tmp_path / "meta.json").write_text(json.dumps(fits))
    notes = check_resume(plan, tmp_path, 1)
    assert len(notes) == len(told)
    assert all(note.startswith(f"the schedule changed: {start}") for note, start in zip(notes, told, strict=True))
    rates = [f"{learning_rate(10, optim):.3g}" for optim in (plan.run.optim, before)]
    assert not notes or notes[0].endswith(f"the learning rate of step 11 is {' instead of '.join(rates)}")


SGD = {"eps": 1e6, "momentum_correction": False, "weight_decay": 0.0, "trust_coefficient": 0.001}


@pytest.mark.parametrize(
    ("optim", "where"),
    [
        ({"eps": 1e-8}, "optim.trust_coefficient"),
        ({"momentum_correction": True}, "optim.trust_coefficient"),
        ({"weight_decay": 0.1}, "optim.trust_coefficient"),
    ],
)
def test_trust_ratios_need_sgd_without_weight_decay(optim, where):
    with pytest.raises(ConfigError) as caught:
        parse_section(RunConfig, {"optim": SGD | optim}, where="run")
    assert where in f"{caught.value.where} {caught.value.what}"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("file", "runs"),
    [("zero1_bf16", True), ("zero2_bf16", True), ("zero3_bf16", False), ("zero3_bf16_cpu_offload", False)],
)
def test_trust_ratios_need_whole_parameters_on_the_device(file, runs):
    run = RunConfig.model_validate({"deepspeed": file, "optim": SGD})
    with nullcontext() if runs else pytest.raises(ConfigError, match="ZeRO stage 3 and offload"):
        resolve_engine(run, None, 64)


def test_a_missing_bias_correction_is_not_undone(tmp_path):
    file = load_ds_config("zero1_bf16")
    del file["optimizer"]["params"]["fused"]  # DeepSpeed's own Adam reads bias_correction
    file["optimizer"]["params"] |= {"torch_adam": False, "bias_correction": False}
    (tmp_path / "sgd.json").write_text(json.dumps(file))
    for corrects in (True, False):
        run = RunConfig.model_validate(
            {"deepspeed": str(tmp_path / "sgd.json"), "optim": {"momentum_correction": corrects}}
        )
        with nullcontext() if corrects else pytest.raises(ConfigError) as caught:
            resolve_engine(run, None, 64)
    assert caught.value.where.startswith("optim.momentum_correction")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"step": 11}, "at least 11"),
        ({"identity": {"vocab_size": 8, "label_sets": {}}}, "vocab_size was 8, is 7"),
        (
            {"identity": {"vocab_size": 7, "label_sets": {"pets": ["cat"]}}},
            "labels.json of data.datasets.pets: /data/pets",
        ),
    ],
)
def test_only_what_fits_is_resumed(tmp_path, changed, told):
    plan, fits = plan_of(compares="contrasts samples")
    (tmp_path / "meta.json").write_text(json.dumps(fits))
    assert check_resume(plan, tmp_path, 1) == []
    (tmp_path / "meta.json").write_text(json.dumps(fits | changed))
    with pytest.raises(CheckpointError) as caught:
        check_resume(plan, tmp_path, 1)
    assert told in f"{caught.value} {caught.value.why}"


@pytest.mark.parametrize(
    ("saved", "now", "fits"),
    [
        ({"max_tokens": 16}, {"max_tokens": 24}, False),
        ({"pixels": {"mean": [0.5]}}, {"pixels": {"mean": [0.4]}}, False),
        ({"tokenizer": {"parts": [{"a": 1}]}}, {"tokenizer": {"parts": [{"a": 1, "newer": None}]}}, True),
        ({"tokenizer": {"parts": [{"a": 1}]}}, {"tokenizer": {"parts": [{"a": 2, "newer": None}]}}, False),
        ({"tokenizer": {"a": 1, "older": 2}}, {"tokenizer": {"a": 1}}, False),
        ({"tokenizer": None}, {"tokenizer": {"a": 1}}, False),
        ({"attention": "own"}, {"attention": "within_image"}, True),
        ({"attention": "mixed"}, {"attention": "within_image"}, False),
    ],
)
def test_the_identity_of_a_checkpoint_must_be_that_of_the_run(tmp_path, saved, now, fits):
    plan, meta = plan_of(None)
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"identity": plan.identity | saved}))
    plan.identity = plan.identity | now
    if fits:
        assert check_resume(plan, tmp_path, 1) == []
        return
    with pytest.raises(CheckpointError) as caught:
        check_resume(plan, tmp_path, 1)
    assert next(iter(now)) in caught.value.why


def test_recipes_of_other_names_are_told_by_them():
    assert _difference("recipe", {"name": "mae", "x": 1}, {"name": "sim"}) == "recipe was 'mae', is 'sim'"


def test_many_changes_are_counted():
    before, now = ({str(number): number + shift for number in range(9)} for shift in (0, 1))
    told = _difference("backbone", before, now)
    assert told.count(" was ") == 5
    assert told.endswith("and 4 more")


@pytest.mark.parametrize("shape", [{}, {**FULL, "fusion_width": 1024}], ids=["without head", "with head"])
def test_published_weights_fill_all_but_a_head_that_is_not_there(tmp_path, shape):
    published = model_of(**shape)
    section = BackboneConfig(from_pretrained=str(published_folder(tmp_path, published)))
    backbone = build_backbone(backbone_config(section))
    assert backbone.width == (1024 if shape else 128)
    before = {name: torch.full_like(value, 0.25) for name, value in backbone.model.named_parameters()}
    plan = plan_load(backbone_source(section), backbone_config(section))
    backbone.model.load_state_dict(before | dict(zip(plan.names, plan.tensors(), strict=True)))
    fresh = [] if shape else [f"dcnv3_head_x{part}.{kind}" for part in ("3", "4.0") for kind in ("weight", "bias")]
    assert sorted(plan.report["fresh"]) == sorted(fresh)
    assert {name.split(".")[1] for name in plan.report["left_out"]["classifier"]} == {
        *("fc_norm", "clip_projector", "head", "conv_head"),
    }
    wanted = before | dict(published.named_parameters())
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"depths": [1, 1, 1, 1]}, r"'depths' must be .*\[1, 1, 2, 1\].*, got \[1, 1, 1, 1\]"),
        ({"center_feature_scale": True}, "'center_feature_scale' must be False"),
        ({"level2_post_norm": True}, "'level2_post_norm' must be False"),
        ({"channels": 32}, "'channels' must be 16"),
    ],
)
def test_a_shape_that_the_published_weights_do_not_have_is_refused(tmp_path, fields, told):
    section = BackboneConfig(from_pretrained=str(published_folder(tmp_path, model_of())), config=fields)
    with pytest.raises(ConfigError, match=told):
        backbone_config(section)


def test_a_head_that_its_own_configuration_promises_must_be_there(tmp_path):
    section = BackboneConfig(from_pretrained=str(published_folder(tmp_path, model_of(), use_clip_projector=True)))
    with pytest.raises(ConfigError) as caught:
        plan_load(backbone_source(section), backbone_config(section))
    assert caught.value.where == "backbone.from_pretrained"
    assert "4 weights" in caught.value.what


def test_the_start_is_told_and_kept(tmp_path, capsys):
    run = RunConfig(output_dir=tmp_path, recipe={})
    report = {
        **{"source": "/data/vit", "kind": "timm", "files": ["model.safetensors"], "loaded": 7, "parameters": 1234},
        "renamed": {f"blocks.{n}.attn.qkv.bias": [f"layers.{n}.{p}.bias" for p in "qkv"] for n in range(12)},
        "resized": {"positions": {"from": [1, 17, 64], "to": [1, 65, 64]}},
        **{"constants": {"no bias of keys": ["a", "b"]}, "left_out": {"classifier": ["head.bias"]}, "fresh": ["mask"]},
        **{"assumed": {"hidden_act": "gelu: a bare file"}, "normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}},
        "image_size": 32,
    }
    print_start({"backbone": report, "text": report}, run)
    told = " ".join(capsys.readouterr().err.split())
    for part in (
        "backbone: /data/vit (timm, files: 1)",
        "text: /data/vit (timm, files: 1)",
        "7 tensors, 1,234 parameters",
        "positions: (1, 17, 64) → (1, 65, 64)",
        "2 × no bias of keys",
        "1 × classifier, e.g. head.bias",
        "hidden_act = gelu: a bare file",
    ):
        assert part in told, part
    assert json.loads((tmp_path / "start.json").read_text()) == {"backbone": report, "text": report}
