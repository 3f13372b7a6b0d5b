"""Rollback to a checkpoint without rewinding the data.

`output_dir/rewinds.json` lists every rollback with the data position at that moment. The meta.json of a checkpoint has
the number of rollbacks before it was saved. If a run is killed after a rollback and before its next save, it restarts
from the checkpoint of the rollback and reads the data position from this file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.commit import explain, withdraw
from m3i_scale.checkpoint.layout import checkpoints, read_meta, step_of
from m3i_scale.checkpoint.manifest import verify
from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.errors import CheckpointError
from m3i_scale.files import write_json
from m3i_scale.run.callbacks import Rewind
from m3i_scale.run.spike import Spike

REWINDS = "rewinds.json"


class Rewinds:
    """Rollbacks of one run so far, including before restarts. Identical on every rank."""

    def __init__(self, output_dir: Path, *, anew: bool) -> None:
        """Read the file. Every rank must call it. A run that starts `anew`, at step 0, deletes the rollbacks of an
        earlier run in this folder."""
        self._root, self._path = output_dir / "checkpoints", output_dir / REWINDS
        self._entries: list[dict[str, Any]] = from_rank_0(lambda: self._first(anew))

    def _first(self, anew: bool) -> list[dict[str, Any]]:
        if anew:
            self._path.unlink(missing_ok=True)
        return read_rewinds(self._path)

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
    ) -> tuple[Path, Rewind] | None:
        """Select the checkpoint to roll back to, record the rollback, and delete later checkpoints. Return None if
        there is no valid checkpoint before the spike. Every rank must call it.

        A checkpoint of step s is acceptable if the loss of step s + 1, computed with its weights, was within the limit.
        `data_state` is the current data position of this rank, where training continues.
        """
        checkpoint: Path | None = from_rank_0(lambda: newest_before(self._root, spike.since - 1))
        if checkpoint is None:
            return None
        to = step_of(checkpoint) or 0
        rewind = Rewind(
            rewound_from=spike.step,
            rewound_to=to,
            skipped_samples=(spike.step - to) * batch_size,
            spike_since=spike.since,
            loss=spike.loss,
            limit=spike.limit,
            number=len(self) + 1,
            most=most,
        )
        self._entries.append({**asdict(rewind), "data": gather_objects(data_state)})
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
        entries: list[dict[str, Any]] = json.loads(path.read_bytes())
        return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read which checkpoints the run went back to: {error}",
            where=str(path),
            why="the data would go on at the wrong place",
            fix="restore the file; without it (remove it) a spike that was skipped may be met again",
        ) from None


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
