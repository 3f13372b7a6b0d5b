"""A hook acts in the loop beside the training step; this is what the loop tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.run.bad_steps import MicroBatchResult
from m3i_scale.run.callbacks.base import CallbackList
from m3i_scale.run.setup import ResolvedRun
from m3i_scale.run.step_times import Timeouts
from m3i_scale.scale.averages import ShardedMomentum
from m3i_scale.scale.collectives import ProcessGroupRanks


@dataclass
class TrainState:
    """Holds what the loop and its hooks share. Steps and votes are the same on every rank."""

    resolved: ResolvedRun
    phase: ResolvedRun
    """The same run as the phase in hand has it: image size, micro-batch, accumulation."""
    ranks: ProcessGroupRanks
    engine: Any
    """Of DeepSpeed."""
    momentum: ShardedMomentum | None
    stream: TrainStream
    callbacks: CallbackList
    """Of rank 0; of other ranks none."""
    tell: Callable[[str], None]
    """Prints a line for the user; of rank 0."""
    timeouts: Timeouts
    step: int = 0
    """Optimizer steps done."""
    logged: bool = False
    """Whether the step that is taken, or was last, is one that is logged."""
    lr: float = 0.0
    """Of that step."""
    ema_decay: float | None = None
    """Momentum of the average in that step; None without one."""
    micro_batches: list[MicroBatchResult] = field(default_factory=list)
    """Of that step, on this rank."""
    loss: float = 0.0
    """Of that step, mean over ranks and micro-batches."""
    finite: bool = True
    """Whether every loss of every rank was, in that step."""
    applied: bool = True
    """Whether the optimizer has taken that step: a gradient that is not finite skips it."""
    stopping: bool = False
    """Whether some rank was asked to stop after that step."""


class Hook:
    """Acts in the loop. Every rank has the same hooks and calls them in the same order, so that they may exchange
    values; every method may be left out.

    What only looks on, on rank 0, is a `Callback`.
    """

    def on_start(self) -> None:
        """Begin, once the checkpoint is loaded that the run goes on from."""

    def on_phase(self) -> None:
        """Act before the first step of a further phase: images or micro-batches have another size from here on."""

    def post_micro_batch(self, batch: Batch, micro_batch: MicroBatchResult) -> None:
        """Act after a forward and backward pass."""

    def vote(self) -> bool:
        """Return this rank's vote, before the optimizer takes the step. All votes go in one collective."""
        return False

    def pre_optimizer_step(self, voted: bool) -> None:
        """Act on whether the `vote` of any rank was true."""

    def post_step(self) -> bool:
        """Act after a step; return True where this hook has undone it: later hooks are then not called."""
        return False

    def on_rewind(self) -> None:
        """Forget what was seen since the step that the run has gone back to."""

    def on_finish(self) -> None:
        """Act after the last step of this process."""

    def on_error(self) -> None:
        """Act before all ranks end with the same error."""
