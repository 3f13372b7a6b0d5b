"""`m3i-scale stop`: stop a run gracefully, on whichever nodes it runs."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.layout import checkpoints, step_of, stopped_words
from m3i_scale.config import load_run
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.host.output_dir import METRICS, Holder, holder_of, is_run_folder, launch_of, request_stop

_LOOK_S = 0.5


def stop(run: str, overrides: list[str], *, wait: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Request a run to stop, through a file in its output directory that rank 0 reads at most once per second, before
    an optimizer step. It works across nodes, containers and launchers.

    Args:
        run: output directory of the run, its config file, or the name of a built-in config file.

    Returns:
        `status` (`idle`, `asked`, `stopped`, `finished`, or `ended` for any other reason), `output_dir`, `step` and
        `checkpoint` (the latest, or None), `text`.
    """
    folder = _folder(run, overrides)
    holder = holder_of(folder)
    if holder is None:
        launch = launch_of(folder)
        if launch is not None:
            raise CheckpointError(
                f"the run is starting, and its ranks do not train yet: {launch}",
                where=str(folder),
                fix="try again when they train, or run `kill -USR2` on that process of that host",
            )
        return _result("idle", folder, f"nothing runs in {folder}")
    if not holder.trains:
        raise CheckpointError(
            f"the folder is locked by {holder}, not by a training run of this version",
            where=str(folder),
            fix="end that process, or wait for it",
        )
    request_stop(folder, holder)
    text = f"sent a stop request to {holder}: the run finishes its step, saves a checkpoint and exits"
    if not wait:
        return _result("asked", folder, text)
    tell(text)
    while _holds(folder, holder):
        time.sleep(_LOOK_S)
    status = _last_status(folder)
    if status == "preempted":
        return _result("stopped", folder, stopped_words(folder / "checkpoints"))
    if status == "finished":
        return _result("finished", folder, "the run has completed its last step: there is nothing to resume")
    return _result("ended", folder, "the run ended for another reason: see its output")


def _last_status(folder: Path) -> str | None:
    """Return the final status of the run in metrics.jsonl, or None if it is missing."""
    try:
        with (folder / METRICS).open(encoding="utf-8", errors="replace") as file:
            last = json.loads(deque(file, maxlen=1)[0])
        return str(last["status"]) if last.get("kind") == "end" else None
    except (OSError, ValueError, LookupError, AttributeError):
        return None


def _folder(run: str, overrides: list[str]) -> Path:
    folder = Path(run)
    if not folder.is_dir():
        folder = load_run(run, overrides).output_dir
    elif overrides:
        raise ConfigError("overrides have no effect with a folder", where=" ".join(overrides), fix="leave them out")
    if not is_run_folder(folder) and launch_of(folder) is None:
        raise ConfigError(
            "no run has started in this folder",
            where=str(folder.absolute()),
            fix="use the output_dir of a run, or its config file with the overrides of its start",
        )
    return folder


def _holds(folder: Path, holder: Holder) -> bool:
    try:
        return holder_of(folder) == holder
    except CheckpointError:  # the lock is being released, or another run is starting
        return False


def _result(status: str, folder: Path, text: str) -> dict[str, Any]:
    newest = next(iter(checkpoints(folder / "checkpoints")), None)
    return {
        "status": status,
        "output_dir": str(folder.absolute()),
        "step": None if newest is None else step_of(newest),
        "checkpoint": None if newest is None else str(newest),
        "text": text,
    }
