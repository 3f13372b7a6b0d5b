"""`shards check --repair`: the good samples of bad shards, byte by byte, in a folder of their own."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.data.tools.check import CheckReport
from m3i_scale.data.tools.origin import common_labels
from m3i_scale.data.tools.parallel import in_order
from m3i_scale.data.tools.tar import SCATTERED, RawSample, read_shard
from m3i_scale.data.whole import finish_folder, sha256_of, write_json

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RepairTask:
    """One shard for a worker."""

    path: Path
    output: Path
    bad: frozenset[int]
    """Offsets of samples to leave out."""


def repair(report: CheckReport, folder: Path, workers: int, link: bool) -> dict[str, Any]:
    """Write clean copies of bad shards into `folder`; shards that are good as they are stay where they are.

    Args:
        report: what `check_shards` found.
        folder: exists and is empty.
        workers: processes.
        link: put symbolic links to the good shards beside the copies, so that the folder holds all good samples.

    Returns:
        What went where, as in `shards.json`: shards as they are, repaired ones (samples kept and left out), and those
        without a good sample.
    """
    mendable = _scattered_only(report)
    tasks = [
        RepairTask(shard.path, folder / shard.path.name, frozenset(shard.bad - mendable.get(shard.number, set())))
        for shard in report.shards
        if not shard.clean
    ]
    facts = dict(zip((task.path for task in tasks), in_order(repair_shard, tasks, workers), strict=True))
    kept = {path.name: counts for path, counts in facts.items() if counts["samples"]}
    good = [shard.path for shard in report.shards if shard.clean]
    if link:
        for path in good:
            (folder / path.name).symlink_to(path.resolve())
            kept[path.name] = count_shard(path)
    result = {
        "as_they_are": [str(path) for path in good],
        "repaired": {
            str(shard.path): {
                "samples": facts[shard.path]["samples"],
                "left_out": shard.samples - facts[shard.path]["samples"],
            }
            for shard in report.shards
            if shard.path in facts and facts[shard.path]["samples"]
        },
        "without_a_good_sample": [str(path) for path, counts in facts.items() if not counts["samples"]],
    }
    write_json(folder / "shards.json", result)
    if kept:
        finish_folder(folder, dict(sorted(kept.items())), common_labels(report.source), {"source": "check --repair"})
    return result


def repair_shard(task: RepairTask) -> dict[str, Any]:
    """Copy one shard without its bad samples; returns what the manifest says of it."""
    raw = read_shard(task.path)
    good = [sample for sample in raw.samples if sample.start not in task.bad]
    if not good:
        return {"samples": 0}
    with task.path.open("rb") as source, task.output.open("wb") as target:
        for sample in good:
            for start, stop in sample.pieces():
                _copy(source, target, start, stop - start)
        target.write(bytes(2 * tarfile.BLOCKSIZE))
        target.write(bytes(-target.tell() % tarfile.RECORDSIZE))
    return _facts(good, task.output)


def count_shard(path: Path) -> dict[str, Any]:
    """What the manifest says of a shard."""
    return _facts(read_shard(path).samples, path)


def _facts(samples: list[RawSample], path: Path) -> dict[str, Any]:
    extensions = [{member.extension for member in sample.members} for sample in samples]
    return {
        "samples": len(samples),
        "with_label": sum("cls" in names for names in extensions),
        "with_caption": sum("txt" in names for names in extensions),
        "with_mask": sum("mask.png" in names for names in extensions),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def _scattered_only(report: CheckReport) -> dict[int, set[int]]:
    """Offsets, by shard, of samples whose only fault is that their members lie apart: copying puts them together."""
    found: dict[int, set[int]] = {}
    for shard in report.shards:
        reasons: dict[int, set[str]] = {}
        for fault in shard.faults:
            if fault.offset in shard.bad and fault.key != "?":
                reasons.setdefault(fault.offset, set()).add(fault.reason)
        found[shard.number] = {offset for offset, names in reasons.items() if names == {SCATTERED}}
    return found


def _copy(source: BinaryIO, target: BinaryIO, start: int, count: int) -> None:
    source.seek(start)
    while count:
        block = source.read(min(count, BLOCK_BYTES))
        if not block:
            break
        target.write(block)
        count -= len(block)
    target.write(bytes(count))  # padding that the file's end lacks
