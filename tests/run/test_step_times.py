"""Shares of a step by phase, on a device that is in step with the host and on one that runs behind it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from m3i_scale.config import TimeoutsConfig
from m3i_scale.host.rank_record import PHASES, Heartbeat, read_heartbeat
from m3i_scale.run import meter
from m3i_scale.run.hooks import Timeouts
from m3i_scale.run.meter import StepTimes


class Device:
    """An accelerator whose clock stands still until it is told to move, and which gets to events when it is let."""

    def __init__(self) -> None:
        self.clock_ms, self.reached, self.waited = 0.0, True, 0

    def is_synchronized_device(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.reached = True
        self.waited += 1

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=None)

        def elapsed_time(end: SimpleNamespace) -> float:
            assert self.reached, "a time of an event that the device has not passed"
            return end.at - event.at

        event.record = lambda: setattr(event, "at", self.clock_ms)
        event.query = lambda: self.reached
        event.elapsed_time = elapsed_time
        return event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(meter, "get_accelerator", lambda: found)
    return found


def one_step(phases: StepTimes, device: Device) -> None:
    with phases.span("backward"):
        device.clock_ms += 50
        with phases.span("reduce"):
            device.clock_ms += 20
        device.clock_ms += 10
    device.clock_ms += 20
    phases.end_step()


def test_a_phase_inside_another_does_not_count_twice(device: Device) -> None:
    phases = StepTimes()
    one_step(phases, device)
    shares = phases.shares()
    assert shares == dict.fromkeys(PHASES, 0.0) | {
        "backward": pytest.approx(0.6),
        "reduce": pytest.approx(0.2),
        "other": pytest.approx(0.2),
    }


def test_no_step_waits_for_the_device(device: Device) -> None:
    phases = StepTimes()
    device.reached = False
    one_step(phases, device)
    assert device.waited == 0
    assert sum(phases.seconds.values()) == 0
    assert phases.shares()["backward"] == pytest.approx(0.6)
    assert device.waited == 1


def test_marks_do_not_pile_up(device: Device) -> None:
    phases = StepTimes()
    for _ in range(100):
        one_step(phases, device)
    assert len(phases._marks) == 1
    assert phases.seconds["backward"] == pytest.approx(6.0)


def test_a_reset_forgets(device: Device) -> None:
    phases = StepTimes()
    one_step(phases, device)
    phases.reset()
    assert set(phases.shares().values()) == {0.0}


def test_the_phase_around_goes_on_after_an_error(device: Device) -> None:
    phases = StepTimes()

    def fail() -> None:
        device.clock_ms += 10
        raise ValueError("of the engine")

    with pytest.raises(ValueError, match="of the engine"):
        phases.span("optimizer")(fail)()
    device.clock_ms += 10
    assert phases.shares() == dict.fromkeys(PHASES, 0.0) | {
        "optimizer": pytest.approx(0.5),
        "other": pytest.approx(0.5),
    }


def test_last_words_of_an_error_tell_the_phase_that_it_came_up_in() -> None:
    phases, heartbeat = StepTimes(), Heartbeat(None)
    phases.on_change = heartbeat.at
    timeouts = Timeouts(TimeoutsConfig(), phases, heartbeat)
    for _ in range(2):
        with pytest.raises(ValueError, match="of the engine"), phases.span("backward"), phases.span("reduce"):
            raise ValueError("of the engine")
        assert heartbeat.phase == "reduce"
        with timeouts.outside_of_steps("save"):
            assert heartbeat.phase == "save"
            with phases.span("forward"):  # that of stored samples is no part of a step
                assert heartbeat.phase == "save"
        assert heartbeat.phase == "reduce"  # as before: all ranks may save what is on its way before they end
    with pytest.raises(ValueError, match="of the disk"), timeouts.outside_of_steps("save"):
        raise ValueError("of the disk")
    assert heartbeat.phase == "save"
    with phases.span("data"):
        assert heartbeat.phase == "data"


def test_a_heartbeat_has_the_timeout_of_its_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_scale.run.hooks.set_timeout", lambda seconds: None)

    def timeout() -> float:
        state = read_heartbeat(tmp_path / "beat")
        assert state is not None
        return state.timeout_s

    times, heartbeat = StepTimes(), Heartbeat(tmp_path / "beat")
    times.on_change = heartbeat.at
    timeouts = Timeouts(TimeoutsConfig(startup_s=600.0, collective_s=60.0), times, heartbeat)
    seen = []
    for begins in (False, False, False, True, False, False):
        if begins:
            timeouts.begin_stage()
        with times.span("forward"):
            seen.append(timeout())
        timeouts.end_step()
    assert seen == [0.0, 0.0, 60.0, 600.0, 600.0, 60.0]  # 0: the timeout of the start
    with timeouts.outside_of_steps("save"):
        assert timeout() == 600.0
    assert timeout() == 60.0


def test_on_the_host_time_is_that_of_the_host() -> None:
    phases = StepTimes()
    with phases.span("data"):
        time.sleep(0.05)
    phases.end_step()
    assert phases.seconds["data"] >= 0.05
    assert sum(phases.shares().values()) == pytest.approx(1.0)
