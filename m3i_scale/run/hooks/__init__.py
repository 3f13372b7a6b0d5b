"""Hooks of the training loop: their base class, the state and timeouts that they share with the loop, and the hooks for
the process of a rank. Every rank runs the same hooks at the same points."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from m3i_scale.config import TimeoutsConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.workers import PREEMPTION_SIGNALS
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.process_group import set_timeout
from m3i_scale.host.output_dir import stop_requested
from m3i_scale.host.rank_record import Heartbeat
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.run.callbacks import CallbackList
from m3i_scale.run.meter import StepTimes
from m3i_scale.run.setup import ResolvedRun

_CHECK_S = 1.0
"""Interval between reads of the output folder, a shared file system that all ranks would wait for in every step."""
_STARTED = 2
"""Number of steps after which all long-lived objects exist."""
_COLLECT_EVERY_STEPS = 50
_LONG_STEPS = 2
"""First steps also allocate memory and compile, if enabled, and so do the first steps with a new image size."""


class Timeouts:
    """Collective timeouts: long at startup and around checkpoints, short within steps. Every rank must make the same
    calls. `heartbeat` receives the timeouts, by which the elastic launcher detects a hang."""

    def __init__(self, timeouts: TimeoutsConfig, step_times: StepTimes, heartbeat: Heartbeat) -> None:
        self._timeouts, self._step_times, self._heartbeat = timeouts, step_times, heartbeat
        self._steps = 0
        set_timeout(timeouts.startup_s)  # for groups that the engine created: their default is 10 minutes for NCCL

    def end_step(self) -> None:
        self._steps += 1
        if self._steps == _LONG_STEPS:
            self._set(self._timeouts.collective_s)

    def begin_stage(self) -> None:
        self._steps = 0
        self._set(self._timeouts.startup_s)

    def _set(self, timeout_s: float) -> None:
        set_timeout(timeout_s)
        self._heartbeat.timeout_s = timeout_s

    @contextlib.contextmanager
    def outside_of_steps(self, name: str) -> Iterator[None]:
        """Apply the startup timeout to work that one rank may do alone while the others wait, such as saving. Meanwhile
        `name` is the phase of this rank. It remains after an error, for the error report."""
        around = self._heartbeat.phase
        on_change, self._step_times.on_change = self._step_times.on_change, lambda phase: None
        if self._steps >= _LONG_STEPS:
            self._set(self._timeouts.startup_s)
        self._heartbeat.at(name)
        try:
            yield
        finally:
            if self._steps >= _LONG_STEPS:
                self._set(self._timeouts.collective_s)
            self._step_times.on_change = on_change
        self._heartbeat.at(around)


@dataclass(frozen=True)
class MicroBatchResult:
    """Result of a forward pass, stored until all ranks agree that the step is valid."""

    loss: Tensor
    figures: dict[str, Tensor]
    keys: list[str]


@dataclass
class TrainState:
    """State shared by the training loop and its hooks. Steps and votes are identical on every rank."""

    resolved: ResolvedRun
    stage: ResolvedRun
    """The run with the settings of the current stage: image size, micro-batch size, accumulation."""
    ranks: ProcessGroupRanks
    engine: Any
    """DeepSpeed engine."""
    ema: ShardedEma | None
    stream: TrainStream
    callbacks: CallbackList
    """Callbacks of rank 0; empty on other ranks."""
    tell: Callable[[str], None]
    """Prints a line for the user on rank 0."""
    timeouts: Timeouts
    step: int = 0
    """Number of completed optimizer steps."""
    logged: bool = False
    """Whether the current (or last) step is logged."""
    lr: float = 0.0
    """Learning rate of that step."""
    ema_decay: float | None = None
    """EMA decay in that step; None without an EMA."""
    micro_batches: list[MicroBatchResult] = field(default_factory=list)
    """Micro-batches of that step on this rank."""
    loss: float = 0.0
    """Loss of that step, averaged over ranks and micro-batches."""
    finite: bool = True
    """Whether all losses of that step were finite on every rank."""
    applied: bool = True
    """Whether the optimizer applied that step. Non-finite gradients skip it."""
    stopping: bool = False
    """Whether any rank was asked to stop after that step."""


class Hook:
    """Extension of the training loop on all ranks. All ranks have the same hooks and call them in the same order, so
    hooks can use collectives. Every method is optional.

    For observers on rank 0, see `Callback`.
    """

    def on_start(self) -> None:
        """Run once, after the checkpoint to resume from is loaded."""

    def on_stage(self) -> None:
        """Run before the first step of each later stage, which changes the image or micro-batch size."""

    def post_micro_batch(self, batch: Batch, micro_batch: MicroBatchResult) -> None:
        """Run after a forward and backward pass."""

    def vote(self) -> bool:
        """Return this rank's vote before the optimizer step. All votes share one collective."""
        return False

    def pre_optimizer_step(self, voted: bool) -> None:
        """Run before the optimizer step, with the result: whether the `vote` of any rank was true."""

    def post_step(self) -> bool:
        """Run after a step. Return True if this hook has undone it, in which case later hooks do not run."""
        return False

    def on_rewind(self) -> None:
        """Discard data collected since the step that the run was rolled back to."""

    def on_finish(self) -> None:
        """Run after the last step of this process."""

    def on_error(self) -> None:
        """Run before all ranks exit with the same error."""


MakeHook = Callable[[TrainState, TrainStream | None], Hook | None]
"""Creates a hook from the state and the stream of the validation datasets; None if the run needs none."""


class Preemption(Hook):
    """Graceful stop on SIGTERM, SIGUSR2, SIGINT or `m3i-scale stop`: finish the step, save and exit with code 75. All
    ranks vote, so that they stop after the same step. A second SIGINT ends the run immediately. `output_dir` is checked
    for stop requests; None on ranks that do not check."""

    def __init__(self, state: TrainState, output_dir: Path | None = None) -> None:
        self._state, self._output_dir = state, output_dir
        self._signalled = False
        self._interrupted = False
        self._checked = -_CHECK_S

    def vote(self) -> bool:
        now = time.monotonic()
        if self._output_dir is not None and now - self._checked >= _CHECK_S:
            self._checked = now
            self._signalled = self._signalled or stop_requested(self._output_dir)
        return self._signalled

    def pre_optimizer_step(self, voted: bool) -> None:
        self._state.stopping = voted

    def install(self) -> None:
        """Install the signal handlers. Must be called on the main thread."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            self._interrupted = True
            # Not through a console: the handler may have interrupted it while it held its lock.
            os.write(2, b"saving after this step; once more to stop at once, unsaved\n")
        self._signalled = True


class Garbage(Hook):
    """Hook that disables the automatic collector after the second step and collects every 50 steps.

    By default the collector runs at different moments on every rank, and each time all other ranks wait in a
    collective. torchtitan and DINOv3 also collect after fixed steps.
    """

    def __init__(self) -> None:
        self._steps = 0
        """Steps taken by this process, including undone ones."""

    def post_step(self) -> bool:
        """Collect if due. Modules, engine and optimizer are frozen and not scanned again."""
        self._steps += 1
        if self._steps == _STARTED:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps % _COLLECT_EVERY_STEPS == 0:
            gc.collect()
        return False


def give_back_collector() -> None:
    """Re-enable automatic garbage collection for all objects."""
    gc.unfreeze()
    gc.enable()
