"""When a loss is a spike, what a restart knows of it, and settings that would make no sense."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny import tiny_run

from m3i_scale.config import GuardConfig, SpikeConfig, load_run
from m3i_scale.errors import ConfigError
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.spike import Spike, SpikeWatch, check_guard

CONFIG = SpikeConfig(z=8, window=16, min_history=8, patience=3)


def feed(watch: SpikeWatch, losses: Iterable[float], start: int = 1) -> list[Spike]:
    found = [watch.add(step, loss) for step, loss in enumerate(losses, start)]
    return [spike for spike in found if spike is not None]


def noise(count: int, level: float = 5.0, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0, 0.05) for _ in range(count)]


def test_the_limit_is_that_of_the_formula() -> None:
    watch = SpikeWatch(CONFIG)
    feed(watch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert watch.limit() is None  # seven of eight
    feed(watch, [8.0])
    assert watch.limit() == (4.5, pytest.approx(4.5 + 8 * 1.4826 * 2.0))


def test_so_many_in_a_row_make_a_spike_which_is_told_once() -> None:
    watch = SpikeWatch(CONFIG)
    assert feed(watch, noise(20)) == []
    assert feed(watch, [9.0, 9.0, 5.0, 9.0, 9.0], 21) == []  # never three
    (spike,) = feed(watch, [9.0] * 6, 26)
    # The row began with the last two of those before.
    assert (spike.step, spike.since, spike.loss) == (26, 24, 9.0)
    assert 5.0 < spike.limit < 6.0


def test_a_level_that_stays_becomes_the_normal_one_and_is_judged_again() -> None:
    watch = SpikeWatch(CONFIG)
    feed(watch, noise(20))
    assert len(feed(watch, noise(40, 9.0), 21)) == 1
    assert len(feed(watch, noise(3, 20.0), 61)) == 1


@pytest.mark.parametrize(
    ("weight", "starts"), [([(0.0, 0.0), (0.5, 0.0), (0.51, 1.0)], [0]), (1.0, [0, 50])], ids=["schedule", "phase"]
)
def test_a_loss_that_jumps_with_a_schedule_or_a_phase_is_no_spike_and_a_later_jump_is(
    weight: Any, starts: list[int]
) -> None:
    """`Guard` knows weights and phases: a rewind would meet the same jump again."""
    weights = [1.0, weight]
    recipe = SimpleNamespace(targets=[SimpleNamespace(weight=weight) for weight in weights])
    run = SimpleNamespace(
        guard=GuardConfig(spike=CONFIG), optim=SimpleNamespace(steps=100), output_dir=Path(), stage_starts=starts
    )
    state: Any = SimpleNamespace(resolved=SimpleNamespace(run=run, recipe=recipe), finite=True, applied=True)
    guard, spikes = Guard(state, list), []
    for state.step, state.loss in enumerate(noise(50) + noise(30, 9.0) + noise(10, 20.0), 1):
        guard.post_step()
        spikes += [guard.spike] if guard.spike is not None else []
    (spike,) = spikes
    assert (spike.since, spike.step) == (81, 83)


def test_a_falling_loss_is_no_spike_and_losses_that_do_not_move_make_none() -> None:
    assert feed(SpikeWatch(CONFIG), [10.0 * 0.9**step for step in range(100)]) == []
    still = SpikeWatch(CONFIG)
    assert feed(still, [5.0] * 20 + [5.0 * (1 + 7e-3)] * 5) == []  # below 8 thousandths
    assert len(feed(still, [5.1] * 5, 30)) == 1


def test_a_loss_that_is_not_finite_is_above_every_limit_and_never_remembered() -> None:
    young = SpikeWatch(CONFIG)
    assert feed(young, [math.nan] * 20) == []  # nothing to compare with
    feed(young, noise(8))
    (spike,) = feed(young, [9.0, math.nan, math.inf], 30)
    assert (spike.step, spike.since) == (32, 30)
    feed(young, [math.inf] * 30, 33)
    bounds = young.limit()
    assert bounds is not None
    assert bounds[1] < 6.0


def test_a_restart_judges_as_the_run_before_it_at_every_point() -> None:
    losses = [*noise(20), *[9.0] * 5, *noise(10, seed=2), *[9.0] * 5]
    whole = feed(SpikeWatch(CONFIG), losses)
    assert len(whole) == 2
    for cut in range(len(losses)):
        first, second = SpikeWatch(CONFIG), SpikeWatch(CONFIG)
        found = feed(first, losses[:cut])
        second.load(json.loads(json.dumps(first.state())))
        assert found + feed(second, losses[cut:], cut + 1) == whole


REFUSED = {
    "no rewinds": (["guard.spike.max_rewinds=0"], "max_rewinds"),
    "short window": (["guard.spike={window: 32, min_history: 64}"], "window .32. is less than min_history"),
    "unknown": (["guard.spikes={}"], "guard.spikes"),
    "few steps": (["guard.spike={}", "optim.steps=66"], "no effect: .* from step 104 on"),
    "rare": (["guard.spike={}", "checkpoint.every_steps=997"], "no effect: .* from step 1001 on"),
    "none kept": (["guard.spike={}", "checkpoint.keep_latest=1"], "may be deleted"),
    "few kept": (["guard.spike={}", "checkpoint.every_steps=2"], "may be deleted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_guard_without_effect_is_refused(name: str) -> None:
    overrides, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        check_guard(guarded(*overrides))


def guarded(*overrides: str) -> Any:
    return tiny_run("mae", "optim.steps=1000", "optim.warmup_steps=10", "checkpoint.every_steps=100", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["guard.spike={}"],
        ["guard.nonfinite=stop"],
        ["guard.spike={}", "optim.steps=67", "checkpoint.every_steps=63"],
        ["guard.spike={}", "checkpoint.every_steps=3", "checkpoint.keep_latest=2"],
    ],
)
def test_a_guard_with_an_effect_is_taken_and_written_whole(overrides: list[str], tmp_path: Path) -> None:
    run = guarded(*overrides)
    check_guard(run)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load_run(str(path)).guard == run.guard
