"""Data that fail on one rank end the run on every rank, with one message: no rank waits for one that has left."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import Job
from shapes import metrics, train, write_run

from m3i_scale.data.order import StreamOrder, ends_of, shard_order
from m3i_scale.data.scan import scan_shard

pytestmark = pytest.mark.slow

STREAMS, WORLD = 4, 2
BAD_LABEL = b"99"


def relabel(shard: Path, is_bad: Callable[[int], bool]) -> None:
    """Give samples a label that the label set does not have."""
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    labels = [name for name, _ in members if name.endswith(".cls")]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            content = BAD_LABEL if name in labels and is_bad(labels.index(name)) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def bad_on_the_last_rank(shards: Path, copy: Path, split: str, source: str, is_bad: Callable[[int], bool]) -> Path:
    """A copy of the shards in which only streams of the last rank meet bad samples."""
    shutil.copytree(shards, copy)
    paths = sorted((copy / split).glob("*.tar"))
    paths = [paths[number] for number in shard_order(len(paths), 0, source)]
    ends = ends_of([len(scan_shard(path)) for path in paths], STREAMS, split)
    read = [set(StreamOrder(ends, stream, STREAMS, 1, 0).shards) for stream in range(STREAMS)]
    first_of_last_rank = STREAMS // WORLD * (WORLD - 1)
    for number in set().union(*read[first_of_last_rank:]) - set().union(*read[:first_of_last_rank]):
        relabel(paths[number], is_bad)
    shutil.rmtree(copy / split / "index", ignore_errors=True)
    return copy


def told_by_rank_0(job: Job) -> str:
    """What rank 0 says. The others say in one line that they end."""
    logs = [job.log(rank).read_text() for rank in range(WORLD)]
    assert "Traceback" not in "".join(logs)
    for rank, log in enumerate(logs[1:], start=1):
        (line,) = [line for line in log.splitlines() if f"[rank {rank}]" in line]
        assert re.search(r"error: .* \(see rank 0\)$", line)
        assert "fix:" not in log
    return logs[0]


@pytest.mark.parametrize(
    ("split", "source", "is_bad", "steps_done", "says"),
    [
        ("train", "shapes", lambda number: number % 3 == 0, range(1, 12), "more than data.max_corrupt_fraction = 0.05"),
        ("val", "val", lambda number: True, [2], "label out of range"),  # a first batch, which nothing can stand in for
    ],
    ids=["in the middle", "first batch of validation"],
)
def test_all_ranks_end_with_the_error_of_one(tmp_path, shards, split, source, is_bad, steps_done, says):
    copy = bad_on_the_last_rank(shards, tmp_path / "copy", split, source, is_bad)
    run_file = write_run(
        tmp_path / "run",
        copy,
        "supervised",
        "optim.batch_size=32",  # two micro-batches a step
        "optim.micro_batch_size=8",
        "optim.steps=12",
        f"data.validation.val.path={copy / 'val'}",
        "evaluation.every_steps=2",
        "evaluation.batches=2",
    )
    job = train(run_file, world=WORLD)
    assert job.wait() == [2, 2], job.text()[-4000:]
    told = told_by_rank_0(job)
    assert says in told
    assert re.search(r"\d+ × label out of range", told)
    assert "where: rank 1" in told or split == "train"  # which all ranks may judge before one is sure by itself
    assert max(metrics(run_file)) in steps_done


def test_what_rank_0_cannot_open_ends_the_ranks_that_wait_for_it(tmp_path, shards):
    """The others wait for its indices, up to an hour: the limit of the test is the time that they have to know."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shutil.rmtree(copy / "train" / "index")
    shard = sorted((copy / "train").glob("*.tar"))[2]
    shard.write_bytes(shard.read_bytes()[:900])
    job = train(write_run(tmp_path / "run", copy, "supervised"), world=WORLD)
    assert job.wait() == [2, 2], job.text()[-4000:]
    told = told_by_rank_0(job)
    assert "where: rank 0" in told
    assert shard.name in told
    assert "values resolved" not in told  # no summary of a run that does not start
