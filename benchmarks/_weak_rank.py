"""One rank of weak_scaling.py: engines that take steps, and collectives, when rank 0 is told to.

    python _weak_rank.py RUN.yaml IN OUT      (rank 0 has pipes; the others have 0 0)

Orders are JSON lines: {"engine": name, "steps": n}, {"probe": true}, or {} for the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from m3i_scale.config import load_run
from m3i_scale.data.batch import synthetic_batch
from m3i_scale.engine.agree import max_over_ranks
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.setup import ResolvedRun, resolve_engine, start_engine

CLASSES = 10
SMALL, LARGE = 1, 2**21
"""Elements of fp32 that probe a link: 4 bytes for its latency, 8 MiB for its bandwidth."""


class Steps:
    """An engine, and a batch that it sees over and over."""

    def __init__(self, run_file: str, engine: str, ranks: ProcessGroupRanks) -> None:
        run = load_run(run_file, [f"deepspeed={engine}"])
        batch = run.optim.micro_batch_size * ranks.world_size
        run = run.model_copy(update={"optim": run.optim.model_copy(update={"batch_size": batch})})
        recipe, image = parse_recipe(run.recipe), int(run.backbone.config["image_size"])
        resolved = resolve_engine(run, ranks.world_size, int(run.backbone.config["hidden_size"]))
        labels = {"classes": [str(number) for number in range(CLASSES)]}
        self.engine, _ = start_engine(ResolvedRun(run, recipe, labels, None, image, resolved, 1), ranks)
        torch.manual_seed(ranks.rank)
        sizes = {"image": image, "tokens": 8, "classes": CLASSES, "vocabulary": 50}
        self.batch = synthetic_batch(run.optim.micro_batch_size, recipe.drawn_views, **sizes)
        for _ in range(3):  # ZeRO-3 records its order of parameters, the optimizer makes its moments
            self.step()

    def step(self) -> None:
        """One optimizer step."""
        loss, _ = self.engine(self.batch)
        self.engine.backward(loss)
        self.engine.step()

    def timed(self, count: int) -> dict[str, float]:
        """Seconds of a step of the slowest rank, and bytes that this rank has sent."""
        dist.barrier()
        sent, started = _sent(), time.perf_counter()
        for _ in range(count):
            self.step()
        seconds = (time.perf_counter() - started) / count
        found = {"step_s": seconds, "sent_bytes": (_sent() - sent) / count}
        return max_over_ranks(found)


def _sent() -> int:
    """Bytes that have left this host."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            return int(counts.split()[8])
    return 0


def probe(world: int, repeats: int = 7) -> dict[str, float]:
    """Seconds of one step of a ring with next to nothing, and bytes a second of one with much, by gathers: the quickest
    of some, since what else the machine does is not the link's."""
    found = {}
    for name, numel in (("step_s", SMALL), ("large_s", LARGE)):
        part = torch.zeros(numel)
        whole = torch.empty(numel * world)
        times = []
        for _ in range(repeats):
            dist.barrier()
            started = time.perf_counter()
            dist.all_gather_into_tensor(whole, part)
            times.append(time.perf_counter() - started)
        found[name] = max_over_ranks({"s": min(times)})["s"] / max(world - 1, 1)
    return {"latency_s": found["step_s"], "bytes_s": 4 * LARGE / max(found["large_s"] - found["step_s"], 1e-9)}


def main(run_file: str, orders: TextIO | None, answers: TextIO | None, engines: list[str]) -> None:
    """Do what rank 0 is told until it is told nothing."""
    ranks = start_ranks(timeout_s=300)
    steps = {name: Steps(run_file, name, ranks) for name in engines}
    _answer(answers, {"ready": True})
    while True:
        order: list[dict[str, Any]] = [json.loads(orders.readline() or "{}") if orders is not None else {}]
        if ranks.world_size > 1:
            dist.broadcast_object_list(order, src=0)
        if not order[0]:
            break
        if "probe" in order[0]:
            _answer(answers, probe(ranks.world_size))
        else:
            _answer(answers, steps[order[0]["engine"]].timed(order[0]["steps"]))
    stop_ranks(wait=True)


def _answer(answers: TextIO | None, value: dict[str, Any]) -> None:
    if answers is not None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()


if __name__ == "__main__":
    first = os.environ["RANK"] == "0"
    main(
        sys.argv[1],
        os.fdopen(int(sys.argv[2]), "r") if first else None,
        os.fdopen(int(sys.argv[3]), "w") if first else None,
        sys.argv[4:],
    )
    sys.stdout.flush()
    os._exit(0)
