"""Reader of metrics.jsonl: a million lines in seconds, then incremental."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from m3i_scale.upgrade import upgrade_kind, upgrade_metric, upgrade_metrics

BLOCK_BYTES = 1 << 24
"""Bytes per read. Longer lines are invalid, because no run writes them."""
_STEP_LINE = b'{"kind": "train", '
"""Prefix of logged training steps, which are nearly all lines."""
_FACTS = ("kind", "step", "time")
_NOT_FINITE = ("nan", "inf", "-inf")
_FIELDS: dict[str, dict[str, type]] = {
    "run": {"name": str, "total_steps": int, "world_size": int},
    "warning": {"group": str, "what": str, "why": str, "fix": str},
    "rewind": {"rewound_from": int, "rewound_to": int},
    "stage": {"image_size": int, "micro_batch_size": int},
    "end": {"status": str},
}
"""Additional required fields by kind, besides `kind`, `step` and `time`, with types. Integers are non-negative."""


@dataclass(frozen=True)
class Steps:
    """Logged steps, in order."""

    steps: NDArray[np.int64]
    """Of shape N."""
    times_s: NDArray[np.float64]
    """Log times in Unix seconds, of shape N."""
    figures: dict[str, NDArray[np.float64]]
    """Metrics by name, each of shape N; NaN for missing values."""


class MetricsFile:
    """Incremental reader of a metrics file, which may be missing or still written to. `wanted` selects metrics."""

    def __init__(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self._path, self._wanted = path, wanted
        self._begin(None)

    def _begin(self, identity: tuple[int, int] | None) -> None:
        self._identity = identity
        self._read_bytes = 0
        self._last_step = -1
        self._names: dict[str, None] = {}
        self._parts: list[Steps] = []
        self.records: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        """Lines other than logged steps, by kind."""
        self.unreadable = 0
        """Number of lines that are truncated, no JSON, too long, of wrong types, or not in step order."""

    def read_new_lines(self) -> None:
        """Read new lines. If the file was truncated, as by a resumed run, read it from the beginning."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._read_bytes:
                    self._begin(identity)
                for lines in _ahead(self._new_lines(file)):
                    self._take(lines)
        except FileNotFoundError:
            self._begin(None)

    def steps(self) -> Steps:
        """Return all logged steps read so far."""
        if len(self._parts) != 1:
            self._parts = [_joined(self._parts)]
        return self._parts[0]

    def _new_lines(self, file: BinaryIO) -> Iterator[list[bytes]]:
        """Yield complete lines, some megabytes at a time. An incomplete last line is read next time."""
        file.seek(self._read_bytes)
        while block := file.read(BLOCK_BYTES):
            *lines, rest = block.split(b"\n")
            if lines:
                yield lines
            elif len(block) < BLOCK_BYTES:
                return
            else:
                rest = b""  # a line that is too long is skipped; its end counts as unreadable
            self._read_bytes += len(block) - len(rest)
            file.seek(self._read_bytes)

    def _take(self, lines: list[bytes]) -> None:
        logged = [line for line in lines if line.startswith(_STEP_LINE)]
        records = [_parsed(line) for line in lines if not line.startswith(_STEP_LINE)]
        unusual = any(record is not None and record["kind"] == "train" for record in records)
        steps = None if unusual else self._by_columns(logged)
        if steps is None:
            records = [_parsed(line) for line in lines]
            steps = self._by_rows([record for record in records if record is not None and record["kind"] == "train"])
        for record in records:
            if record is None:
                self.unreadable += 1
            elif record["kind"] == "evaluation":
                self._add_evaluation({name: record[name] for name in _FACTS} | numbers_of(record))
            elif record["kind"] != "train":
                self.records[record["kind"]].append(record)
        self._add(steps)

    def _add_evaluation(self, record: dict[str, Any]) -> None:
        """Append an evaluation, or join it with another one of the same step: the losses and the online metrics are
        separate lines."""
        evaluations = self.records["evaluation"]
        if evaluations and evaluations[-1]["step"] == record["step"]:
            evaluations[-1] |= record
        else:
            evaluations.append(record)

    def _add(self, new: Steps) -> None:
        """Append the steps that are later than all previous ones, because a run writes no others."""
        new = replace(new, figures=_upgraded(new.figures))
        highest = np.maximum.accumulate(np.concatenate([[self._last_step], new.steps]))
        later = new.steps > highest[:-1]
        self._last_step = int(highest[-1])
        if not later.all():
            self.unreadable += int((~later).sum())
            figures = {name: values[later] for name, values in new.figures.items()}
            new = Steps(new.steps[later], new.times_s[later], figures)
        if len(new.steps):
            self._parts.append(new)

    def _by_columns(self, lines: Sequence[bytes]) -> Steps | None:
        """Parse steps with the fast path; None for unusual lines, such as lines with a new metric."""
        text = b"\n".join(lines)
        table = self._table(text)
        if table is None and (without := text.replace(b': "nan"', b": null")) != text:
            table = self._table(without)  # a step without this metric gives NaN as well
        if table is None or len(table) != len(lines):
            return None
        steps, times = table["step"], table["time"]
        if steps.null_count or times.null_count:
            return None
        figures = {name: table[name].to_numpy() for name in self._names if self._wanted(upgrade_metric(name))}
        return Steps(steps.to_numpy(), times.cast(pa.int64()).to_numpy() / 1e6, figures)

    def _table(self, text: bytes) -> pa.Table | None:
        facts = [("kind", pa.string()), ("step", pa.int64()), ("time", pa.timestamp("us", "UTC"))]
        schema = pa.schema([*facts, *((name, pa.float64()) for name in self._names)])
        options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
        try:
            return pa.json.read_json(pa.BufferReader(text), parse_options=options)
        except pa.ArrowException:
            return None

    def _by_rows(self, records: Sequence[dict[str, Any]]) -> Steps:
        """Return the steps of parsed lines, and register the names of their metrics."""
        count = len(records)
        figures: dict[str, NDArray[np.float64]] = {}
        for row, record in enumerate(records):
            for name, value in numbers_of(record).items():
                self._names[name] = None
                if self._wanted(upgrade_metric(name)):
                    if name not in figures:
                        figures[name] = np.full(count, np.nan)
                    figures[name][row] = value
        steps = np.fromiter((record["step"] for record in records), np.int64, count)
        return Steps(steps, np.fromiter((unix_s(record) for record in records), np.float64, count), figures)


def _upgraded(figures: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return metrics under their current names. A run that was resumed after the upgrade has lines of both formats."""
    old = {name: values for name, values in figures.items() if upgrade_metric(name) != name}
    current = {name: values for name, values in figures.items() if name not in old}
    for name, values in upgrade_metrics(old).items():
        current[name] = np.where(np.isnan(current[name]), values, current[name]) if name in current else values
    return current


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a line, including "nan", "inf" and "-inf"."""
    return {
        name: float(value if type(value) is float else str(value))  # integers beyond the float range become infinity
        for name, value in record.items()
        if name not in _FACTS and (type(value) in (int, float) or value in _NOT_FINITE)
    }


def unix_s(record: dict[str, Any]) -> float:
    """Return the time of a line in Unix seconds; without a time zone it is UTC."""
    moment = datetime.fromisoformat(record["time"])
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        unix_s(record)
        numbers_of(record)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    kind = upgrade_kind(record.get("kind"))
    if not isinstance(kind, str):
        return None
    record["kind"] = kind
    fields = {"step": int, **_FIELDS.get(kind, {})}
    return record if all(_is_of(of_field, record.get(name)) for name, of_field in fields.items()) else None


def _is_of(kind: type, value: Any) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 63
    return isinstance(value, kind)


def _ahead(blocks: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """Yield blocks, prefetching the next one in a thread."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def _joined(parts: list[Steps]) -> Steps:
    """Concatenate parts. They are emptied on the way, because memory has no room for two copies."""
    steps = np.concatenate([np.empty(0, np.int64), *(part.steps for part in parts)])
    times_s = np.concatenate([np.empty(0), *(part.times_s for part in parts)])
    figures = {}
    for name in dict.fromkeys(name for part in parts for name in part.figures):
        values = (
            part.figures.pop(name) if name in part.figures else np.full(len(part.steps), np.nan) for part in parts
        )
        figures[name] = np.concatenate([*values])
    return Steps(steps, times_s, figures)
