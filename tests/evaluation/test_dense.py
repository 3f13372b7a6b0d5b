"""The dense probe: classes of patches by hand, the interval of the mean IoU, and a whole evaluation with masks."""

import io
import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from m3i_scale.data.augment import CenterCrop
from m3i_scale.data.samples import open_mask
from m3i_scale.defaults import NO_CLASS
from m3i_scale.evaluation import decoding
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.dense import (
    PATCHES_PER_IMAGE,
    PatchCollector,
    mean_iou,
    patch_labels,
    pixel_patches,
    sample_patches,
)
from m3i_scale.evaluation.intervals import Clusters
from m3i_scale.evaluation.samples import SampleReader, open_table, read_samples
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

SIDE = 32


@dataclass(frozen=True)
class Halves:
    """A picture of two colors, left and right, and its mask; a frame around it has no class."""

    left: int
    right: int
    seed: int
    wide: int = 0
    """Columns more than rows."""

    def classes(self):
        classes = np.full((SIDE, SIDE + self.wide), self.left, dtype=np.uint8)
        classes[:, (SIDE + self.wide) // 2 :] = self.right
        return classes

    def image(self):
        colors = np.array([(230, 40, 40), (40, 230, 40), (40, 40, 230)])
        noise = np.random.default_rng(self.seed).integers(-30, 30, (SIDE, SIDE + self.wide, 3))
        pixels = np.clip(colors[self.classes()] + noise, 0, 255).astype(np.uint8)
        return self._png(pixels)

    def mask(self):
        classes = self.classes()
        classes[0] = NO_CLASS
        return self._png(classes)

    def _png(self, pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()


def halves_records(count=40, wide=0):
    pictures = [Halves(number % 3, (number + 1 + number // 3 % 2) % 3, number, wide) for number in range(count)]
    return [
        Record(
            f"h{number}",
            picture.image(),
            label=picture.left,
            meta={"concept": f"c{number}", "family": f"f{number // 2}"},
            split="val" if number % 5 == 0 else "train",
            mask=picture.mask(),
        )
        for number, picture in enumerate(pictures)
    ]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "masked"
    options = ShardOptions(multiple_of=2, vocabulary=0)
    summary = make_shards(ListedInput(halves_records(), ["red", "green", "blue"]), output, name="h", options=options)
    assert summary["splits"]["train"]["with_mask"] == 32
    return output


def test_the_commonest_class_of_a_patch_counts():
    mask = np.array([[1, 1, 2, 2], [1, 3, 2, 2], [NO_CLASS, NO_CLASS, 0, 0], [NO_CLASS, 1, 0, 5]], dtype=np.uint8)
    assert patch_labels(mask, 2).tolist() == [1, 2, NO_CLASS, 0]
    assert patch_labels(mask, 4).tolist() == mask.ravel().tolist()


def test_sides_that_do_not_divide_are_cut_as_evenly_as_pixels_allow():
    mask = np.zeros((5, 5), dtype=np.uint8)
    mask[:, 3:] = 7
    assert patch_labels(mask, 2).tolist() == [0, 7, 0, 7]


def test_pixels_of_a_patch_are_its_own():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    patches = pixel_patches(images, 2)
    assert patches.shape == (2, 4, 12)
    torch.testing.assert_close(patches[1, 3] * 255, images[1, :, 2:, 2:].float().flatten())


def test_patches_are_drawn_per_image_and_keep_their_place():
    collector = PatchCollector()
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = NO_CLASS
    tokens = torch.arange(3 * 64.0).reshape(3, 64, 1)
    collector.add(sample_patches(5, [None, mask, np.full((8, 8), NO_CLASS, dtype=np.uint8)], tokens, None))
    patches = collector.patches()
    assert patches.image_P.tolist() == [6] * PATCHES_PER_IMAGE
    columns = (patches.features["model"][:, 0] - 64) % 8
    assert (columns < 4).all()
    assert len(set(patches.features["model"][:, 0])) == PATCHES_PER_IMAGE


def test_a_draw_of_the_patches_is_kept_however_many_pass():
    mask, images = np.zeros((8, 8), dtype=np.uint8), 40
    drawn, everything = PatchCollector(limit=50), PatchCollector()
    for first in range(0, images, 8):
        tokens = torch.rand(8, 64, 3) + torch.arange(first, first + 8)[:, None, None]
        for collector in (drawn, everything):
            collector.add(sample_patches(first, [mask] * 8, tokens, None))
        assert drawn._held <= 2 * 50 + 8 * PATCHES_PER_IMAGE
    kept, whole = drawn.patches(), everything.patches()
    assert len(kept.labels_P) == 50
    assert len(whole.labels_P) == images * PATCHES_PER_IMAGE
    assert (kept.features["model"].astype(int)[:, 0] == kept.image_P).all()  # rows stay together
    assert len(set(kept.image_P)) > 20  # of the whole table, not of its beginning or its end
    rows = {row.tobytes() for row in whole.features["model"]}
    assert all(row.tobytes() in rows for row in kept.features["model"])


def test_why_there_are_no_patches():
    collector = PatchCollector()
    assert (collector.patches(), collector.reason) == (None, "no masks")
    collector = PatchCollector()
    collector.add(sample_patches(0, [np.full((8, 8), NO_CLASS, dtype=np.uint8)], torch.zeros(1, 64, 1), None))
    assert collector.patches() is None
    assert "no mask names the class" in collector.reason
    collector = PatchCollector()
    collector.add(sample_patches(0, [np.zeros((8, 8), dtype=np.uint8)], torch.zeros(1, 63, 1), None))
    assert collector.patches() is None
    assert "63 patches" in collector.reason


def test_mean_iou_is_that_of_scikit_learn_and_its_interval_holds_it():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 600)
    predicted = np.where(generator.random(600) < 0.3, generator.integers(0, 4, 600), truth)
    clusters = Clusters("image", np.repeat(np.arange(60), 10))
    found = mean_iou(predicted, truth, clusters).estimate
    assert found.value == pytest.approx(jaccard_score(truth, predicted, average="macro"))
    assert found.low < found.value < found.high
    assert (found.clusters, found.samples) == (60, 600)


def test_a_class_that_never_occurs_only_costs_the_true_one():
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 9, 1, 1])
    found = mean_iou(predicted, truth, Clusters("image", np.arange(4))).estimate
    assert found.value == pytest.approx((0.5 + 1.0) / 2)


def test_the_interval_is_of_the_classes_that_a_draw_has():
    """Two classes that lie in one image each and are always found: a draw without them must not count them as lost."""
    truth = np.repeat(np.arange(60) % 4, 10)
    truth[:10], truth[10:20] = 8, 9
    predicted = truth.copy()
    predicted[20] = 8  # one false alarm, in another image
    found = mean_iou(predicted, truth, Clusters("image", np.repeat(np.arange(60), 10))).estimate
    assert found.value > 0.97
    assert found.low > 0.95


def test_masks_follow_the_centre_crop(tmp_path):
    options = ShardOptions(multiple_of=1, vocabulary=0)
    make_shards(ListedInput(halves_records(10, wide=16), ["a", "b", "c"]), tmp_path / "wide", name="w", options=options)
    for sample in read_samples(open_table(str(tmp_path / "wide" / "val"), "--data"), CenterCrop(16, 16), masks=True):
        left, right = sample.mask[2, 0], sample.mask[2, -1]
        assert left != right
        assert (sample.mask[2, :8] == left).all()
        assert (sample.mask[2, 8:] == right).all()
        assert sample.pixels[left, 2, 0] > 150
        assert sample.pixels[right, 2, -1] > 150


def test_patches_of_two_colours_are_told_apart(vit_folder, masked):
    found = evaluate(
        vit_folder, str(masked / "val"), train_data=str(masked / "train"), measures=("dense",), baseline="pixels"
    )
    for block in (found["measures"], found["baseline"]["measures"]):
        dense = block["dense"]
        assert dense["accuracy"]["value"] > 0.9
        assert dense["mean_iou"]["value"] > 0.85
        assert dense["chance"] == pytest.approx(1 / 3)
        assert dense["mean_iou"]["majority"] < 0.2
        assert (dense["images"], dense["accuracy"]["samples"]) == (8, 8 * PATCHES_PER_IMAGE)
    assert found["baseline"]["advantage_of_model"]["dense"]["accuracy"]["clusters"] == 8


def test_features_beside_the_dense_ones_stay_the_same(vit_folder, masked):
    data = {"data": str(masked / "val"), "train_data": str(masked / "train")}
    both = evaluate(vit_folder, **data, measures=("knn", "dense"))
    alone = evaluate(vit_folder, **data, measures=("knn",))
    assert both["measures"]["knn"] == alone["measures"]["knn"]


def gray(bits):
    """A gray PNG of few bits; Pillow only writes 1 and 8."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(SIDE * bits // 8)) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (b"no image", "mask is no PNG"),
        (Halves(0, 1, 0, wide=2).mask(), "mask is not of the size of its image"),
        (Halves(0, 1, 0).image(), "mask is a PNG of three channels"),
        (gray(4), "mask is a PNG of one gray channel of 4 bit"),
        (Halves(0, 1, 0).mask()[:50], "mask does not decode"),
    ],
)
def test_masks_that_do_not_fit_are_counted_and_their_samples_stay(vit_folder, masked, monkeypatch, mask, reason):
    original = SampleReader.read
    data = {"data": str(masked / "val"), "train_data": str(masked / "train")}
    sound = evaluate(vit_folder, **data, measures=("knn",))

    def read(reader, place):
        one = original(reader, place)
        return replace(one, members=one.members | {"mask.png": mask})

    monkeypatch.setattr(SampleReader, "read", read)
    found = evaluate(vit_folder, **data, measures=("knn", "dense"))
    assert found["measures"]["knn"] == sound["measures"]["knn"]
    assert found["data"]["left_out"] == {}
    assert found["not_measured"]["dense"].startswith("no masks in the training data")
    assert found["warnings"][0].startswith(f"8 masks of the test data cannot be used: {reason}")


def test_a_palette_of_few_bits_holds_its_indices():
    picture = Image.new("P", (SIDE, SIDE), 2)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", bits=2)
    assert buffer.getvalue()[24] == 2
    opened = open_mask({"mask.png": buffer.getvalue()}, 10_000, (SIDE, SIDE))
    assert set(decoding.center_mask(opened, CenterCrop(8, 8)).ravel()) == {2}
