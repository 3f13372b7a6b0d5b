"""What is loaded under another ZeRO stage, precision and number of ranks is what was saved, value by value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from average_engine import STEP
from launch import TESTS, start_ranks

from m3i_scale.checkpoint.tensors import SavedTensors

pytestmark = pytest.mark.slow

KINDS = ("average", "exp_avg", "exp_avg_sq", "weight")
RANKS = (1, 4)
SHAPES = ((1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp32"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, and checkpoints of engines of other shapes that have loaded it."""
    folder = tmp_path_factory.mktemp("reshard")
    script = str(TESTS / "scale" / "average_engine.py")
    for mode, ranks in (("save", 2), *(("load", ranks) for ranks in RANKS)):
        job = start_ranks([script, mode, str(folder)], ranks, folder / f"logs-{mode}-{ranks}")
        assert job.wait() == [0] * ranks, job.text()[-4000:]
    return folder


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("stage", "dtype"), SHAPES)
def test_every_value_is_in_its_place(saved: Path, stage: int, dtype: str, ranks: int) -> None:
    before, after = SavedTensors(saved / STEP), SavedTensors(saved / f"zero{stage}-{dtype}-{ranks}" / STEP)
    assert before.kinds() == after.kinds() == list(KINDS)
    for kind in KINDS:
        assert set(before.names(kind)) == set(after.names(kind)) != set()
        for name in before.names(kind):
            assert torch.equal(before.whole(f"{kind}/{name}"), after.whole(f"{kind}/{name}")), (kind, name)
    moved = [name for name in before.names("average") if before.whole(f"average/{name}").std(correction=0) > 0]
    assert moved  # the order of equal values would show nothing
