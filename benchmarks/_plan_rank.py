"""One rank of `plan_error.py`: the real trainer for a few steps, without its last save, and the most memory it took."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.config import load_run
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.run.check import resolve_run
from m3i_scale.run.hooks import Hook, TrainState
from m3i_scale.run.train import start_trainer


def peak_bytes() -> int:
    """The most that this process has held: on the accelerator, or of resident memory where the host computes."""
    if get_accelerator().device_name() != "cpu":
        return int(get_accelerator().max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Peaks(Hook):
    """Notes the peak after the start and after every step."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.peaks = {"built": peak_bytes()}

    def post_step(self) -> bool:
        self.peaks[f"step_{self._state.step}"] = peak_bytes()
        return False


def train(rank: int, world: int, port: int, run_file: Path, out: Path) -> None:
    """As rank `rank`; writes {moment: bytes}."""
    log = os.open(out.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = load_run(str(run_file))
    trainer = start_trainer(resolve_run(run, world), start_ranks(), [], None)
    peaks = Peaks(trainer.state)
    trainer.hooks = [*(hook for hook in trainer.hooks if hook is not trainer.checkpointing), peaks]  # nothing is saved
    trainer.fit()
    out.with_suffix(f".{rank}.json").write_text(json.dumps(peaks.peaks))
    stop_ranks(wait=True)
    sys.stdout.flush()
    os._exit(0)  # nothing of the parent's is to be closed here


def measure(run_file: Path, world: int) -> int:
    """The peak of the rank that takes most, bytes. On a host the ranks are copies of this process, which has imported
    everything; elsewhere they start anew, since a device must not be shared with a parent."""
    on_host = get_accelerator().device_name() == "cpu"
    context = multiprocessing.get_context("fork" if on_host else "spawn")
    port, out = get_free_port(), run_file.with_suffix("")
    ranks = [context.Process(target=train, args=(rank, world, port, run_file, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found = [out.with_suffix(f".{rank}.json") for rank in range(world)]
    if not all(path.exists() for path in found):
        raise RuntimeError(f"'{out.name}' did not train:\n{out.with_suffix('.0.log').read_text()[-4000:]}")
    return max(max(json.loads(path.read_text()).values()) for path in found)
