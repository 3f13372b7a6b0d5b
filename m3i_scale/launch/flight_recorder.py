"""Make accelerator ranks write their last collectives into the output folder when a collective times out.

PyTorch's flight recorder keeps them, but by default writes them to a local file, which is lost with a container.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "collectives-rank-"
"""PyTorch appends the rank."""
FILES = f"{_PREFIX}*"


@contextmanager
def record_collectives(folder: Path, environment: MutableMapping[str, str]) -> Iterator[None]:
    """Set the path that PyTorch reads when the process group is created; a value already set, under either name, is
    kept.

    Args:
        folder: folder of the files; created now, and removed after a normal end.
        environment: environment of this process.
    """
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:  # the name in earlier versions of torch
        environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / _PREFIX))
    with suppress(OSError):  # errors of the output folder are reported when the run opens it
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_PREFIX}{environment['RANK']}").unlink(missing_ok=True)  # from an earlier attempt
    yield
    with suppress(OSError):  # not after an error, because other ranks may still write
        folder.rmdir()


def recorded_text(folder: Path) -> str | None:
    """Return a line about the recorded collectives; None if there are none."""
    count = len(list(folder.glob(FILES)))
    if not count:
        return None
    who = "1 rank wrote down its" if count == 1 else f"{count} ranks wrote down their"
    return f"{who} last collectives: torchfrtrace {folder} -p {_PREFIX}"
