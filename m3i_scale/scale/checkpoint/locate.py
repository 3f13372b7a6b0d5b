"""Where checkpoints lie, what they are called, and which one to go on from."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from m3i_scale.scale.checkpoint.manifest import step_of, verify

TEMPORARY_PREFIX = ".tmp-"
"""What begins like this is being written or being removed, and does not exist for a reader."""

LATEST = "latest"
"""A text file with the name of the folder that was committed last. For people; resuming scans the folders."""


def step_name(step: int) -> str:
    """`step-00000100` for step 100."""
    return f"step-{step:08d}"


def temporary_for(final: Path) -> Path:
    """The folder to write `final` under until it is committed: the same on every rank."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}")


def checkpoints(root: Path) -> list[Path]:
    """All folders that were renamed to a step, the newest first; not yet verified. [] where there is no `root`."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def stopped_words(root: Path) -> str:
    """Return the last words of a run that was asked to stop and has saved.

    Args:
        root: of its checkpoints.
    """
    newest = next(iter(checkpoints(root)), None)
    if newest is None:
        return f"stopped; there is no checkpoint in {root}"
    return f"stopped at step {step_of(newest)}, saved in {newest}; the same command goes on from there"


def newest_good(root: Path, *, contents: bool = True) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones that were passed over, each with the reason.

    Args:
        root: the folder of checkpoints.
        contents: read every byte of the checkpoint that is returned: call it on one rank. False: see `verify`.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in checkpoints(root):
        faults = verify(path, contents=contents)
        if not faults:
            return path, passed_over
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        passed_over.append((path, faults[0] + more))
    return None, passed_over


def named_latest(root: Path) -> str | None:
    """What `latest` names; None where it cannot be read."""
    try:
        return (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def latest_fault(root: Path, good: Container[Path]) -> str | None:
    """What is wrong with `latest`, which names the newest checkpoint; None where nothing is.

    Args:
        root: of the checkpoints.
        good: those that verify. After a run has fallen back, the newest of them is the right one as well.
    """
    found = checkpoints(root)
    newest_good = next((path for path in found if path in good), None)
    wanted = [path.name for path in (*found[:1], newest_good) if path is not None]
    try:
        content = (root / LATEST).read_bytes()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if content in [f"{name}\n".encode() for name in wanted]:
        return None
    return f"names {content.decode(errors='replace').strip()!r}, and the newest checkpoint is {wanted[0]}"
