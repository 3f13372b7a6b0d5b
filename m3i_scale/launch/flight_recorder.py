"""Have ranks on accelerators write their last collectives into the output folder when one of these times out.

PyTorch's flight recorder keeps them, and by itself writes them into a file of the host's own, which is gone with a
container.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "collectives-rank-"
"""PyTorch adds the rank."""
FILES = f"{_PREFIX}*"


@contextmanager
def record_collectives(folder: Path, environment: MutableMapping[str, str]) -> Iterator[None]:
    """Set the place that PyTorch reads when the process group is made; what is set already, under either name, stays.

    Args:
        folder: where the files go; made now, and removed after work that ends as it should.
        environment: of this process.
    """
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:  # the name in earlier versions of torch
        environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / _PREFIX))
    with suppress(OSError):  # what is wrong with the output folder is told when the run opens it
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_PREFIX}{environment['RANK']}").unlink(missing_ok=True)  # of an earlier attempt
    yield
    with suppress(OSError):  # not after an error: other ranks may be about to write
        folder.rmdir()


def recorded_text(folder: Path) -> str | None:
    """Return a line about the collectives that ranks have written down; None where they have not."""
    count = len(list(folder.glob(FILES)))
    if not count:
        return None
    who = "1 rank wrote down its" if count == 1 else f"{count} ranks wrote down their"
    return f"{who} last collectives: torchfrtrace {folder} -p {_PREFIX}"
