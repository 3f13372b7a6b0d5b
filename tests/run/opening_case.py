"""What two ranks see of a fault that only one of them has: `python opening_case.py RESULTS`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from m3i_scale.engine.agree import open_together, together
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.errors import DataError

RANK = int(os.environ["RANK"])


def fails_on(rank: int, error: Exception) -> str:
    """The other rank opens what it needs at once."""
    if rank == RANK:
        raise error
    return "opened"


def waits_unless(rank: int, error: Exception) -> str:
    """The other rank would wait for ever."""
    if rank == RANK:
        raise error
    time.sleep(3600)
    return "never"


def told(call) -> list[str]:
    try:
        return ["", call()]
    except Exception as error:
        return [type(error).__name__, str(error)]


if __name__ == "__main__":
    start_ranks()
    found = {
        "both": told(lambda: open_together(lambda: f"opened on {RANK}")),
        "check": told(
            lambda: together(lambda: fails_on(1, DataError("no such folder", where="/data/x")), names_rank=True)
        ),
        "open": told(lambda: open_together(lambda: fails_on(1, DataError("no such folder", where="/data/x")))),
        "wait": told(lambda: open_together(lambda: waits_unless(0, DataError("a torn shard", where="s-0.tar")))),
        "mistake": told(lambda: open_together(lambda: waits_unless(1, KeyError("a mistake")))),
    }
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(found))
    stop_ranks(wait=True)
