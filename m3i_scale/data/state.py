"""The data state says where every stream stands in every source, in a few counts; a resume may change some of it."""

from __future__ import annotations

import copy
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m3i_scale.data.fingerprint import Shard, changes, same_order
from m3i_scale.errors import ConfigError, DataError

STATE_FORMAT = 2


@dataclass
class SourceState:
    """Counts how far one stream is in one source."""

    position: int = 0
    """Samples read, bad ones included; over all passes."""
    served: int = 0
    """Good samples given."""
    credit: int = 0
    """What the stream owes the source: samples it was to get less samples it got, in `mixing.UNIT`."""
    bad: dict[str, int] = field(default_factory=dict)
    """Bad samples by reason."""
    bad_shards: dict[str, Any] = field(default_factory=dict)
    """Shards given up in the present pass: {epoch, shards: {number: reason}}. A run that goes on from here gives them
    up too, so that its order is that of the run before."""

    def lost_shard(self, epoch: int, shard: int) -> str | None:
        """Return why a shard was given up in this pass; None where it was not."""
        if self.bad_shards and self.bad_shards["epoch"] != epoch:
            self.bad_shards = {}  # the next pass tries it again
        reason: str | None = self.bad_shards.get("shards", {}).get(str(shard))
        return reason

    def lose_shard(self, epoch: int, shard: int, reason: str) -> None:
        """Give a shard up for the rest of this pass."""
        if not self.bad_shards:
            self.bad_shards = {"epoch": epoch, "shards": {}}
        self.bad_shards["shards"][str(shard)] = reason

    def to_json(self) -> dict[str, Any]:
        """Return a copy made of JSON types; spelt out for speed, as one is made for every stream of every batch."""
        return {
            "position": self.position,
            "served": self.served,
            "credit": self.credit,
            "bad": dict(self.bad),
            "bad_shards": copy.deepcopy(self.bad_shards) if self.bad_shards else {},
        }

    @staticmethod
    def from_json(state: Mapping[str, Any]) -> SourceState:
        """Return the state that `to_json` copied."""
        bad_shards = copy.deepcopy(state["bad_shards"]) if state["bad_shards"] else {}
        return SourceState(state["position"], state["served"], state["credit"], dict(state["bad"]), bad_shards)


@dataclass
class StreamState:
    """Counts how far a stream is. Everything else follows from the configuration."""

    taken: int
    """Good samples given, also of sources that are gone."""
    sources: dict[str, SourceState]

    @property
    def read(self) -> int:
        """Count the samples read of the present sources, bad ones included."""
        return sum(source.position for source in self.sources.values())

    @property
    def bad(self) -> dict[str, int]:
        """Count the bad samples of the present sources, by reason."""
        counts: Counter[str] = Counter()
        for source in self.sources.values():
            counts.update(source.bad)
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        """Return a copy made of JSON types."""
        return {"taken": self.taken, "sources": {name: source.to_json() for name, source in self.sources.items()}}

    @staticmethod
    def from_json(state: Mapping[str, Any]) -> StreamState:
        """Return the state that `to_json` copied."""
        return StreamState(state["taken"], {name: SourceState.from_json(of) for name, of in state["sources"].items()})


def first_state(sources: Collection[str]) -> StreamState:
    """Return the state at the beginning of a stream."""
    return StreamState(0, {name: SourceState() for name in sources})


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks into one, which any number of ranks can load.

    Raises:
        ConfigError: no list of states.
        DataError: states of different runs, or of different steps.
    """
    if not isinstance(states, Sequence) or not states or not all(isinstance(state, dict) for state in states):
        raise ConfigError(
            f"merge_states takes a list with the state of every rank, got {reprlib.repr(states)}",
            where="merge_states",
            fix="merge_states([stream.state_dict()]), with the states of all ranks",
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
        raise _not_together(f"some streams have given {min(taken)} samples, and others {max(taken)}")
    return merged


def check_format(state: Mapping[str, Any]) -> None:
    """Refuse a state that has another format, since another version wrote it."""
    if state.get("format") != STATE_FORMAT:
        raise DataError(
            f"unknown format of the data state: {state.get('format')}, this version reads {STATE_FORMAT}",
            where="data/rank-*.json of the checkpoint",
            why="sources took turns by another rule, so samples would be skipped or repeated without a word",
            fix="resume with the version that saved it, or start a new run from its weights",
        )


def check_order(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse another seed, another number of streams or other windows."""
    different = [key for key in sorted({*saved, *present}) if saved.get(key) != present.get(key)]
    if different:
        raise DataError(
            "the order of samples is another than that of the checkpoint: "
            + ", ".join(f"{key} was {saved.get(key)}, is {present.get(key)}" for key in different),
            where="data state, order",
            why="samples would be skipped or repeated without a word",
            fix="restore the settings of the run, or start a new run from its weights",
        )


def accept_changes(
    state: Mapping[str, Any],
    present: Mapping[str, Any],
    here: Mapping[str, Sequence[Shard]],
    named: Collection[str],
) -> dict[str, str]:
    """Say in words which sources differ from the data state; all of them must have been named, and no others.

    A run that was restarted after its change still names it: names of the last change are accepted when nothing
    differs any more.

    Args:
        state: merged.
        present: fingerprints as they are.
        here: shards as they are, by source.
        named: data.changed_sources.
    """
    differences = changes(state["sources"], present, state["listings"], here)
    past = state["changes"]
    if set(named) == set(differences) or (not differences and past and set(named) == set(past[-1]["sources"])):
        return differences
    wanted = f"data.changed_sources=[{', '.join(differences)}]"
    if not differences:
        before = f"; those of the last change were {', '.join(past[-1]['sources'])}" if past else ""
        raise DataError(
            f"data.changed_sources names {', '.join(sorted(named))}, and no source differs from the checkpoint",
            where="data.changed_sources",
            fix=f"take the names out{before}",
        )
    idle = sorted(set(named) - set(differences))
    raise DataError(
        f"the data changed since the checkpoint: {', '.join(differences)}"
        + (f"; data.changed_sources also names {', '.join(idle)}, unchanged" if idle else ""),
        where="data state, sources",
        why="; ".join(f"{name}: {text}" for name, text in differences.items()),
        fix=f"restore the shards and settings of the run; or, where all of that is meant, set {wanted}",
    )


def carry_over(
    stream: StreamState, changed: Collection[str], saved: Mapping[str, Any], present: Mapping[str, Any]
) -> StreamState:
    """Return a stream's state under the present sources.

    What did not change goes on exactly, and so does a source with other settings. Shards that changed, or are dealt to
    streams by another rule, are read from their beginning. The account of shares begins anew, or a new weight would be
    made up for in one go.
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
        f"the data states do not belong together: {what}",
        where="data/rank-*.json of the checkpoint",
        fix="take the files of one checkpoint",
    )
