"""A segmenter is measured at the size of its images, by a sliding window, and what it predicts can be looked at."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import CLASSES as CELLS
from masked import SCENE_CLASSES, SIZE, classes_of, mask_of_picture, picture, png, scene, write_shards
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoImageProcessor, SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from m3i_scale.errors import ConfigError, DataError, ExportError
from m3i_scale.evaluation.commands import MEASURES, evaluate
from m3i_scale.evaluation.intervals import clusters_of
from m3i_scale.evaluation.report import render
from m3i_scale.evaluation.samples import Sample, open_table
from m3i_scale.tasks.segmentation import segmenter as module
from m3i_scale.tasks.segmentation.segmenter import (
    LEGEND,
    Overlays,
    Segmenter,
    check_classes,
    classes_at,
    count_overlaps,
    is_segmenter,
    load_segmenter,
    segmenter_metrics,
    starts,
)


def test_windows_cover_a_side_as_published_ones_do() -> None:
    assert starts(512, 512) == [0]
    assert starts(600, 512) == [0, 88]
    assert starts(853, 512) == [0, 341]
    assert starts(854, 512) == [0, 341, 342]
    for length in range(24, 120):
        covered = {place for start in starts(length, 24) for place in range(start, start + 24)}
        assert covered == set(range(length))


@pytest.mark.parametrize("size", [(24, 24), (24, 70), (90, 24), (40, 30)])
def test_a_sliding_window_gives_every_pixel_what_it_shows(size: tuple[int, int]) -> None:
    """Of a segmenter whose logits are the pixels themselves."""
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([2 * x, 2 * y, 100 + 0 * x]).astype(np.uint8)
    segmenter = Segmenter(lambda windows: windows, 24, ["a", "b", "c"], "pixels", torch.device("cpu"), batch_size=3)
    slid = segmenter.slide(pixels)
    logits = nn.functional.interpolate(slid[None], size, mode="bilinear", align_corners=False)[0]
    assert logits.shape == (3, *size)
    inner = (slice(None), slice(3, -3), slice(3, -3))  # at the edge a resize is not linear
    tolerance = 0.0 if min(size) == 24 else 1.0  # of rounded levels where it is resized
    assert (logits[inner] - torch.from_numpy(pixels).float()[inner]).abs().max() <= tolerance


@pytest.mark.parametrize("at_once", [1, 23 * 31, 3 * 23 * 31, 1 << 20])
def test_a_few_classes_at_a_time_give_the_same_argmax(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESIZED", at_once)
    logits = torch.randn(7, 12, 10, generator=torch.Generator().manual_seed(0))
    logits[5] = logits[2]  # of equals the first
    whole = nn.functional.interpolate(logits[None], (23, 31), mode="bilinear", align_corners=False)[0]
    assert torch.equal(classes_at(logits, (23, 31)), whole.argmax(dim=0))


def by_colour(windows: Tensor) -> Tensor:
    """Logits of a segmenter that reads from the color where a pixel lies, and so of which class it is."""
    x, y = (windows[:, 0] - 2) // 5 + 0.5, (windows[:, 1] - 2) // 6 + 0.5
    classes = torch.from_numpy(classes_of(x.numpy(), y.numpy()))
    return nn.functional.one_hot(classes, len(CELLS)).permute(0, 3, 1, 2)


def test_a_segmenter_is_measured_at_the_size_of_its_images_with_their_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {"png": png(picture()), "mask.png": png(mask_of_picture())}
    samples = [good, good | {"png": png(picture(), exif=exif)}, {"png": good["png"]}]
    samples.append(good | {"mask.png": png(mask_of_picture().resize((20, 20)))})
    samples.append(good | {"mask.png": png(Image.new("L", SIZE, len(CELLS)))})
    samples.append(good | {"mask.png": png(Image.new("L", SIZE, 255))})
    samples.append({"png": png(Image.new("RGB", (2, 60))), "mask.png": png(Image.new("L", (2, 60)))})
    shards = str(write_shards(tmp_path / "shards", samples, CELLS))
    segmenter = Segmenter(by_colour, min(SIZE), CELLS, "colors", torch.device("cpu"))
    check_classes(segmenter, shards)
    table = open_table(shards, "--data")
    counts, masked = count_overlaps(segmenter, table, (), None)
    assert counts.shape == (2, 3, len(CELLS))
    assert len(table) == 7
    assert sum(table.bad_masks.values()) == 4
    found = segmenter_metrics(counts, clusters_of(table).take(masked), CELLS, segmenter.size)
    assert found["mIoU"]["value"] == found["pixel_accuracy"] == 1.0
    counts[0, 0] //= 2
    worse = segmenter_metrics(counts, clusters_of(table).take(masked), CELLS, segmenter.size)
    assert worse["mIoU"]["low"] < worse["mIoU"]["value"] < 1.0
    with pytest.raises(DataError):
        check_classes(replace(segmenter, classes=CELLS[::-1]), shards)


def test_more_classes_than_a_mask_can_tell_apart_are_refused(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(256)]
    segmenter = Segmenter(by_colour, 24, names, "colors", torch.device("cpu"))
    for count in (255, 256):
        shards = str(write_shards(tmp_path / str(count), [{"png": png(picture())}], names[:count]))
        if count == 255:
            check_classes(replace(segmenter, classes=names[:count]), shards)
        else:
            with pytest.raises(DataError) as caught:
                check_classes(segmenter, shards)
            assert caught.value.where == shards


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of `transformers` whose logits are a quarter of its input."""
    folder = tmp_path_factory.mktemp("segformer")
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(SCENE_CLASSES)),
        label2id={name: number for number, name in enumerate(SCENE_CLASSES)},
    )
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    samples = [scene(number) for number in range(6)]
    samples[4].pop("mask.png")
    return str(write_shards(tmp_path_factory.mktemp("scenes") / "val", samples, SCENE_CLASSES))


def test_a_stock_segmenter_is_measured_as_it_predicts(stock: Path, shards: str, tmp_path: Path) -> None:
    found = evaluate(stock, shards, pictures=tmp_path / "overlays", picture_count=2)
    model = SegformerForSemanticSegmentation.from_pretrained(stock).eval()
    processor = AutoImageProcessor.from_pretrained(stock)
    both, either = torch.zeros(3), torch.zeros(3)
    for number in (0, 1, 2, 3, 5):
        image, mask = (Image.open(io.BytesIO(scene(number)[name])) for name in ("png", "mask.png"))
        with torch.no_grad():
            logits = model(**processor(images=image, return_tensors="pt")).logits
        assert logits.shape[2:] == (8, 8)
        logits = nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
        predicted, truth = logits[0].argmax(dim=0), torch.from_numpy(np.array(mask)).long()
        for label in range(3):
            of_truth, of_prediction = truth == label, (predicted == label) & (truth != 255)
            both[label] += (of_truth & of_prediction).sum()
            either[label] += (of_truth | of_prediction).sum()
    figures = found["measures"]["segmenter"]
    assert figures["mIoU"]["value"] == pytest.approx(float((both / either).mean()))
    assert [one["iou"] for one in figures["classes"]] == pytest.approx((both / either).tolist())
    assert any("1 images" in warning for warning in found["warnings"])
    worst = min(figures["classes"], key=lambda one: float(one["iou"]))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(found))
    assert f"{worst['name']} {worst['iou']:.3f}" in console.export_text()
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 2
    legend = json.loads((tmp_path / "overlays" / LEGEND).read_text())
    assert [one["name"] for one in legend] == SCENE_CLASSES


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"train_data": "SHARDS"}, "--train-data"),
        ({"baseline": "pixels"}, "--baseline"),
        ({"pool": "cls"}, "--pool"),
        ({"templates": ("a drawing of {}",)}, "--template"),
        ({"pictures": Path("new"), "picture_samples": ["a.tar/a"]}, "--picture-samples"),
        ({"measures": ("knn",)}, "--measure segmenter"),
        ({"measures": MEASURES}, "--measure segmenter"),
        ({"measures": ("segmenter", "knn")}, "--measure segmenter"),
        ({"picture_count": 3}, "--pictures"),
        ({"pictures": "STOCK"}, "must be empty"),
    ],
)
def test_an_option_without_effect_on_a_segmenter_is_refused(
    stock: Path, shards: str, options: dict[str, Any], names: str
) -> None:
    given = {"SHARDS": shards, "STOCK": stock}
    options = {key: given.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ConfigError) as caught:
        evaluate(stock, shards, **options)
    assert names in str(caught.value)


@pytest.mark.parametrize(("asked", "largest"), [({}, 16), ({"batch_size": 64}, 30)])
def test_few_windows_at_a_time_unless_more_are_asked_for(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], largest: int
) -> None:
    long = {"png": png(Image.new("RGB", (640, 32))), "mask.png": png(Image.new("L", (640, 32)))}
    batches: list[int] = []
    forward = SegformerForSemanticSegmentation.forward

    def noted(self: SegformerForSemanticSegmentation, pixel_values: Tensor) -> Any:
        batches.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(SegformerForSemanticSegmentation, "forward", noted)
    evaluate(stock, str(write_shards(tmp_path / "long", [long], SCENE_CLASSES, shards=1)), **asked)
    assert (max(batches), sum(batches)) == (largest, 30)


@pytest.mark.parametrize("size", [None, "abc", {"height": "abc", "width": "abc"}, {"height": 0, "width": 0}, [32]])
def test_a_segmenter_whose_input_size_is_broken_is_refused(stock: Path, tmp_path: Path, size: Any) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(stock, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    with pytest.raises(ExportError) as caught:
        load_segmenter(folder, torch.device("cpu"), 1)
    assert caught.value.where == str(folder)


def test_an_error_without_words_is_told_by_its_name(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", fails)
    with pytest.raises(ExportError, match="RuntimeError"):
        load_segmenter(stock, torch.device("cpu"), 1)


@pytest.mark.parametrize("config", [{"architectures": ["Dinov2Model"]}, {"architectures": 5}, []])
@pytest.mark.parametrize(
    "options",
    [
        {"measures": ("segmenter",)},
        {"measures": (*MEASURES, "segmenter")},
        {"pictures": Path("new"), "picture_count": 3},
    ],
)
def test_a_folder_without_a_segmenter_is_told_before_anything_is_read(
    tmp_path: Path, config: Any, options: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not is_segmenter(tmp_path)
    with pytest.raises(ConfigError) as caught:
        evaluate(tmp_path, str(tmp_path / "no shards"), **options)
    assert "segmenter" in str(caught.value)


# ---------------------------------------------------------------- overlays


def test_an_overlay_shows_image_truth_and_prediction_in_the_same_colours(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 20, 30), dtype=np.uint8)
    mask = generator.integers(0, 4, (20, 30), dtype=np.uint8)
    mask[:5] = 255
    predicted = np.where(mask == 255, 1, mask).astype(np.uint8)
    predicted[10, 10] = (mask[10, 10] + 1) % 4
    draw = Overlays(tmp_path / "new" / "overlays", 1, ["sky", "sea", "sand", "ship"])
    for key in ("a.tar/../x y", "a.tar/z"):
        draw(Sample(key, pixels, None, -1, {}, mask), predicted)
    (path,) = (tmp_path / "new" / "overlays").glob("*.png")
    drawn = np.asarray(Image.open(path))
    image, truth, prediction = drawn[:, :30], drawn[:, 34:64], drawn[:, 68:]
    assert np.array_equal(image, pixels.transpose(1, 2, 0))
    assert np.array_equal(truth[:5], image[:5])
    assert (prediction[:5] != image[:5]).any(axis=2).all()
    differs = (truth != prediction).any(axis=2)
    assert differs[:5].all()
    assert np.argwhere(differs[5:]).tolist() == [[5, 10]]
    legend = json.loads((tmp_path / "new" / "overlays" / LEGEND).read_text())
    assert [(one["class"], one["name"]) for one in legend] == [(0, "sky"), (1, "sea"), (2, "sand"), (3, "ship")]
    colors = np.array([one["rgb"] for one in legend])
    mixed = (0.35 * image[5:] + 0.65 * colors[mask[5:]]).round()
    assert np.array_equal(truth[5:], mixed.astype(np.uint8))
    with pytest.raises(ConfigError):
        Overlays(tmp_path / "new" / "overlays", 1, ["sky"])
