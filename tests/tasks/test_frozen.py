"""A frozen backbone stays what it was on every rank, in every checkpoint and export, while its head learns."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forks
from saved_runs import call, make_calls
from shapes import make_shapes, metrics
from tiny import DINOV2, in_parts, tiny_run
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2Model

from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.checkpoint_tools.consolidate import consolidate, saved_weights
from m3i_scale.checkpoint_tools.documents import kinds_of
from m3i_scale.config import RunConfig, load_run
from m3i_scale.objective.build import build_objective
from m3i_scale.run.preflight import needs_of

pytestmark = pytest.mark.slow

STEPS = 6
HEAD = "heads.category.sets.0.weight"
ENGINES = {"whole": "zero3_cpu_fp32", "stopped": "zero3_cpu_fp32", "stage 1": "zero1_cpu_fp32", "bf16": "zero3_bf16"}


def make_source(folder: Path) -> Dinov2Model:
    """A published backbone, with dropout that must not act."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8, drop_path_rate=0.5))
    model.save_pretrained(folder)
    return model


def write(folder: Path, source: Path, shards: Path, engine: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "in_parts.json").write_text(json.dumps(in_parts(engine)))
    run = {
        "name": "probe",
        "output_dir": str(folder / "out"),
        "task": {"kind": "classification", "freeze": True},
        "backbone": {"from_pretrained": str(source)},
        "data": {"datasets": {"shapes": {"path": str(shards / "train")}}, "streams": 4},
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": STEPS, "warmup_steps": 1, "lr": 1e-2},
        "checkpoint": {"every_steps": 3, "keep_latest": 8},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": str(folder / "in_parts.json"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


class Frozen:
    """Runs of one source, of which nothing but the configuration is left when they go on."""

    def __init__(self, root: Path) -> None:
        shards = make_shapes(root / "shapes")
        source = make_source(root / "source").state_dict()
        self.source = {key: value for key, value in source.items() if not key.endswith("mask_token")}
        """All that a whole image is encoded with."""
        self.folders = {name: write(root / name, root / "source", shards, engine) for name, engine in ENGINES.items()}
        calls = {name: call(folder, faults=[]) for name, folder in self.folders.items()}
        signals = {"what": "signals", "numbers": [signal.SIGTERM], "seconds": 0.5}
        calls["stopped"]["faults"] = [{"rank": 1, "at": "write", "step": 3, **signals}]
        self.done = make_calls(calls, self.folders, root / "results")
        (root / "source" / "model.safetensors").unlink()
        self.folders["other stage"] = root / "other stage"
        shutil.copytree(self.folders["stopped"], root / "other stage")
        again = {
            "stopped": call(self.folders["stopped"], faults=[]),
            "other stage": call(
                self.folders["stopped"],
                f"output_dir={root / 'other stage' / 'out'}",
                "deepspeed=zero1_cpu_fp32",
                faults=[],
            ),
        }
        self.resumed = make_calls(again, self.folders, root / "again")

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        return self.folders[name] / "out" / "checkpoints" / f"step-{step:08d}"

    def weights(self, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
        return dict(saved_weights(self.checkpoint(name, step), "student"))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    return Frozen(tmp_path_factory.mktemp("frozen"))


def test_it_trains_stops_and_goes_on_without_its_source(frozen: Frozen) -> None:
    codes = {name: done.codes for name, done in frozen.done.items()}
    assert codes == {name: [75, 75] if name == "stopped" else [0, 0] for name in ENGINES}, frozen.done
    assert [done.codes for done in frozen.resumed.values()] == [[0, 0], [0, 0]], frozen.resumed


@pytest.mark.parametrize("name", [*ENGINES, "other stage"])
def test_the_backbone_is_that_of_the_source_and_the_head_has_learnt(frozen: Frozen, name: str) -> None:
    early, late = frozen.weights(name, 3), frozen.weights(name)
    assert {f"student.model.{key}" for key in frozen.source} == {key for key in late if key.startswith("student.")}
    for key, value in frozen.source.items():
        wanted = value.bfloat16().float() if name == "bf16" else value
        assert torch.equal(late[f"student.model.{key}"], wanted), key
    assert not torch.equal(early[HEAD], late[HEAD])


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_has_moments_of_the_head_alone(frozen: Frozen, name: str) -> None:
    saved = SavedTensors(frozen.checkpoint(name))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert HEAD in saved.names(kind)
        assert not [key for key in saved.names(kind) if key.startswith("student.")]


@pytest.mark.parametrize("name", ["whole", "stage 1", "bf16"])
def test_the_size_of_a_checkpoint_is_known_before(frozen: Frozen, name: str) -> None:
    run = load_run(str(frozen.folders[name] / "run.yaml"))
    labels = {"shapes": ["bar", "disc", "square"]}
    kinds = kinds_of(frozen.checkpoint(name))
    written = sum(of_kind["bytes"] for kind, of_kind in kinds.items() if kind.startswith(("tensors", "buffers")))
    assert needs_of(run, labels, 0, world_size=2, ranks_here=2).checkpoint_bytes == written


def test_a_run_that_was_stopped_is_the_whole_one(frozen: Frozen) -> None:
    whole, stopped = frozen.weights("whole"), frozen.weights("stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(value, stopped[key]) for key, value in whole.items())
    of_whole = metrics(frozen.folders["whole"] / "run.yaml")
    assert metrics(frozen.folders["stopped"] / "run.yaml") == of_whole
    for name in ("other stage", "stage 1"):
        losses = {step: record["loss"] for step, record in metrics(frozen.folders[name] / "run.yaml").items()}
        assert losses == pytest.approx({step: record["loss"] for step, record in of_whole.items()}, rel=1e-4)


def test_the_export_is_the_source_with_a_head(frozen: Frozen, forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    done = forks.run(
        "export", str(frozen.folders["whole"] / "out"), "--output", str(folder), "--task", "classification"
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForImageClassification.from_pretrained(folder)
    exported = model.dinov2.state_dict()
    assert all(torch.equal(exported[key], value) for key, value in frozen.source.items())
    assert torch.equal(model.classifier.weight[:, :64], frozen.weights("whole")[HEAD])


def test_frozen_weights_are_consolidated(frozen: Frozen, tmp_path: Path) -> None:
    made = consolidate(frozen.checkpoint("whole"), tmp_path / "whole")
    assert made["tensors"] == len(frozen.weights("whole"))


def test_it_is_in_evaluation_mode_while_the_rest_trains() -> None:
    values = tiny_run("supervised", *DINOV2).model_dump(mode="json", exclude={"recipe"})
    run = RunConfig.model_validate(values | {"task": {"kind": "classification", "freeze": True}})
    objective = build_objective(run, {"shapes": ["disc", "square"]}, None)
    assert run.task is not None
    run.task.prepare(objective, 2)
    for mode in (True, False):
        objective.train(mode)
        assert not any(module.training for module in objective.student.modules())
        assert objective.heads.training is objective.decoders.training is mode
    assert not any(parameter.requires_grad for parameter in objective.student.parameters())
    assert all(parameter.requires_grad for parameter in objective.heads.parameters())
