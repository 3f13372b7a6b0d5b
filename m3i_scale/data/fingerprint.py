"""Fingerprints of datasets in the data state: detailed enough to explain a change, small enough for a checkpoint."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from braceexpand import braceexpand

from m3i_scale.config import AugmentConfig, DatasetConfig, DistortionConfig
from m3i_scale.config.views import ViewSpecs
from m3i_scale.text import format_differences, listed

Shard = tuple[str, int, int, str]
"""Name, size in bytes, number of samples, digest of the tar headers."""
_DIGEST_LETTERS = 2
"""12 bits each for the size of a shard, its number of samples, and its headers. They only describe a difference; the
full hash detects it."""
_SHOWN = 4
_DEAL = 2
"""Version of the rule that distributes samples to streams (evenly); fingerprints without it are 1 (by shard)."""
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)


def fingerprint(
    shards: Iterable[Shard],
    source: DatasetConfig,
    augment: AugmentConfig,
    repeats: str | None = None,
    views: ViewSpecs = 1,
) -> dict[str, Any]:
    """Return the fingerprint of a dataset: one hash of its ordered shards, and its settings one by one.

    Args:
        shards: in order.
        source: settings of the dataset.
        augment: distortions for datasets without `augment`.
        repeats: digest of the repeat factors; None: every sample is read once.
        views: views of the recipe. A plain number is omitted: more views do not change the draws of earlier views.
    """
    digest = hashlib.sha256()
    count = samples = 0
    for name, size, number, headers in shards:
        digest.update(f"{name} {size} {number} {headers}\n".encode())
        count += 1
        samples += number
    # Fields that are None are newer than the first checkpoints, which do not have them.
    distortions = (source.augment or augment).model_dump(
        mode="json", include=set(DistortionConfig.model_fields), exclude_none=True
    )
    exclude = {"path", "augment"} | ({"repeat_threshold"} if source.repeat_threshold is None else set())
    settings = source.model_dump(mode="json", exclude=exclude) | {"augment": distortions}
    if not isinstance(views, int):
        settings["views"] = [spec.model_dump(mode="json", exclude_none=True) for spec in views]
    found = {"shards": count, "samples": samples, "sha256": digest.hexdigest(), "deal": _DEAL, "settings": settings}
    return found if repeats is None else found | {"repeats": repeats}


def listing(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return a list of shards for the state of rank 0: names as brace patterns, and six characters per shard."""
    letters = "".join(_letters(*shard[1:]) for shard in shards)
    return {"names": _patterns([name for name, *_ in shards]), "digests": letters}


def changes(
    saved: Mapping[str, Any],
    present: Mapping[str, Any],
    listings: Mapping[str, Any],
    here: Mapping[str, Sequence[Shard]],
) -> dict[str, str]:
    """Describe the change of every dataset that differs between the fingerprints `saved` in the data state and the
    `present` ones. `listings` are the shard lists of the data state, and may be incomplete; `here` are the current
    shards."""
    differences = {}
    for name in sorted({*saved, *present}):
        before, now = saved.get(name), present.get(name)
        if before is None and now is not None:
            differences[name] = f"added ({_amount(now)})"
        elif now is None and before is not None:
            differences[name] = f"removed ({_amount(before)})"
        elif before is not None and now is not None and before != now:
            parts = format_differences("", before["settings"], now["settings"])
            if before.get("deal", 1) != now.get("deal", 1):
                parts.insert(0, "this version distributes samples to streams by another rule: the dataset restarts")
            if before["sha256"] != now["sha256"]:
                parts.insert(0, _shards(before, now, listings.get(name), here[name]))
            elif not parts and now["repeats"].startswith(f"{before['repeats']} "):  # only the rule's version differs
                parts.append("this version repeats samples by another rule: the dataset restarts")
            elif not parts:
                parts.append("the categories of the objects changed, so samples are repeated differently")
            differences[name] = "; ".join(parts)
    return differences


def same_order(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two fingerprints have the same shards, repeats, and distribution rule."""
    return all(before.get(key) == now.get(key) for key in ("sha256", "deal", "repeats"))


def _amount(source: Mapping[str, Any]) -> str:
    return f"{_count(source['shards'])}, {source['samples']} samples"


def _count(shards: int) -> str:
    return f"{shards} shard" if shards == 1 else f"{shards} shards"


def _shards(
    before: Mapping[str, Any], now: Mapping[str, Any], old: Mapping[str, Any] | None, here: Sequence[Shard]
) -> str:
    if old is None:
        return f"shards were {_amount(before)}, are {_amount(now)}"
    width = 3 * _DIGEST_LETTERS
    names = _names(old["names"])
    known = {name: old["digests"][width * number : width * (number + 1)] for number, name in enumerate(names)}
    present = {shard[0]: _letters(*shard[1:]) for shard in here}
    kinds = {
        "added": [name for name in present if name not in known],
        "removed": [name for name in names if name not in present],
        "changed": [name for name in present if name in known and known[name] != present[name]],
    }
    parts = [f"{_count(len(which))} {what}: {_short_list(which)}" for what, which in kinds.items() if which]
    return ", ".join(parts) or "a shard has other members; which one is unknown"


def _short_list(names: Sequence[str]) -> str:
    patterns = [pattern.removeprefix("=") for pattern in _patterns(names)]
    return listed(patterns, _SHOWN, " ")


def _letters(*values: int | str) -> str:
    digests = (hashlib.blake2b(str(value).encode(), digest_size=3).digest() for value in values)
    return "".join(base64.urlsafe_b64encode(digest)[:_DIGEST_LETTERS].decode() for digest in digests)


def _split(name: str) -> tuple[str, str, str] | None:
    """Split a name at its last number, such as `images-` `000017` `.tar`; None if it has no number, or special
    characters of brace patterns."""
    if name.startswith("=") or any(letter in name for letter in "{}\\,"):
        return None
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (match[1], match[2], match[3])


def _patterns(names: Sequence[str]) -> list[str]:
    """Compress consecutive numbers to brace patterns, in order; names with special characters get the prefix `=`."""

    def place(item: tuple[int, str]) -> tuple[Any, ...]:
        number, name = item
        split = _split(name)
        if split is None:
            return (number,)
        before, digits, after = split
        return (before, after, len(digits), int(digits) - number)

    patterns = []
    for _, group in groupby(enumerate(names), key=place):
        run = [name for _, name in group]
        first, last = _split(run[0]), _split(run[-1])
        if first is None or last is None:
            patterns.append(f"={run[0]}")
        elif len(run) == 1:
            patterns.append(run[0])
        else:
            patterns.append(f"{first[0]}{{{first[1]}..{last[1]}}}{first[2]}")
    return patterns


def _names(patterns: Iterable[str]) -> list[str]:
    names: list[str] = []
    for pattern in patterns:
        names += [pattern[1:]] if pattern.startswith("=") else braceexpand(pattern)
    return names
