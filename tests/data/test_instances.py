"""Boxes and masks of a sample: what others pack is read as they read it, and what is hostile is a bad sample."""

import copy
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as theirs

from m3i_scale.data.instances import INSTANCES, decode_runs, read_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.shards.coco import encode_runs

SIZE = (20, 16)
"""Width and height."""
DISC = [[4.0, 4.0, 12.0, 4.0, 12.0, 10.5, 4.0, 10.5], [14.0, 2.0, 18.0, 2.0, 16.0, 6.0]]


def packed(mask):
    return theirs.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def box_mask():
    mask = np.zeros(SIZE[::-1])
    mask[3:9, 5:11] = 1
    return mask


def member(*annotations, **head):
    rows = [
        {"id": 7 + number, "category": 1, "bbox": [1, 2, 3.5, 4], "area": 9.5, "iscrowd": 0} | annotation
        for number, annotation in enumerate(annotations)
    ]
    return {"image_id": 3, "width": SIZE[0], "height": SIZE[1], "annotations": rows} | head


def read(value, categories=3, size=SIZE):
    return read_instances({INSTANCES: json.dumps(value).encode()}, categories, size)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=9), st.integers(1, 9))
def test_run_lengths_are_those_of_pycocotools(rows, scale):
    width = min(map(len, rows))
    mask = np.kron(np.array([row[:width] for row in rows], dtype=np.uint8), np.ones((scale, 2 * scale), np.uint8))
    text = packed(mask)
    runs = decode_runs(text, mask.size)
    assert encode_runs(runs.tolist()) == text
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape[::-1]).T, mask)
    assert (
        theirs.frPyObjects({"size": list(mask.shape), "counts": runs.tolist()}, *mask.shape)["counts"] == text.encode()
    )


@pytest.mark.parametrize("text", ["", "é", "o", "0o", "P" * 40 + "1", "1" * 200, packed(box_mask())[:-1], "~", "o0o0O"])
def test_what_are_no_run_lengths_of_the_mask_is_refused(text):
    with pytest.raises(ValueError, match="mask"):
        decode_runs(text, SIZE[0] * SIZE[1])


@pytest.mark.parametrize("runs", [[-1, 5], [1.5], [True], [2**60], ["3"]])
def test_what_are_no_run_lengths_is_not_packed(runs):
    with pytest.raises(ValueError, match="mask"):
        encode_runs(runs)


def test_masks_of_polygons_and_of_run_lengths_are_those_of_pycocotools():
    text = packed(box_mask())
    found = read(member({"segmentation": DISC}, {"segmentation": {"size": [16, 20], "counts": text}}, {}))
    drawn = theirs.decode(theirs.merge(theirs.frPyObjects(DISC, 16, 20)))
    assert drawn.sum() > 20
    assert np.array_equal(found.mask(0), drawn)
    assert np.array_equal(found.mask(1), box_mask())
    assert found.mask(2) is None


def test_training_sees_no_crowds_and_no_box_without_area_and_others_are_cut_off_at_the_edge():
    boxes = [[1, 2, 3, 4], [1, 2, 0, 4], [18, 2, 6, 40], [25, 2, 3, 4], [-5, -5, 5, 5], [1, 2, 3, 4]]
    found = read(member(*({"bbox": box, "iscrowd": int(number == 5)} for number, box in enumerate(boxes))))
    assert found.to_train().tolist() == [0, 2]
    assert found.corners()[[0, 2]].tolist() == [[1, 2, 4, 6], [18, 2, 20, 16]]
    assert found.boxes_N4.tolist() == boxes
    assert len(read(member())) == 0
    assert read(member()).to_train().tolist() == []


def test_what_lvis_says_of_an_image_is_read():
    found = read(member({}, neg_category_ids=[2], not_exhaustive_category_ids=[]))
    assert (found.negative, found.not_exhaustive) == ((2,), ())
    assert read(member({})).negative is None


SMALL = {"size": [16, 20], "counts": packed(box_mask())}
HOSTILE = {
    "no number": member({"bbox": [1, 2, float("nan"), 4]}),
    "infinite": member({"bbox": [1, 2, float("inf"), 4]}),
    "huge": member({"bbox": [1, 2, 3, 1e300]}),
    "whole and huge": member({"bbox": [1, 2, 3, 10**400]}),
    "negative": member({"bbox": [1, 2, -3, 4]}),
    "three numbers": member({"bbox": [1, 2, 3]}),
    "text": member({"bbox": ["1", 2, 3, 4]}),
    "no box": member({"bbox": None}),
    "no area": member({"area": None}),
    "negative area": member({"area": -1}),
    "no id": member({"id": None}),
    "id of truth": member({"id": True}),
    "id beyond": member({"id": 2**64}),
    "two of an id": member({"id": 1}, {"id": 1}),
    "crowd of two": member({"iscrowd": 2}),
    "category beyond": member({"category": 3}),
    "category below": member({"category": -1}),
    "category of text": member({"category": "1"}),
    "annotation of text": member() | {"annotations": ["x"]},
    "no annotations": member() | {"annotations": None},
    "no image": member(image_id=None),
    "no width": member(width=0),
    "fractions of pixels": member(width=20.0),
    "of another size": member(width=16, height=20),
    "polygon far away": member({"segmentation": [[1, 1, 5, 5, 1e8, 5]]}),
    "polygon that fills memory": member({"segmentation": [[1, 1, 30, 15] * 40]}),
    "polygon of two corners": member({"segmentation": [[1, 1, 5, 5]]}),
    "polygon of odd numbers": member({"segmentation": [[1, 1, 5, 5, 5, 1, 3]]}),
    "polygon of text": member({"segmentation": [["1", 1, 5, 5, 5, 1]]}),
    "flat polygon": member({"segmentation": [1, 1, 5, 5, 5, 1]}),
    "no polygons": member({"segmentation": []}),
    "mask of text": member({"segmentation": "x"}),
    "mask of another size": member({"segmentation": SMALL | {"size": [20, 16]}}),
    "mask that is cut off": member({"segmentation": SMALL | {"counts": SMALL["counts"][:-1]}}),
    "mask that is too long": member({"segmentation": SMALL | {"counts": SMALL["counts"] + "1"}}),
    "negatives of text": member(neg_category_ids="12"),
    "negatives beyond": member(neg_category_ids=[3]),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_what_is_malformed_is_a_bad_sample(value):
    with pytest.raises(BadSampleError):
        read(copy.deepcopy(value))


@pytest.mark.parametrize("data", [None, b"", b"{", b"[" * 100_000, b"[]", b"null", b"\xff", b'{"annotations": []}'])
def test_what_is_no_member_is_a_bad_sample(data):
    with pytest.raises(BadSampleError):
        read_instances({} if data is None else {INSTANCES: data}, 3, SIZE)


def test_a_text_that_is_too_long_for_its_mask_is_refused_before_it_is_unpacked():
    """It would take seventy times its size."""
    text = "1" * 10**7
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="too long"):
            decode_runs(text, 480 * 640)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.booleans())
def test_no_mask_has_a_text_that_is_too_long(runs, begins):
    runs = [0, *runs] if begins else runs
    assert decode_runs(encode_runs(runs), sum(runs)).tolist() == runs
