"""What a micro-batch asks of a GPU, counted without one: every model lies on one device, and how often the host waits.

A GPU works behind the host, which only queues kernels. Where the host reads a value of the device, or sends it one, it
waits until the device has done all that is queued, and the device then waits for the next kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from preloaded import run_preloaded

WAITS = {"EoMT": 13, "Mask R-CNN": 70, "Mask R-CNN on maps": 70, "RF-DETR": 66}
"""Of parts that are the libraries': matching on the host, and how many boxes there are. No other model waits."""
KERNELS = {
    "autoencoder": 148,
    "barlow": 424,
    "byol": 515,
    "byol, logged": 562,
    "capi": 378,
    "clip": 334,
    "coca": 481,
    "continue_clip": 388,
    "continue_images": 480,
    "continue_m3i": 1214,
    "continue_siglip": 413,
    "data2vec2": 1773,
    "dense_distillation": 165,
    "densecl": 380,
    "dinov2": 1466,
    "global_distillation": 374,
    "ibot": 1402,
    "ijepa": 413,
    "m3i": 1152,
    "m3i, logged": 1213,
    "m3i_inter": 1199,
    "m3i_intra": 1098,
    "m3i_no_category": 989,
    "m3i_no_mix": 1153,
    "m3i_no_text": 837,
    "mae": 244,
    "masked_features": 369,
    "masked_global": 335,
    "moco": 257,
    "multi_teacher": 432,
    "novel_view": 315,
    "siglip": 351,
    "siglip2": 1518,
    "silc": 2060,
    "sim": 1314,
    "sim_global": 395,
    "sim_global, logged": 414,
    "sim_pixels": 396,
    "simclr": 498,
    "simsiam": 654,
    "supervised": 222,
    "unigrad": 622,
    "vicreg": 458,
    "m3i, mixed attention": 1168,
    "m3i on CLIP": 1158,
    "m3i on maps": 2134,
    "m3i, learned balance": 1169,
    "m3i, gradient norms": 1196,
    "sim on DINOv2": 1334,
    "multi-crop on CLIP": 851,
    "classifier": 237,
    "linear segmenter": 269,
    "UPerNet": 929,
    "UPerNet on maps": 1289,
    "EoMT": 1239,
    "Mask R-CNN": 1811,
    "Mask R-CNN on maps": 2110,
    "RF-DETR": 4989,
}
"""Of a forward and a backward pass at two layers; a change that adds a tenth is one to be seen."""

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a GPU's own library")


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """All models in one process, whose imports take longer than the walks."""
    return run_preloaded("walk.py")


def test_what_waits_is_counted_and_what_does_not_is_not(counted: dict[str, Any]) -> None:
    planted = counted["planted"]
    assert planted.pop("mixes devices") == {"refused": True}
    free = {"fills by a mask", "fills by an index", "sends beside the step", "chooses a number", "adds a number"}
    assert {name for name, told in planted.items() if told["waits"] == 0} == free
    assert {told["waits"] for told in planted.values()} == {0, 1}
    assert planted["adds a number"]["kernels"] == 1


def test_the_host_waits_for_nothing_but_where_a_library_does(counted: dict[str, Any]) -> None:
    told = {name: model["waits"] for name, model in counted["models"].items() if not name.endswith(", logged")}
    assert {name: sum(waits.values()) for name, waits in told.items() if waits} == WAITS, told


def test_figures_of_a_logged_step_are_one_wait(counted: dict[str, Any]) -> None:
    told = {name: model["waits"] for name, model in counted["models"].items() if name.endswith(", logged")}
    assert len(told) == 3
    assert {sum(waits.values()) for waits in told.values()} == {1}, told


def test_loss_and_figures_stay_on_the_device(counted: dict[str, Any]) -> None:
    assert {name: model["elsewhere"] for name, model in counted["models"].items() if model["elsewhere"]} == {}


def test_no_model_takes_many_more_kernels_than_it_did(counted: dict[str, Any]) -> None:
    found = {name: model["kernels"] for name, model in counted["models"].items()}
    assert found.keys() == KERNELS.keys()
    assert {name: count for name, count in found.items() if count > 1.1 * KERNELS[name]} == {}
