"""Callback that writes metrics.jsonl in every run, with one record per line."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from m3i_scale.files import atomic_write, json_line
from m3i_scale.host.machine import processor
from m3i_scale.host.output_dir import METRICS
from m3i_scale.run.callbacks import Callback, Rewind, RunInfo, StepRecord, flatten, write_errors
from m3i_scale.run.software import commit, software_versions

REPLACED = "metrics.replaced.jsonl"
"""File for lines of a killed run that a resumed run repeats, so that plots do not include them."""


class MetricsWriter(Callback):
    """Writer of `output_dir/metrics.jsonl`. Every line is flushed, so that kill -9 loses no written line.

    On a resume at step s, the lines of steps after s move to `metrics.replaced.jsonl`, because those steps are
    repeated. No step occurs twice in the file. The same happens on a rollback.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path = Path()
        self._step = 0

    def on_start(self, run_info: RunInfo) -> None:
        """Truncate the file to the step that the run resumes from, and write a `run` line."""
        self._path = run_info.output_dir / METRICS
        self._step = run_info.start_step
        with self._write_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open_at(run_info.start_step)
        software = software_versions()
        facts: dict[str, Any] = {
            "name": run_info.name,
            "total_steps": run_info.total_steps,
            "world_size": run_info.world_size,
            "flop_per_step": run_info.flop_per_step,
            "peak_tflops": run_info.peak_tflops,
            "peak_source": run_info.peak_source,
            "data_sheet_tflops": run_info.data_sheet_tflops,
            "device": run_info.device,
            "micro_batch_size": run_info.micro_batch_size,
            "deterministic": run_info.config.get("hardware", {}).get("deterministic"),
            "processor": processor(),
            "versions": {"python": software["version"], **software["packages"]},
            "commit": commit(),
        }
        self._write("run", run_info.start_step, {key: value for key, value in facts.items() if value is not None})

    def on_step(self, record: StepRecord) -> None:
        self._write("train", record.step, record.figures)

    def on_stage(self, step: int, stage: dict[str, float]) -> None:
        self._write("stage", step, stage)

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self._write("evaluation", step, flatten(values, "evaluation"))

    def on_warning(self, step: int, warning: dict[str, str]) -> None:
        self._write("warning", step, dict(warning))

    def on_rewind(self, rewind: Rewind) -> None:
        """Move the lines of undone steps to the file of replaced lines, and write a `rewind` line."""
        with self._write_errors():
            self._opened().close()
            self._open_at(rewind.rewound_to)
        self._step = rewind.rewound_to
        self._write("rewind", rewind.rewound_to, asdict(rewind))

    def on_end(self, status: str) -> None:
        if self._file is None:  # the run failed before it began
            return
        try:
            self._write("end", self._step, {"status": status})
        finally:
            file, self._file = self._file, None
            with self._write_errors():
                file.close()  # retries writing the remaining buffer

    def _open_at(self, step: int) -> None:
        """Open the file after the lines of the first `step` steps."""
        cut_back(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def _opened(self) -> TextIO:
        if self._file is None:
            raise RuntimeError("on_start has not been called")
        return self._file

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        file = self._opened()
        self._step = max(self._step, step)
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json_line({"kind": kind, "step": step, "time": time, **values})
        with self._write_errors():
            file.write(line)
            file.flush()

    def _write_errors(self) -> AbstractContextManager[None]:
        return write_errors("metrics", self._path, why="the run would continue unobserved")


def cut_back(path: Path, step: int) -> None:
    """Move lines after `step`, and lines truncated by a kill, from `path` to the file of replaced lines.

    From step 0 the run starts from scratch, so all lines move. The file is replaced atomically. If killed in between,
    the moved lines occur twice in the file of replaced lines, but none is lost.
    """
    if not path.exists():
        return
    kept: list[str] = []
    moved: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            at = _step_of(line)
            if at is None:
                moved.append(json_line({"kind": "torn", "text": line.rstrip("\n")}))
            else:
                (kept if step > 0 and at <= step else moved).append(line)
    if not moved:
        return
    with path.with_name(REPLACED).open("a", encoding="utf-8") as file:
        file.writelines(moved)
        file.flush()
        os.fsync(file.fileno())
    atomic_write(path, "".join(kept))


def _step_of(line: str) -> int | None:
    """Return the step of a complete line, or None for a truncated one (including one that only lacks its line end)."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int and line.endswith("\n") else None
