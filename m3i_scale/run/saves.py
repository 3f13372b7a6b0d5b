"""Save checkpoints of a run and commit them: the saver, the stored samples, and what retention drops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m3i_scale.data.batch import Batch
from m3i_scale.errors import CheckpointError
from m3i_scale.run.probe import probe_loss, probe_of, write_probe
from m3i_scale.run.retention import evaluations, rules_of
from m3i_scale.run.setup import Plan, meta_of, run_yaml
from m3i_scale.scale.checkpoint.layout import step_name
from m3i_scale.scale.checkpoint.retention import prune
from m3i_scale.scale.checkpoint.saver import Saver
from m3i_scale.scale.collectives import ProcessGroupRanks
from m3i_scale.scale.partition import ShardedMomentum


class Saves:
    """Saves the checkpoints of one run; every rank has one and calls the same.

    Args:
        plan: of the run.
        ranks: of the run.
        engine: the DeepSpeed engine.
        momentum: its averages.
        tell: prints a line for the user; serves rank 0.
    """

    def __init__(
        self,
        plan: Plan,
        ranks: ProcessGroupRanks,
        engine: Any,
        momentum: ShardedMomentum | None,
        tell: Callable[[str], None],
    ) -> None:
        self._plan, self._ranks, self._engine, self._tell = plan, ranks, engine, tell
        self._root = plan.run.output_dir / "checkpoints"
        self._saver = Saver(engine, momentum, plan.run.checkpoint.background, self._drop_older)
        self._limit_told = False
        self.step = -1
        """That of the last save, or of the checkpoint that was loaded."""
        self.loaded: Path | None = None
        """The checkpoint that the run goes on from."""
        self.probe: Batch | None = None
        """Two samples, whose loss a resume computes again."""
        self.others_write = False
        """Whether any rank was still writing when all were last asked."""

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._saver.writing

    def remember(self, batch: Batch) -> None:
        """Take the stored samples from the first batch, where they are wanted."""
        if self.probe is None and self._plan.run.checkpoint.probe:
            self.probe = probe_of(batch)

    def save(self, step: int, data_state: Mapping[str, Any], more_meta: Mapping[str, Any]) -> None:
        """Commit a checkpoint of this step, or begin to; what retention no longer keeps is dropped after the commit.
        Nothing where nothing was trained since the checkpoint that was loaded.

        Args:
            step: of the run.
            data_state: this rank's position in the data.
            more_meta: what meta.json says besides the plan; of rank 0.
        """
        final = self._root / step_name(step)
        if self.loaded == final:
            return
        meta: dict[str, Any] = {}
        if self._ranks.rank == 0:  # who writes it
            meta = meta_of(self._plan, step=step, world_size=self._ranks.world_size) | dict(more_meta)
        probe = self.probe
        if probe is not None:
            meta["probe_loss"] = self._probe_loss(probe)
        self._saver.save(
            final,
            data_state=data_state,
            meta=meta,
            run_yaml=run_yaml(self._plan.run),
            more=lambda folder: write_probe(folder, probe) if probe is not None else None,
        )
        self.step = step

    @property
    def written(self) -> bool:
        """Whether a save is on its way that no rank is still writing; the same on all ranks."""
        return self._saver.pending and not self.others_write

    def commit_if_written(self) -> None:
        """Commit the save that is on its way, if no rank is still writing."""
        if self.written:
            self._saver.finish()

    def close(self) -> None:
        """Commit what is on its way, and wait for what follows a commit."""
        self._saver.close()

    def commit_what_is_written(self) -> None:
        """Commit a save that is on its way before all ranks end together; why they end is the error to report."""
        try:
            self._saver.close()
        except CheckpointError as fault:
            self._tell(str(fault))

    def _probe_loss(self, probe: Batch) -> float | None:
        loss = probe_loss(self._engine, probe)
        if math.isfinite(loss):
            return loss
        self._tell(f"the loss of {len(probe)} stored samples alone is {loss}: a resume compares norms of tensors only")
        return None

    def _drop_older(self, committed: Path) -> None:
        """Remove what no rule keeps. Rank 0 alone, on any thread."""
        run = self._plan.run
        metrics = evaluations(run.output_dir) if run.checkpoint.keep_best is not None else {}
        pruned = prune(committed.parent, rules_of(run.checkpoint), metrics, committed=committed)
        if pruned.over_limit and not self._limit_told:
            self._limit_told = True
            self._tell("checkpoint.max_gib is less than one checkpoint takes: only the last good one is kept")
