"""`shards check --repair`: byte-exact copies of the valid samples of corrupt shards, in a new folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from m3i_scale.data.shards import LABELS, MASK_LABELS
from m3i_scale.data.tar import RawSample, read_shard
from m3i_scale.files import write_json
from m3i_scale.shards.check import CheckReport, ShardReport
from m3i_scale.shards.existing_shards import common_categories, common_labels
from m3i_scale.shards.process_pool import map_in_processes
from m3i_scale.shards.write import class_names, close_tar, finish_folder, shard_facts


def repair(report: CheckReport, folder: Path, workers: int, link: bool) -> dict[str, Any]:
    """Write repaired copies of corrupt shards to `folder`. Valid shards are not copied; with `link`, symbolic links to
    them are created, so that the folder contains all valid samples.

    Return the content of `shards.json`: valid shards, repaired shards (samples kept and skipped), and shards without a
    valid sample.
    """
    bad = [shard for shard in report.shards if not shard.clean]
    good = [shard.path for shard in report.shards if shard.clean]
    result: dict[str, Any] = {"as_they_are": [str(path) for path in good], "repaired": {}, "without_a_good_sample": []}
    written: dict[str, dict[str, Any]] = {}
    for shard, facts in zip(bad, map_in_processes(partial(_repair, folder=folder), bad, workers), strict=True):
        if facts["samples"]:
            written[shard.path.name] = facts
            counts = {"samples": facts["samples"], "left_out": shard.samples - facts["samples"]}
            result["repaired"][str(shard.path)] = counts
        else:
            result["without_a_good_sample"].append(str(shard.path))
    if link:
        for path in good:
            (folder / path.name).symlink_to(path.resolve())
            written[path.name] = _facts(read_shard(path).samples, path)
    write_json(folder / "shards.json", result)
    if written:
        labels, mask_labels = (common_labels(report.source, file) for file in (LABELS, MASK_LABELS))
        names = class_names(labels, mask_labels, common_categories(report.source))
        finish_folder(folder, dict(sorted(written.items())), names, {"source": "check --repair"})
    return result


def _repair(shard: ShardReport, folder: Path) -> dict[str, Any]:
    return copy_samples(shard.path, folder / shard.path.name, shard.lost)


def copy_samples(path: Path, output: Path, lost: set[int]) -> dict[str, Any]:
    """Copy a shard without the samples at the offsets `lost`, and return the manifest entry of the copy."""
    good = [sample for sample in read_shard(path).samples if sample.start not in lost]
    if not good:
        return {"samples": 0}
    with path.open("rb") as source, output.open("wb") as target:
        for member in (member for sample in good for member in sample.members):
            source.seek(member.start)
            target.write(source.read(member.stop - member.start).ljust(member.stop - member.start, b"\0"))
        close_tar(target)
    return _facts(good, output)


def _facts(samples: Sequence[RawSample], path: Path) -> dict[str, Any]:
    members = Counter({"samples": len(samples)})
    for sample in samples:
        members.update({member.extension for member in sample.members})
    return shard_facts(path, members)
