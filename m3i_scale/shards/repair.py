"""`shards check --repair`: byte-exact copies of the valid samples of corrupt shards, in a new folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.data.shards import LABELS, MASK_LABELS
from m3i_scale.data.tar import SCATTERED, RawSample, read_shard
from m3i_scale.data.workers import map_in_processes
from m3i_scale.files import write_json
from m3i_scale.shards.check import CheckReport
from m3i_scale.shards.existing_shards import common_categories, common_labels
from m3i_scale.shards.write import class_names, close_tar, finish_folder, shard_facts

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RepairTask:
    """A shard for a worker to repair."""

    path: Path
    output: Path
    bad: frozenset[int]
    """Offsets of samples to skip."""


def repair(report: CheckReport, folder: Path, workers: int, link: bool) -> dict[str, Any]:
    """Write repaired copies of corrupt shards to `folder`; valid shards are not copied.

    Args:
        report: result of `check_shards`.
        folder: existing, empty folder.
        workers: number of processes.
        link: also create symbolic links to the valid shards, so that the folder contains all valid samples.

    Returns:
        Content of `shards.json`: valid shards, repaired shards (samples kept and skipped), and shards without a valid
        sample.
    """
    bad = [shard for shard in report.shards if not shard.clean]
    mendable = _scattered_only(report)
    tasks = [
        RepairTask(shard.path, folder / shard.path.name, frozenset(shard.bad - mendable[shard.number])) for shard in bad
    ]
    facts = list(map_in_processes(repair_shard, tasks, workers))
    kept = {shard.path.name: counts for shard, counts in zip(bad, facts, strict=True) if counts["samples"]}
    good = [shard.path for shard in report.shards if shard.clean]
    if link:
        for path in good:
            (folder / path.name).symlink_to(path.resolve())
            kept[path.name] = _facts(read_shard(path).samples, path)
    result = {
        "as_they_are": [str(path) for path in good],
        "repaired": {
            str(shard.path): {"samples": counts["samples"], "left_out": shard.samples - counts["samples"]}
            for shard, counts in zip(bad, facts, strict=True)
            if counts["samples"]
        },
        "without_a_good_sample": [
            str(shard.path) for shard, counts in zip(bad, facts, strict=True) if not counts["samples"]
        ],
    }
    write_json(folder / "shards.json", result)
    if kept:
        labels, mask_labels = (common_labels(report.source, file) for file in (LABELS, MASK_LABELS))
        names = class_names(labels, mask_labels, common_categories(report.source))
        finish_folder(folder, dict(sorted(kept.items())), names, {"source": "check --repair"})
    return result


def repair_shard(task: RepairTask) -> dict[str, Any]:
    """Copy one shard without its corrupt samples, and return its manifest entry."""
    good = [sample for sample in read_shard(task.path).samples if sample.start not in task.bad]
    if not good:
        return {"samples": 0}
    with task.path.open("rb") as source, task.output.open("wb") as target:
        for member in (member for sample in good for member in sample.members):
            _copy(source, target, member.start, member.stop - member.start)
        close_tar(target)
    return _facts(good, task.output)


def _facts(samples: Sequence[RawSample], path: Path) -> dict[str, Any]:
    members = Counter({"samples": len(samples)})
    for sample in samples:
        members.update({member.extension for member in sample.members})
    return shard_facts(path, members)


def _scattered_only(report: CheckReport) -> dict[int, set[int]]:
    """Return by shard the offsets of samples whose only error is scattered files, which copying fixes."""
    mendable: dict[int, set[int]] = {}
    for shard in report.shards:
        reasons: dict[int, set[str]] = {}
        for fault in shard.faults:
            if fault.offset in shard.bad and fault.key != "?":
                reasons.setdefault(fault.offset, set()).add(fault.reason)
        mendable[shard.number] = {offset for offset, names in reasons.items() if names == {SCATTERED}}
    return mendable


def _copy(source: BinaryIO, target: BinaryIO, start: int, count: int) -> None:
    source.seek(start)
    while count:
        block = source.read(min(count, BLOCK_BYTES))
        if not block:
            break
        target.write(block)
        count -= len(block)
    target.write(bytes(count))  # padding missing at the end of the file
