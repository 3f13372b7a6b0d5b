"""Data state: the position of every stream in every dataset, as a few counts. A resume may change some datasets.

Corrupt samples are counted in the state, and listed in the quarantine file.
"""

from __future__ import annotations

import copy
import fcntl
import json
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.data.fingerprint import Shard, changes, same_order
from m3i_scale.data.order import seed_of
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.files import json_line

STATE_FORMAT = 2
WHOLE_SHARD = "*"
"""Key that represents a lost shard."""
_SAME = {"url": str, "key": str, "offset": int, "reason": str}
"""Fields that identify an entry of the quarantine file, with their types."""


@dataclass
class SourceState:
    """Progress of one stream in one dataset."""

    position: int = 0
    """Samples read over all epochs, including corrupt ones."""
    served: int = 0
    """Valid samples yielded."""
    credit: int = 0
    """Target count minus actual count of samples, in `mixing.UNIT`."""
    bad: dict[str, int] = field(default_factory=dict)
    """Corrupt samples by reason."""
    bad_shards: dict[str, Any] = field(default_factory=dict)
    """Shards lost in the current epoch: {epoch, shards: {number: reason}}. A resumed run skips them too, so that its
    sample order stays the same."""

    def lost_shard(self, epoch: int, shard: int) -> str | None:
        """Return the reason why a shard is lost in this epoch; None if it is not lost."""
        if self.bad_shards and self.bad_shards["epoch"] != epoch:
            self.bad_shards = {}  # retry in the next epoch
        reason: str | None = self.bad_shards.get("shards", {}).get(str(shard))
        return reason

    def lose_shard(self, epoch: int, shard: int, reason: str) -> None:
        """Skip a shard for the rest of this epoch."""
        if not self.bad_shards:
            self.bad_shards = {"epoch": epoch, "shards": {}}
        self.bad_shards["shards"][str(shard)] = reason

    def to_json(self) -> dict[str, Any]:
        """Copy to JSON types. It runs for every stream of every batch, so it must be fast: no `asdict`."""
        bad_shards = copy.deepcopy(self.bad_shards) if self.bad_shards else {}
        return {**vars(self), "bad": dict(self.bad), "bad_shards": bad_shards}

    @staticmethod
    def from_json(state: Mapping[str, Any]) -> SourceState:
        """Restore a state from `to_json`."""
        bad_shards = copy.deepcopy(state["bad_shards"]) if state["bad_shards"] else {}
        return SourceState(state["position"], state["served"], state["credit"], dict(state["bad"]), bad_shards)


@dataclass
class StreamState:
    """Progress of a stream. Everything else follows from the configuration."""

    taken: int
    """Valid samples yielded, including those of removed datasets."""
    sources: dict[str, SourceState]

    @property
    def read(self) -> int:
        """Count the samples read from the current datasets, including corrupt ones."""
        return sum(source.position for source in self.sources.values())

    @property
    def bad(self) -> dict[str, int]:
        """Count the corrupt samples of the current datasets, by reason."""
        counts: Counter[str] = Counter()
        for source in self.sources.values():
            counts.update(source.bad)
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        """Copy to JSON types."""
        return {"taken": self.taken, "sources": {name: source.to_json() for name, source in self.sources.items()}}

    @staticmethod
    def from_json(state: Mapping[str, Any]) -> StreamState:
        """Restore a state from `to_json`."""
        return StreamState(state["taken"], {name: SourceState.from_json(of) for name, of in state["sources"].items()})


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks into one state that any number of ranks can load.

    Raises:
        ConfigError: not a list of states.
        DataError: states of different runs or of different steps.
    """
    if not isinstance(states, Sequence) or not states or not all(isinstance(state, dict) for state in states):
        raise ConfigError(
            f"merge_states needs a list with the state of every rank, got {reprlib.repr(states)}",
            where="merge_states",
            fix="call merge_states([stream.state_dict()]) with the states of all ranks",
        )
    merged = dict(states[0], streams={}, listings={})
    for state in states:
        check_format(state)
        for key in ("order", "sources", "changes"):
            if state[key] != merged[key]:
                raise _not_together(f"{key} differ between the ranks' states")
        merged["streams"].update(state["streams"])
        merged["listings"].update(state["listings"])
    taken = {stream["taken"] for stream in merged["streams"].values()}
    if len(taken) > 1:
        raise _not_together(f"some streams have yielded {min(taken)} samples, others {max(taken)}")
    return merged


def check_format(state: Mapping[str, Any]) -> None:
    """Raise an error if another version wrote the state in another format."""
    if state.get("format") != STATE_FORMAT:
        raise DataError(
            f"unknown format of the data state: {state.get('format')}; this version reads {STATE_FORMAT}",
            where="data/rank-*.json of the checkpoint",
            why="it mixed datasets by another rule, so samples would be silently skipped or repeated",
            fix="resume with the version that saved it, or start a new run from its weights",
        )


def check_order(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise an error if the seed, the number of streams or the shuffle windows differ."""
    different = [key for key in sorted({*saved, *present}) if saved.get(key) != present.get(key)]
    if different:
        raise DataError(
            "the order of samples differs from the checkpoint: "
            + ", ".join(f"{key} was {saved.get(key)}, is {present.get(key)}" for key in different),
            where="data state, order",
            why="samples would be silently skipped or repeated",
            fix="restore the settings of the run, or start a new run from its weights",
        )


def accept_changes(
    state: Mapping[str, Any],
    present: Mapping[str, Any],
    here: Mapping[str, Sequence[Shard]],
    named: Collection[str],
) -> dict[str, str]:
    """Describe the datasets that differ from the data state; raise an error unless exactly these are `named`
    (data.changed_datasets).

    If nothing differs any more, the names of the last change are accepted: a run restarted after its change still has
    them in its config. `present` and `here` are the current fingerprints and shards.
    """
    differences = changes(state["sources"], present, state["listings"], here)
    past = state["changes"]
    if set(named) == set(differences) or (not differences and past and set(named) == set(past[-1]["sources"])):
        return differences
    wanted = f"data.changed_datasets=[{', '.join(differences)}]"
    if not differences:
        before = f"; those of the last change were {', '.join(past[-1]['sources'])}" if past else ""
        raise DataError(
            f"data.changed_datasets names {', '.join(sorted(named))}, but no dataset differs from the checkpoint",
            where="data.changed_datasets",
            fix=f"remove these names{before}",
        )
    idle = sorted(set(named) - set(differences))
    raise DataError(
        f"the data changed since the checkpoint: {', '.join(differences)}"
        + (f"; data.changed_datasets also names {', '.join(idle)}, unchanged" if idle else ""),
        where="data state, datasets",
        why="; ".join(f"{name}: {text}" for name, text in differences.items()),
        fix=f"restore the shards and settings of the run; or, if all changes are intended, set {wanted}",
    )


def carry_over(
    stream: StreamState, changed: Collection[str], saved: Mapping[str, Any], present: Mapping[str, Any]
) -> StreamState:
    """Return the state of a stream for the current datasets.

    Unchanged datasets continue exactly, and so do datasets with changed settings. Datasets with other shards, or
    another distribution to streams, restart from the beginning. Credits are reset, because otherwise a new weight would
    be compensated for at once.
    """
    if not changed:
        return stream
    sources = {}
    for name, now in present.items():
        old = stream.sources.get(name)
        goes_on = old is not None and same_order(saved[name], now)
        kept = SourceState(old.position, old.served, 0, old.bad, old.bad_shards) if old and goes_on else None
        sources[name] = kept or SourceState()
    return StreamState(stream.taken, sources)


def _not_together(what: str) -> DataError:
    return DataError(
        f"the data states are not of the same checkpoint: {what}",
        where="data/rank-*.json of the checkpoint",
        fix="use the files of one checkpoint",
    )


class Quarantine:
    """Quarantine file of a run: a JSON lines file to append to; with `path` None, nothing is written.

    Several ranks may read a shard, but only the first one writes an entry: before writing, a rank locks the file and
    reads new entries of other ranks. Every rank reads all earlier entries when it opens its data, because a later read
    error would stop a single rank.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: set[int] = set()
        self._read_bytes = 0
        try:
            if path is not None:
                with path.open("rb") as stream:
                    self._read_on(stream)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(
                f"cannot read the quarantine file: {error}",
                where=str(path),
                fix="make the file readable, or remove it to start an empty list",
            ) from None

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Append the entries that are not yet in the file."""
        if self.path is None or not self._new(entries):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                torn = self._read_on(stream)
                new = self._new(entries)
                lines = [json_line(entry) for entry in new.values()]
                stream.write("".join(["\n" if torn and new else "", *lines]).encode())
                self._known.update(new)
                self._read_bytes = stream.tell()
        except OSError as error:
            raise DataError(
                f"cannot write the quarantine file: {error}",
                where=str(self.path),
                fix="free space and make the folder writable",
            ) from None

    def _new(self, entries: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return the entries that are not known, by digest."""
        return {digest: entry for entry in entries if (digest := _digest(entry)) not in self._known}

    def _read_on(self, stream: BinaryIO) -> bool:
        """Read new entries; return whether the file ends with an incomplete line. Such a line of a killed process is
        ignored, and the next entry starts on a new line."""
        begin = stream.seek(max(0, self._read_bytes - 1))  # one known byte, to detect an incomplete line
        content = stream.read()
        self._read_bytes = begin + content.rfind(b"\n") + 1  # another rank may still be writing the rest
        self._known.update(map(_digest, filter(None, map(_parsed, content.splitlines()))))
        return bool(content) and not content.endswith(b"\n")


def _digest(entry: Mapping[str, Any]) -> int:
    return seed_of(*(entry[name] for name in _SAME))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _SAME.items())
    return entry if known else None
