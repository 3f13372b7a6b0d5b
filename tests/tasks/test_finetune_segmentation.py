"""`finetune segmentation`: from an export and images with masks to a segmenter and a figure, by the same path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks
from launch import environment
from masked import SCENE_CLASSES, scene, write_shards
from transformers import ViTConfig, ViTModel, pipeline

from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json
from m3i_scale.tasks.finetune import prepare
from m3i_scale.tasks.finetune_result import result_lines

TRAIN, VAL = 48, 16
STEPS = 12  # two epochs of 48 images in batches of 8
UPERNET = ["task.freeze=false", "task.head={kind: upernet, channels: 16}"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "export"
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # two epochs are enough from some weights, and not from all
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_shards(root / "train", [scene(number) for number in range(TRAIN)], SCENE_CLASSES)
    write_shards(root / "val", [scene(1000 + number) for number in range(VAL)], SCENE_CLASSES)
    return root


def command(start: Path, data: Path, output: Path, *more: str) -> list[str]:
    fields = [f"output_dir={output}", "optim.batch_size=8", "optim.micro_batch_size=8", "deepspeed=zero1_cpu_fp32"]
    fields += ["log.progress=false", "data.streams=4", "optim.lr=2e-3"]
    return ["finetune", "segmentation", str(start), "--data", str(data), "--json", *fields, *more]


def test_a_dry_run_tells_all_and_starts_nothing(start: Path, data: Path, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = forks.run(*command(start, data, output, "--dry-run"), env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["task"], told["protocol"], told["published"]) == ("segmentation", "segment", None)
    assert (told["samples"], told["classes"], told["steps"]) == (TRAIN, len(SCENE_CLASSES), 32 * TRAIN // 8)
    assert told["memory_gib"] > 0
    assert not (output / "checkpoints").exists()


@pytest.mark.parametrize("more", [["--protocol", "segment"], UPERNET], ids=["segment", "upernet"])
def test_a_segmenter_is_trained_exported_and_measured(
    more: list[str], start: Path, data: Path, forks: Forks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = forks.run(*command(start, data, output, "--epochs", "2", *more), env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert read_json(output / "finetune.json") == told
    assert (told["step"], told["epochs"]) == (STEPS, 2)
    assert "epochs was 32, is 2" in told["deviations"]
    assert told["figures"]["mIoU"]["value"] > told["figures"]["mIoU"]["majority"]
    assert told["miou"] == pytest.approx(100 * told["figures"]["mIoU"]["value"])
    assert [one["name"] for one in told["figures"]["classes"]] == SCENE_CLASSES
    assert any(line.startswith(f"miou: {told['miou']:.2f} %") for line in result_lines(told))
    folder = Path(told["export"])
    assert folder == output / "segmenter"
    assert told["export_task"] == ("segmentation" if more is UPERNET else "features")
    if more is UPERNET:
        config = pipeline("image-segmentation", str(folder)).model.config
        assert [config.id2label[number] for number in range(len(SCENE_CLASSES))] == SCENE_CLASSES


def prepared(start: Path, data: Path, tmp_path: Path, *fields: str, protocol: str = "segment") -> Any:
    overrides = [f"output_dir={tmp_path / 'out'}", *fields]
    return prepare("segmentation", str(start), data, protocol, overrides, epochs=None, shards=None, here=False)


def unnamed(root: Path) -> None:
    (root / "train" / "mask_labels.json").unlink()


def differing(root: Path) -> None:
    (root / "val" / "mask_labels.json").write_text(json.dumps([*SCENE_CLASSES, "blue"]))


def unnamed_to_evaluate(root: Path) -> None:
    (root / "val" / "mask_labels.json").unlink()


def twice(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "mask_labels.json").write_text(json.dumps(["ground", "red", "red"]))


def no_training(root: Path) -> None:
    (root / "train").rename(root / "more")


def flat(root: Path) -> None:
    for path in root.rglob("*.tar"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "where", "named"),
    [
        (unnamed, "train", "mask_labels.json"),
        (unnamed_to_evaluate, "val", "mask_labels.json"),
        (differing, "val", "blue"),
        (twice, "train/mask_labels.json", "red"),
        (no_training, "scenes", "val"),
        (flat, "scenes", "masks"),
    ],
)
def test_what_is_no_data_with_masks_is_refused(spoil: Any, where: str, named: str, start: Path, tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    for split in ("train", "val"):
        write_shards(root / split, [scene(1)] * 8, SCENE_CLASSES)
    spoil(root)
    with pytest.raises(ConfigError) as caught:
        prepared(start, root, tmp_path)
    assert str(caught.value.where).endswith(where)
    assert named in f"{caught.value.what} {caught.value.why}"
    assert caught.value.fix


def test_an_evaluation_reads_all_images_for_evaluation_once(start: Path, data: Path, tmp_path: Path) -> None:
    assert prepared(start, data, tmp_path).run.evaluation.batches == 1
    assert prepared(start, data, tmp_path, "optim.micro_batch_size=8").run.evaluation.batches == VAL // 8


def test_a_protocol_of_another_task_is_refused(start: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(start, data, tmp_path, protocol="finetune")
    assert "finetune" in str(caught.value.where)
