"""One of two ranks whose accelerator has a backend of its own, which sends nothing and would take device memory."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.testing._internal.distributed.fake_pg import _create_fake_pg

from m3i_scale.engine import agree
from m3i_scale.engine.process_group import set_timeout, start_ranks
from m3i_scale.errors import DataError, UserError
from m3i_scale.run.preflight import check_distinct_cards

RANK = int(os.environ["RANK"])


def no_device(*_: object) -> str:
    raise AssertionError("a tensor of the device")


def fails_on_rank_1() -> str:
    if RANK == 1:
        raise DataError("no such folder", where="/data/x")
    return "done"


def words_of(call: object) -> str:
    try:
        call()
    except DataError as error:
        return error.what
    return "no error"


def ranks_on_a_card(card: str, slice_name: str = "") -> tuple[str, bool] | None:
    """Return what is told of ranks with these GPUs, and whether all ranks count on the others being told."""
    os.environ["CUDA_VISIBLE_DEVICES"] = slice_name
    torch.cuda.get_device_properties = lambda: SimpleNamespace(uuid=card)
    try:
        check_distinct_cards()
    except UserError as error:
        return error.where, error.everywhere
    return None


def main(folder: Path) -> None:
    accelerator = get_accelerator()
    dist.Backend.register_backend("silent", _create_fake_pg, extended_api=True, devices=["cpu"])
    accelerator.communication_backend_name = lambda: "silent"
    accelerator.current_device_name = accelerator.current_device = accelerator.pin_memory = no_device
    start_ranks()
    answers = {
        "of all ranks": dist.get_backend(),
        "gathered": agree.gather_objects({"rank": RANK}),
        "on rank 0": agree.gather_on_rank_0([RANK]),
        "from rank 0": agree.from_rank_0(lambda: "a word"),
        "counts": agree.summed_counts({"both": 1, f"of {RANK}": 2}),
        "sum": agree.sum_over_ranks([0.5, RANK]),
        "mean": agree.mean_over_ranks({"rank": RANK}),
        "max": agree.max_over_ranks({"rank": RANK}),
        "fault": words_of(lambda: agree.together(fails_on_rank_1)),
    }
    accelerator.device_name = lambda: "cuda"
    answers["cards"] = [
        ranks_on_a_card("one"),
        ranks_on_a_card(f"of rank {RANK}"),
        ranks_on_a_card("one", f"MIG-{RANK}"),
        ranks_on_a_card(f"of rank {RANK}", "MIG-0"),
    ]
    set_timeout(1.0)
    if RANK == 0:
        try:
            agree.gather_objects(None)
        except RuntimeError:
            answers["alone"] = "ended"
    (folder / f"{RANK}.json").write_text(json.dumps(answers))
    while not (folder / "0.json").exists():  # its end would end rank 0's waiting
        time.sleep(0.05)
    os._exit(0)


main(Path(sys.argv[1]))
