"""Built-in protocols hold together, say where each of their numbers is from, and are for one family of backbones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig, known_protocols, known_recipes, known_runs, load_run, parse_section
from m3i_scale.errors import ConfigError
from m3i_scale.exports.write import portable_run
from m3i_scale.run.check import errors_of
from m3i_scale.tasks.classification.classification_task import Classification
from m3i_scale.tasks.detection.detection_task import Detection
from m3i_scale.tasks.segmentation.pixel_heads import read_layers
from m3i_scale.tasks.segmentation.segmentation_heads import UperNetSegmentation
from m3i_scale.tasks.segmentation.segmentation_task import Segmentation
from m3i_scale.tasks.unpacked import TRAIN

IMAGENET = 1_281_167
METRICS: dict[object, str] = {Classification: "top-1", Segmentation: "mIoU", Detection: "box AP"}
NUMBER = re.compile(r"[:\[,]\s*-?\d")


def without_source(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    parts = [line.partition(" # ") for line in lines]
    return [code for code, _, source in parts if NUMBER.search(code) and not source.strip()]


@pytest.mark.parametrize("name", known_protocols())
def test_what_an_export_says_of_a_run_is_read_again(name: str) -> None:
    run = load_run(name)
    again = parse_section(RunConfig, portable_run(run), where="objective.json", stored=True)
    assert (again.recipe, again.data.augment.mean) == (run.recipe, run.data.augment.mean)


@pytest.mark.parametrize("name", known_protocols())
def test_a_protocol_holds_together_but_for_data(name: str) -> None:
    run = load_run(name)
    frozen = ["task.freeze"] if run.task is not None and run.task.freeze else []  # the export is given later, too
    (place, *others) = sorted(str(fault.where) for fault in errors_of(name, ranks=1))
    assert (place.split(":")[0], others) == ("data.datasets" + ".train.path" * (TRAIN in run.data.datasets), frozen)
    assert without_source(known_protocols()[name]) == []
    assert run.name == name
    assert run.protocol is not None
    assert run.protocol.deviations
    published = run.protocol.published
    assert (published is None) == (name in ("finetune", "segment", "detect"))
    assert published is None or published.metric == METRICS[type(run.task)]
    if run.protocol.epochs is None:
        assert run.optim.steps == run.protocol.steps
    elif name.startswith("in1k_"):
        assert run.optim.steps == round(run.protocol.epochs * IMAGENET / run.optim.batch_size)


def test_a_number_without_source_is_found(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  lr: 1.0e-3\n  betas: [0.9, 0.999]  # paper, table 2\n  eps: 1  #\n")
    assert [code.strip() for code in without_source(path)] == ["lr: 1.0e-3", "eps: 1  #"]


def test_protocols_are_found_by_name_and_are_no_recipes() -> None:
    assert known_protocols().keys() <= known_runs().keys()
    assert not known_protocols().keys() & known_recipes().keys()


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("in1k_internimage_h", "vit-b/16"),
        ("in1k_finetune_b", "internimage-t"),
        ("in1k_finetune_l", "internimage-h"),
        ("ade20k_upernet", "internimage-t"),
        ("ade20k_upernet_internimage", "vit-b/16"),
        ("ade20k_eomt", "internimage-t"),
        ("coco_vitdet_b", "internimage-t"),
        ("coco_internimage_fpn", "vit-b/16"),
        ("coco_rfdetr", "internimage-t"),
    ],
)
def test_a_protocol_for_another_family_is_refused(name: str, preset: str) -> None:
    run = load_run(name, [f"backbone.preset={preset}"])
    with pytest.raises(ConfigError) as caught:
        run.task.check(run, backbone_config(run.backbone))
    assert preset in str(caught.value.where)
    assert any(preset in str(fault.where) for fault in errors_of(name, [f"backbone.preset={preset}"]))


@pytest.mark.parametrize("name", ["ade20k_upernet", "coco_rfdetr"])
def test_layers_of_a_deeper_backbone_are_not_dropped(name: str) -> None:
    """Layers behind the last one that a head reads would be computed and exported without effect."""
    deeper = ["backbone.preset=vit-l/16"]
    known = {str(fault.where).split(":")[0] for fault in errors_of(name, deeper, ranks=1)}
    assert "task.head.out_layers" in known
    fitted = {
        str(fault.where).split(":")[0] for fault in errors_of(name, [*deeper, "task.head.out_layers=null"], ranks=1)
    }
    assert known - fitted == {"task.head.out_layers"}


def test_upernet_reads_the_published_layers_of_larger_backbones() -> None:
    """BEiT-L: out_indices [7, 11, 15, 23], from 0."""
    head = UperNetSegmentation()
    assert {depth: read_layers(head, depth) for depth in (12, 24)} == {12: (4, 6, 8, 12), 24: (8, 12, 16, 24)}


@pytest.mark.parametrize("preset", ["vit-b/16", "dinov2-s/14", "clip-b/16", "internimage-t"])
@pytest.mark.parametrize("name", ["finetune", "segment", "detect"])
def test_a_default_protocol_is_for_any_family(name: str, preset: str) -> None:
    run = load_run(name, [f"backbone.preset={preset}", "task.freeze=false"])
    run.task.check(run, backbone_config(run.backbone))


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "steps": 10}])
def test_a_protocol_has_one_length(length: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"task": {"kind": "classification"}, "protocol": length})


def test_a_protocol_without_task_has_no_effect() -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"protocol": {"epochs": 1}})
