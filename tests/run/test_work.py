"""FLOPs of a step by the captions that were seen, and the share of the peak."""

import pytest
import torch
from tiny import tiny_objective

from m3i_scale.engine.peak import Peak
from m3i_scale.host.rank_record import PHASES
from m3i_scale.run.flops import Work
from m3i_scale.run.meter import Meter

FLOP = {"model": 10e9, "text": 4e9}


def test_the_text_tower_counts_by_the_length_of_captions():
    work = Work(FLOP, 32, Peak(1.0, "given"))
    assert work.step_flop(32) == 10e9
    assert work.step_flop(8) == 7e9


@pytest.mark.parametrize("world_size", [1, 4])
def test_mfu_is_a_share_of_the_peak_of_all_ranks(world_size):
    meter = Meter(tiny_objective("supervised"), 8, Work(FLOP, 32, Peak(2e6, "given")))
    for tokens in (8, 24):
        meter.add_micro_batch(torch.tensor(1.0), {}, 1, tokens)
    meter.end_step()
    told = meter.record({}, step=1, quarantined=0, world_size=world_size).figures
    assert told["perf/flops_per_s"] == pytest.approx(8e9 / told["time/step"])
    assert told["perf/mfu"] == pytest.approx(told["perf/flops_per_s"] / (2e18 * world_size))
    assert sum(told[f"time/{name}"] for name in PHASES) == pytest.approx(told["time/step"])


def test_more_than_the_peak_is_no_mfu():
    meter = Meter(tiny_objective("supervised"), 8, Work(FLOP, 32, Peak(1e-9, "measured")))
    meter.add_micro_batch(torch.tensor(1.0), {}, 1)
    meter.end_step()
    told = meter.record({}, step=1, quarantined=0, world_size=1).figures
    assert told["perf/flops_per_s"] > 0
    assert "perf/mfu" not in told
