"""Reader of a run's files during or after training: settings, metrics, events, checkpoints, corrupt samples, ranks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.checkpoint_tools.documents import list_checkpoints
from m3i_scale.config import read_yaml
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import require_folder
from m3i_scale.host.output_dir import METRICS, QUARANTINE, RUN_FILE, is_run_folder
from m3i_scale.host.rank_record import running_ranks
from m3i_scale.report.metrics_file import MetricsFile, unix_s
from m3i_scale.upgrade import upgrade_config

Record = dict[str, Any]
"""A line of metrics.jsonl."""
ONLINE_SCORES = {
    "knn": "kNN",
    "linear": "linear probe",
    "zero_shot": "zero-shot",
    "image_to_text_r1": "image → text R@1",
    "text_to_image_r1": "text → image R@1",
}
"""Metrics of the online evaluation from 0 to 1: last part of the metric name, and its label."""
SCORES = {"top_1": "top-1", "miou": "mIoU", "box_ap": "box AP", "mask_ap": "mask AP"} | ONLINE_SCORES
"""The same for all evaluations during training."""
_RECENT = 20
"""Number of records for the mean step time, which determines the time left."""
_LONGEST_LINE = 1 << 20
_LOG = re.compile(r"(.+)-rank(\d+)\.log")


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run's folder. Metrics are aligned with `steps`; docs/reference/metrics.md documents them."""

    folder: Path
    name: str
    settings: dict[str, Any]
    """The config file, as resolved at the last start; {} if it cannot be read."""
    settings_error: str | None
    """Why the config file cannot be read."""
    starts: list[Record]
    """The `run` lines: the first start and every resume, in order."""
    warnings: list[Record]
    rewinds: list[Record]
    stages: list[Record]
    evaluations: list[Record]
    """Their metrics are numbers, including NaN and infinities."""
    ends: list[Record]
    steps: NDArray[np.int64]
    """Logged steps, of shape N, increasing."""
    times_s: NDArray[np.float64]
    """Log times in Unix seconds, of shape N."""
    figures: dict[str, NDArray[np.float64]]
    """By the names in metrics.jsonl, each of shape N; NaN for missing values."""
    unreadable: int
    """Number of lines that are truncated, no JSON, too long, of wrong types, or not in step order."""

    @property
    def total_steps(self) -> int | None:
        """Return the configured number of steps; None if unknown."""
        if self.starts:
            return int(self.starts[-1]["total_steps"])
        optim = self.settings.get("optim")
        steps = optim.get("steps") if isinstance(optim, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def step(self) -> int:
        """Return the last known step: logged, resumed from, or ended at."""
        marks = [line["step"] for line in (*self.starts[-1:], *self.ends[-1:], *self.rewinds[-1:])]
        return max([*marks, *map(int, self.steps[-1:])], default=0)

    @property
    def scores(self) -> dict[str, float]:
        """Return the newest scores by their names in `SCORES`: of several heads the best one, of the online evaluation
        that of the EMA teacher, or else of the student."""
        newest: Record = {}
        for line in self.evaluations:
            newest |= line
        found: dict[str, float] = {}
        for key, words in SCORES.items():
            of_encoders = {
                f"{words} ({encoder})": newest[f"evaluation/{encoder}/{key}"]
                for encoder in ("ema", "student")
                if key in ONLINE_SCORES and f"evaluation/{encoder}/{key}" in newest
            }
            if of_encoders:
                found |= [*of_encoders.items()][:1]
                continue
            values = [value for name, value in newest.items() if name.rpartition("/")[2] == key]
            values = [value for value in values if not math.isnan(value)]
            found |= {words: max(values)} if values else {}
        return found

    @property
    def left_s(self) -> float | None:
        """Return the seconds until the last step, estimated from recent records. None if no record has a step time, the
        run has ended, or no steps are left."""
        recent_s = self.figures.get("time/step", np.empty(0))[-_RECENT:]
        recent_s = recent_s[np.isfinite(recent_s)]
        if self.status is not None or self.total_steps is None or not recent_s.size or self.step >= self.total_steps:
            return None
        return float(recent_s.mean()) * (self.total_steps - self.step)

    @property
    def status(self) -> str | None:
        """Return the status of the last start (`finished`, `preempted`, `failed`); None if it has not recorded one."""
        begun_s, ended_s = (max(map(unix_s, lines), default=0.0) for lines in (self.starts, self.ends))
        return str(self.ends[-1]["status"]) if self.ends and ended_s >= begun_s else None


class RunReader:
    """Incremental reader of a run's output_dir; nothing is written. `wanted` selects metrics by name. Raises
    ConfigError if the folder has no run, or cannot be read."""

    def __init__(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        try:
            has_begun = is_run_folder(folder) or (folder / METRICS).is_file()
        except OSError as error:
            raise ConfigError(
                f"the folder cannot be read: {error.strerror}",
                where=str(folder.absolute()),
                fix="make the folder readable",
            ) from None
        if not has_begun:
            require_folder(folder)
            raise ConfigError(
                "no run has started in this folder", where=str(folder.absolute()), fix="use the output_dir of a run"
            )
        self._folder = folder
        self._metrics = MetricsFile(folder / METRICS, wanted)

    def read(self) -> RunFiles:
        """Return the current contents of the folder."""
        try:
            self._metrics.read_new_lines()
        except OSError as error:
            raise ConfigError(
                f"the metrics cannot be read: {error.strerror}",
                where=str(self._folder / METRICS),
                fix="make the file readable",
            ) from None
        run_file = self._folder / RUN_FILE
        settings: dict[str, Any] = {}
        settings_error = None
        try:
            settings = upgrade_config(read_yaml(run_file)) if run_file.is_file() else {}
        except ConfigError as error:
            settings_error = error.what
        lines, logged = self._metrics.records, self._metrics.steps()
        figures = logged.figures
        if not any(name.startswith("mi/") for name in figures):  # for a task it would be the sum of no terms
            figures = {name: values for name, values in figures.items() if name != "information"}
        started = [start["name"] for start in lines["run"][-1:]]
        names = [settings.get("name"), *started, self._folder.absolute().name]
        return RunFiles(
            folder=self._folder,
            name=next(name for name in names if isinstance(name, str)),
            settings=settings,
            settings_error=settings_error,
            starts=[*lines["run"]],
            warnings=[*lines["warning"]],
            rewinds=[*lines["rewind"]],
            stages=[*lines["stage"]],
            evaluations=[*lines["evaluation"]],
            ends=[*lines["end"]],
            steps=logged.steps,
            times_s=logged.times_s,
            figures=figures,
            unreadable=self._metrics.unreadable,
        )


def read_run(folder: Path) -> RunFiles:
    """Return the contents of a run's output_dir. An incomplete last line, as during training, is ignored."""
    return RunReader(folder).read()


def checkpoints_of(run: RunFiles) -> dict[str, Any]:
    """Return the document of `checkpoint list`: checkpoints with step, bytes, age, validity and retention rules."""
    facts = ("kind", "step", "time")
    metrics = {
        line["step"]: {name: value for name, value in line.items() if name not in facts} for line in run.evaluations
    }
    root = run.folder / "checkpoints"
    try:
        return list_checkpoints(root, metrics)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints cannot be read: {error.strerror}", where=str(root), fix="make the folder readable"
        ) from None


@dataclass
class Quarantined:
    """Corrupt samples with the same reason."""

    example: dict[str, Any]
    """The first one: `source`, `url`, `key` ("*": the full shard), `offset`, `reason`, `detail`."""
    count: int = 0
    """Number of lines, each for a sample or a full shard."""


def quarantine_of(folder: Path) -> dict[str, Quarantined]:
    """Return the corrupt samples of a run by reason; {} if there are none."""
    found: dict[str, Quarantined] = {}
    for entry in _objects(folder / QUARANTINE):
        texts = [entry.get(name) for name in ("source", "url", "key", "reason", "detail")]
        if all(isinstance(text, str) for text in texts) and type(entry.get("offset")) is int:
            found.setdefault(entry["reason"], Quarantined(entry)).count += 1
    return found


@dataclass(frozen=True)
class RankSign:
    """Last sign of life of a rank."""

    host: str
    rank: int
    heard_s: float
    """Unix seconds of its last log line, or of its start."""


def ranks_of(folder: Path) -> list[RankSign]:
    """Return the ranks of a run by host and rank, from the source with the newest sign: logs of the elastic launcher,
    or records of ranks that other launchers started and that have not ended."""
    printed, begun = [*_printed(folder)], [RankSign(*sign) for sign in running_ranks(folder)]
    newest = max(printed, begun, key=lambda signs: max((sign.heard_s for sign in signs), default=0.0))
    return sorted(newest, key=lambda sign: (sign.host, sign.rank))


def _printed(folder: Path) -> Iterator[RankSign]:
    attempts = [path for path in (folder / "logs").glob("*") if path.name.isdecimal()]
    newest = max(attempts, key=lambda path: int(path.name), default=folder / "logs")
    for path in newest.glob("*.log"):
        name = _LOG.fullmatch(path.name)
        if name is not None:
            yield RankSign(name[1], int(name[2]), path.stat().st_mtime)


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, without truncated or invalid lines."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                with suppress(ValueError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"a file of the run cannot be read: {error.strerror}", where=str(path), fix="make the file readable"
        ) from None
