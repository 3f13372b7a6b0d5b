"""One of two ranks: looks whether it shares an output directory with the other, in several places."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from m3i_scale.engine import process_group
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.errors import CheckpointError


def main(root: Path) -> None:
    start_ranks()
    rank = dist.get_rank()
    process_group.VISIBLE_S = 1.0
    for case in ("same", "apart", "no_folder"):
        own = root / case / (f"rank-{rank}" if case != "same" else "both")
        own.parent.mkdir(parents=True, exist_ok=True)
        if case == "no_folder" and rank == 1:
            own.write_text("")
        else:
            own.mkdir(exist_ok=True)
        if rank == 0:
            (own / ".shared-left").mkdir()
        dist.barrier()
        said = None
        try:
            process_group.check_shared(own)
        except CheckpointError as error:
            said = str(error)
        (root / f"{case}-{rank}.json").write_text(json.dumps(said))
    stop_ranks(wait=True)


main(Path(sys.argv[1]))
