"""Loss spikes: their detection with a robust z-score over the previous losses, and the rollback to a checkpoint without
rewinding the data.

`output_dir/rewinds.json` lists every rollback with the data position at that moment. The meta.json of a checkpoint has
the number of rollbacks before it was saved. If a run is killed after a rollback and before its next save, it restarts
from the checkpoint of the rollback and reads the data position from this file.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from m3i_scale.checkpoint.commit import explain, withdraw
from m3i_scale.checkpoint.layout import checkpoints, read_meta, step_of
from m3i_scale.checkpoint.manifest import verify
from m3i_scale.config import RunConfig, SpikeConfig
from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import read_json, write_json

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution per median absolute deviation."""
LEAST_DEVIATION = 1e-3
"""Minimum deviation as a fraction of the median, so that rounding errors of a constant loss are not spikes."""
REWINDS = "rewinds.json"


@dataclass(frozen=True)
class Spike:
    """Loss that exceeded the limit for `patience` consecutive steps."""

    step: int
    """Last of these steps."""
    since: int
    """First of these steps."""
    loss: float
    """Loss of the last step; NaN if it was not finite."""
    median: float
    """Median of the window."""
    limit: float
    """Upper limit of the loss."""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} at step {self.step}, above {self.limit:.4g} since step {self.since}; "
            f"the median before was {self.median:.4g}"
        )


class SpikeWatch:
    """One-sided loss-spike detector on the global loss of every step. A rapidly falling loss is not a spike.

    The limit is median + z · max(1.4826 · MAD, 0.001 · |median|) over the window, with MAD the median absolute
    deviation from the median (Leys et al. 2013, "Detecting outliers: do not use standard deviation around the mean, use
    absolute deviation around the median"). Losses above the limit stay out of the window. After a reported spike
    without a rollback they enter it as the new level.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._above = self._since = 0

    def limit(self) -> tuple[float, float] | None:
        """Return (median, limit) for the next loss, or None if the history is too short."""
        if len(self._losses) < self.config.min_history:
            return None
        middle = median(self._losses)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle, middle + self.config.z * max(deviation, LEAST_DEVIATION * abs(middle))

    def add(self, step: int, loss: float) -> Spike | None:
        """Add a loss; a non-finite loss exceeds every limit. Return the spike, only at its `patience`-th step."""
        bounds = self.limit()
        if bounds is None or loss <= bounds[1]:
            self._above = 0
            self._remember(loss)
            return None
        if self._above == 0:
            self._since = step
        self._above += 1
        if self._above > self.config.patience:
            self._remember(loss)
        return Spike(step, self._since, loss, *bounds) if self._above == self.config.patience else None

    def forget(self) -> None:
        """Clear the history, because the following losses have a different level."""
        self._losses.clear()
        self._above = self._since = 0

    def _remember(self, loss: float) -> None:
        if math.isfinite(loss):
            self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """Return the detector state in JSON types, so that a resumed run behaves as if uninterrupted."""
        return {"losses": list(self._losses), "above": self._above, "since": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`. If the window is now shorter, only the latest losses remain."""
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._above, self._since = int(state["above"]), int(state["since"])


def check_guard(run: RunConfig) -> None:
    """Reject guard settings that cannot work with the steps or the checkpoint settings."""
    spike, steps, saves = run.guard.spike, run.optim.steps, run.checkpoint
    if spike is None:
        return
    # A spike must be confirmed within the run, and after the first checkpoint.
    first = max(spike.min_history, saves.every_steps + 1) + spike.patience
    if first > steps:
        raise ConfigError(
            f"guard.spike has no effect: it can detect a spike from step {first} on, but the run has {steps} steps",
            where=f"guard.spike.min_history: {spike.min_history}, checkpoint.every_steps: {saves.every_steps}",
            fix="lower min_history, save more often, or leave out guard.spike",
        )
    if (saves.keep_latest - 1) * saves.every_steps < spike.patience:
        raise ConfigError(
            "guard.spike needs a checkpoint from before the spike, which may be deleted when the spike is detected",
            where=f"checkpoint.keep_latest: {saves.keep_latest}, checkpoint.every_steps: {saves.every_steps}",
            why=f"guard.spike.patience is {spike.patience} steps, and checkpoints from these steps are not usable",
            fix="raise checkpoint.keep_latest until (keep_latest − 1) × every_steps is at least patience",
        )


class Rewinds:
    """Rollbacks of one run so far, including before restarts. Identical on every rank."""

    def __init__(self, output_dir: Path, *, starts_from_0: bool) -> None:
        """Read the file. Every rank must call it. If the run `starts_from_0`, delete the rollbacks of an earlier run in
        this folder."""
        self._root, self._path = output_dir / "checkpoints", output_dir / REWINDS
        if starts_from_0:
            from_rank_0(lambda: self._path.unlink(missing_ok=True))
        self._entries: list[dict[str, Any]] = from_rank_0(lambda: read_rewinds(self._path))

    def __len__(self) -> int:
        return len(self._entries)

    def data_states(self, checkpoint: Path) -> list[dict[str, Any]] | None:
        """Return the data positions at the last rollback to `checkpoint` since it was saved, or None."""
        if checkpoint.parent.resolve() != self._root.resolve():
            return None  # checkpoint of another run
        later = self._entries[int(read_meta(checkpoint).get("rewinds", 0)) :]
        states = [entry["data"] for entry in later if entry["rewound_to"] == step_of(checkpoint)]
        return states[-1] if states else None

    def begin(
        self, spike: Spike, data_state: dict[str, Any], *, batch_size: int, most: int
    ) -> tuple[Path, dict[str, Any]] | None:
        """Select the checkpoint to roll back to, record the rollback, and delete later checkpoints. Return None if
        there is no valid checkpoint before the spike. Every rank must call it.

        A checkpoint of step s is acceptable if the loss of step s + 1, computed with its weights, was within the limit.
        `data_state` is the current data position of this rank, where training continues.
        """
        checkpoint: Path | None = from_rank_0(lambda: newest_before(self._root, spike.since - 1))
        if checkpoint is None:
            return None
        to = step_of(checkpoint) or 0
        rewind = {
            "rewound_from": spike.step,
            "rewound_to": to,
            "skipped_samples": (spike.step - to) * batch_size,
            "spike_since": spike.since,
            "loss": spike.loss,
            "limit": spike.limit,
            "number": len(self) + 1,
            "most": most,
        }
        self._entries.append({**rewind, "data": gather_objects(data_state)})
        from_rank_0(self._note)
        return checkpoint, rewind

    def _note(self) -> None:
        """Write the file before deleting undone checkpoints. If killed in between, the next start deletes them."""
        try:
            write_json(self._path, self._entries)
        except OSError as error:
            raise explain(error, self._root) from None
        finish_rewind(self._path.parent)


def read_rewinds(path: Path) -> list[dict[str, Any]]:
    """Return the entries of `rewinds.json`, or [] if there is no file."""
    try:
        entries = read_json(path)
        if not (isinstance(entries, list) and all(_is_rewind(entry) for entry in entries)):
            raise ValueError("not a list of rollbacks")
        return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the rollbacks of the run: {error}",
            where=str(path),
            why="the data would continue at the wrong position",
            fix="restore the file; if you remove it instead, a skipped spike may occur again",
        ) from None


def _is_rewind(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("rewound_to")) is int and "data" in entry


def newest_before(root: Path, step: int) -> Path | None:
    """Return the latest valid checkpoint below `step`. Reads all of its bytes, so call it on one rank."""
    return next((path for path in checkpoints(root) if (step_of(path) or 0) < step and not verify(path)), None)


def finish_rewind(output_dir: Path) -> None:
    """Delete checkpoints of steps that the last rollback undid. Called at every start, in case the run was killed."""
    entries, root = read_rewinds(output_dir / REWINDS), output_dir / "checkpoints"
    if not entries:
        return
    to = int(entries[-1]["rewound_to"])
    folders = checkpoints(root)
    undone = [path for path in folders if (step_of(path) or 0) > to and _rewinds_before(path) < len(entries)]
    kept = [path for path in folders if path not in undone]
    if undone and kept:
        withdraw(undone, kept[0])


def _rewinds_before(checkpoint: Path) -> int:
    """Return the number of rollbacks before a checkpoint was saved. A corrupt checkpoint counts as new."""
    try:
        return int(read_meta(checkpoint).get("rewinds", 0))
    except (CheckpointError, ValueError):
        return 2**31
