"""The timeout of collectives can be changed while a process group exists."""

from __future__ import annotations

from pathlib import Path

from launch import start_ranks

WAITING = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from m3i_scale.engine.process_group import set_timeout

rank, done = int(os.environ["RANK"]), Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(hours=1))
other = dist.new_group([0, 1])
dist.all_reduce(torch.ones(1), group=other)
dist.barrier()
set_timeout(1.0)
if rank == 1:
    while not done.exists():
        time.sleep(0.05)
    os._exit(0)
for group in (None, other):
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        print("ended:", error)
done.touch()
os._exit(0)
"""


def test_a_collective_ends_after_the_timeout_that_was_set_last(tmp_path: Path) -> None:
    job = start_ranks(["-c", WAITING, str(tmp_path / "done")], 2, tmp_path / "logs")
    assert job.wait() == [0, 0], job.text()
    assert job.log(0).read_text().count("ended:") == 2
