"""Runs of the data stream that are killed and go on with other ranks and workers, in processes of their own.

Every rank is a process, in step with the others as in training, with loader workers of its own. All save their state
every few steps; what a kill cuts off is done over from the newest step that all ranks have saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import tarfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.shards import read_label_sets
from m3i_scale.data.state import merge_states

STREAMS, GLOBAL = 12, 24
RANKS, WORKERS = (1, 2, 3, 4, 6), (0, 0, 1, 2, 3)
SAVE_EVERY = 3
WAIT_S = 300.0
FORK = multiprocessing.get_context("fork")
Samples = list[tuple[str, int, str]]
"""Of a global batch, in order: key, a number that differs from pass to pass, digest of all that training sees."""


@dataclass
class Segment:
    """Part of a plan: how it is run, and how it ends."""

    ranks: int
    workers: int
    steps: int
    """It is cut off once so many steps are done; without a kill, exactly then."""
    kill: str
    """rank, worker, all, or none."""
    done: int = 0
    """Steps of it that counted."""


@dataclass
class Result:
    """What came of a plan, against the run that was left alone."""

    segments: list[Segment] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0
    order_identical: bool = False
    pixels_identical: bool = False


def make_sources(folder: Path, draw: random.Random) -> dict[str, DatasetConfig]:
    """Three sources of uneven shards: one on a schedule, one that ends, one with samples that do not decode."""
    sizes = {name: [draw.randint(3, 14) for _ in range(draw.randint(STREAMS, 20))] for name in ("a", "b", "c")}
    for name, shards in sizes.items():
        _write(folder / name, shards, draw, bad=0.1 if name == "c" else 0.0)
    return {
        "a": DatasetConfig(path=str(folder / "a"), weight=[(0, 3.0), (600, 1.0)]),
        "b": DatasetConfig(path=str(folder / "b"), weight=1.5, epochs=2),
        "c": DatasetConfig(path=str(folder / "c"), weight=draw.choice([0.5, 1.0])),
    }


def _write(folder: Path, sizes: list[int], draw: random.Random, bad: float) -> None:
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"s-{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                data = buffer.getvalue()[: 50 if draw.random() < bad else None]
                for extension, content in (("png", data), ("cls", str(number % 3).encode())):
                    info = tarfile.TarInfo(f"k{number:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    (folder / "labels.json").write_text(json.dumps(["x", "y", "z"]))


def open_stream(sources: dict[str, DatasetConfig], cache: Path, ranks: int, rank: int, workers: int) -> TrainStream:
    """The stream of one rank."""
    return TrainStream(
        DataConfig(datasets=sources, streams=STREAMS, num_workers=workers, shuffle_shards=2, max_corrupt_fraction=0.5),
        sources,
        views=2,
        image_size=12,
        micro_batch_size=GLOBAL // ranks,
        world_size=ranks,
        rank=rank,
        seed=11,
        tokenizer=None,
        max_tokens=8,
        label_sets=read_label_sets(sources),
        cache_dir=cache,
    )


def samples_of(batch: Batch) -> Samples:
    """What is compared of a batch."""
    columns = [batch.images_VBCHW.unbind(1), batch.crops_VB4.unbind(1), batch.flips_VB.unbind(1), batch.sizes_B2]
    columns += [batch.labels_B, batch.label_sets_B, batch.seeds_B]
    found = []
    for key, seed, *values in zip(batch.keys, batch.seeds_B.tolist(), *columns, strict=True):
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()[:16]
        found.append((key, seed, digest))
    return found


def left_alone(sources: dict[str, DatasetConfig], cache: Path, steps: int) -> list[Samples]:
    """The batches of one process that nobody disturbs."""
    return [samples_of(batch) for batch in itertools.islice(open_stream(sources, cache, 1, 0, 0), steps)]


def random_plan(draw: random.Random, steps: int) -> list[Segment]:
    """Segments with other ranks or workers than the one before, most of them killed; the last one runs to the end."""
    plan: list[Segment] = []
    left = steps
    while left > 0:
        ranks = draw.choice([ranks for ranks in RANKS if not plan or ranks != plan[-1].ranks])
        workers = draw.choice([workers for workers in WORKERS if not workers or (STREAMS // ranks) % workers == 0])
        last = len(plan) == 4
        count = left if last else min(left, draw.randint(2, max(3, steps // 3)))
        kinds = ["none", "rank", "all"] + ["worker"] * (2 if workers else 0)
        plan.append(Segment(ranks, workers, count, "none" if count == left else draw.choice(kinds)))
        left -= count
    return plan


def run_plan(
    plan: list[Segment], sources: dict[str, DatasetConfig], folder: Path, wanted: list[Samples], draw: random.Random
) -> Result:
    """Run a plan to the end of `wanted`; kills may throw it back, so the last segment may be longer than planned."""
    states = folder / "states"
    states.mkdir(parents=True)
    got: list[Samples] = []
    for number, segment in enumerate(plan):
        last = number == len(plan) - 1
        segment.steps = len(wanted) - len(got) if last else min(segment.steps, len(wanted) - len(got))
        if segment.steps:
            batches = _run_segment(segment, sources, folder, len(got), draw)
            segment.done = len(batches)
            got += batches
    before, after = (Counter(sample[:2] for batch in batches for sample in batch) for batches in (wanted, got))
    return Result(
        plan,
        lost=sum((before - after).values()),
        repeated=sum((after - before).values()),
        order_identical=[[sample[0] for sample in batch] for batch in got]
        == [[sample[0] for sample in batch] for batch in wanted],
        pixels_identical=got == wanted,
    )


def _run_segment(
    segment: Segment, sources: dict[str, DatasetConfig], folder: Path, start: int, draw: random.Random
) -> list[Samples]:
    """The batches up to the newest step that all ranks have saved."""
    logs = folder / f"from-{start:04d}"
    logs.mkdir(exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    killed = segment.kill != "none"
    # One that is to be killed goes on until it is, so that the kill may fall between saves or into one.
    steps = None if killed else segment.steps
    barrier = FORK.Barrier(segment.ranks)
    arguments = [(segment, rank, sources, folder, start, steps, barrier) for rank in range(segment.ranks)]
    ranks = [FORK.Process(target=_rank, args=given) for given in arguments]
    for process in ranks:
        process.start()
    try:
        if killed:
            _wait_for(lambda: _logged(logs, segment.ranks) >= segment.steps, ranks)
            time.sleep(draw.random() * 0.05)
            _kill(segment.kill, ranks, draw)
        else:
            _wait_for(lambda: not any(process.is_alive() for process in ranks), [])
            if any(process.exitcode for process in ranks):
                raise RuntimeError(f"ranks ended with {[process.exitcode for process in ranks]}: {segment}")
    finally:
        _end(ranks)
    saved = _newest(folder / "states", segment.ranks, start)
    parts = [_read_log(logs / f"rank-{rank}.jsonl") for rank in range(segment.ranks)]
    return [[sample for part in parts for sample in part[step]] for step in range(start, saved)]


def _rank(
    segment: Segment,
    rank: int,
    sources: dict[str, DatasetConfig],
    folder: Path,
    start: int,
    steps: int | None,
    barrier: Any,
) -> None:
    """One rank, in a process of its own."""
    stream = open_stream(sources, folder.parent / "cache", segment.ranks, rank, segment.workers)
    if start:
        ranks = len(list((folder / "states").glob(f"{start:04d}-*.json")))
        files = [folder / "states" / f"{start:04d}-{number}.json" for number in range(ranks)]
        stream.load_state_dict(merge_states([json.loads(file.read_text()) for file in files]))
    with (
        (folder / f"from-{start:04d}" / f"rank-{rank}.jsonl").open("w") as log,
        contextlib.closing(iter(stream)) as batches,
    ):
        for step, batch in enumerate(itertools.islice(batches, steps), start + 1):
            log.write(json.dumps(samples_of(batch)) + "\n")
            log.flush()
            barrier.wait(WAIT_S)  # as the collectives of a training step
            if (step - start) % SAVE_EVERY == 0 or step - start == steps:
                _save(stream.state_dict(), folder / "states", step, rank)
                barrier.wait(WAIT_S)


def _save(state: dict[str, Any], folder: Path, step: int, rank: int) -> None:
    temporary = folder / f".{step:04d}-{rank}"
    temporary.write_text(json.dumps(state))
    temporary.replace(folder / f"{step:04d}-{rank}.json")


def _newest(states: Path, ranks: int, start: int) -> int:
    """The newest step that all ranks have saved; what only some have is removed, as an uncommitted checkpoint is."""
    by_step: dict[int, list[Path]] = {}
    for file in states.glob("*.json"):
        by_step.setdefault(int(file.stem.split("-")[0]), []).append(file)
    whole = [step for step, files in by_step.items() if step > start and len(files) == ranks]
    newest = max(whole, default=start)
    for step, files in by_step.items():
        for file in files if step != newest else []:
            file.unlink()
    return newest


def _read_log(path: Path) -> dict[int, Samples]:
    """Samples of this rank by step; the line that a kill has torn is left out."""
    start = int(path.parent.name.removeprefix("from-"))
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {start + number: [tuple(sample) for sample in json.loads(line)] for number, line in enumerate(lines)}


def _logged(logs: Path, ranks: int) -> int:
    files = [logs / f"rank-{rank}.jsonl" for rank in range(ranks)]
    return min(file.read_text().count("\n") if file.exists() else 0 for file in files)


def _kill(which: str, ranks: list[Any], draw: random.Random) -> None:
    victims = {"rank": [draw.choice(ranks).pid], "all": [process.pid for process in ranks], "worker": []}[which]
    if which == "worker":
        rank = draw.choice(ranks)
        victims = [draw.choice(psutil.Process(rank.pid).children()).pid]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if which == "worker":  # its rank must see it, and end
        _wait_for(lambda: not rank.is_alive(), [])
        if not rank.exitcode:
            raise RuntimeError("a rank went on without its worker")


def _wait_for(done: Any, alive: list[Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        if any(process.exitcode for process in alive):
            raise RuntimeError(f"a rank ended by itself: {[process.exitcode for process in alive]}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened for {WAIT_S:g} s")
        time.sleep(0.005)


def _end(ranks: list[Any]) -> None:
    """Kill what is left of a segment: the ranks, and their workers, whose parents may be gone."""
    workers = []
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers += psutil.Process(process.pid).children()
    for process in ranks:
        process.kill()
        process.join()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def summary(results: list[Result]) -> dict[str, Any]:
    """The figures over all plans."""
    return {
        "lost": sum(result.lost for result in results),
        "repeated": sum(result.repeated for result in results),
        "order_identical": all(result.order_identical for result in results),
        "pixels_identical": all(result.pixels_identical for result in results),
        "plans": [asdict(result) for result in results],
        "kills": dict(Counter(segment.kill for result in results for segment in result.segments)),
    }


def run_plans(folder: Path, count: int, steps: int, seed: int) -> list[Result]:
    """Random plans against one run that is left alone.

    Raises:
        RuntimeError: a process ended by itself, or went on where it should not have.
    """
    if threading.active_count() > 1:
        raise RuntimeError("ranks are forked, so this process must have no other threads")
    draw = random.Random(seed)
    sources = make_sources(folder, draw)
    wanted = left_alone(sources, folder / "cache", steps)
    results = []
    for number in range(count):
        plan = random_plan(draw, steps)
        results.append(run_plan(plan, sources, folder / f"plan-{number}", wanted, draw))
    return results
