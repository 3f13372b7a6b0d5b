"""Callbacks that log metrics: metrics.jsonl in every run, and TensorBoard and Weights & Biases, which need an optional
package."""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TextIO

import numpy as np
import yaml

from m3i_scale.config import LogConfig
from m3i_scale.errors import ConfigError
from m3i_scale.files import atomic_write, json_line
from m3i_scale.host.machine import processor
from m3i_scale.host.output_dir import METRICS
from m3i_scale.run.callbacks import Callback, Picture, RunInfo, StepRecord, flatten, write_errors
from m3i_scale.run.software import commit, software_versions
from m3i_scale.text import redact

REPLACED = "metrics.replaced.jsonl"
"""File for lines of a killed run that a resumed run repeats, so that plots do not include them."""
_WANDB_PROJECT = "m3i-scale"
_WANDB_RUN_ID = "wandb-run-id"


def trackers_of(log: LogConfig) -> list[Callback]:
    """Return the callbacks of `log.tensorboard` and `log.wandb`."""
    trackers: list[Callback] = [TensorBoardWriter()] if log.tensorboard else []
    if log.wandb != "off":
        trackers.append(WandbWriter(log.wandb))
    return trackers


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
            **run_info.facts,
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

    def on_rewind(self, step: int, rewind: dict[str, Any]) -> None:
        with self._write_errors():
            self._opened().close()
            self._open_at(step)
        self._step = step
        self._write("rewind", step, rewind)

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


class TensorBoardWriter(Callback):
    """Writer of event files in `output_dir/tensorboard`. A resumed run hides the points that it will repeat."""

    def __init__(self) -> None:
        """Check that the package is installed, long before the first step."""
        _require("tensorboard", extra="tensorboard", setting="log.tensorboard")
        self._writer: Any = None
        self._folder = Path()

    def on_start(self, run_info: RunInfo) -> None:
        self._folder = run_info.output_dir / "tensorboard"
        self._writer = self._open(run_info.start_step)
        config = yaml.safe_dump(redact(run_info.config, names=True), sort_keys=False)
        self._writer.add_text("run", f"```yaml\n{config}```", run_info.start_step)

    def on_step(self, record: StepRecord) -> None:
        self._add(record.step, record.figures)

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self._add(step, flatten(values, "evaluation"))

    def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            pixels_HWC = np.asarray(picture.image.convert("RGB"))
            self._writer.add_image(f"pictures/{picture.name}", pixels_HWC, step, dataformats="HWC")
        self._writer.flush()

    def on_rewind(self, step: int, rewind: dict[str, Any]) -> None:
        self.on_end("rewound")
        self._writer = self._open(step)

    def on_end(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=step + 1 if step else 0)

    def _add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandbWriter(Callback):
    """Weights & Biases logger for metrics, pictures and the config. It sends no console output, source code, command
    line or environment.

    A resumed run keeps its run id, which is stored in `output_dir/wandb-run-id`. Entity, project and server come from
    the package's variables (`WANDB_ENTITY`, `WANDB_PROJECT`, `WANDB_BASE_URL`), the key from `wandb login`.
    """

    def __init__(self, mode: Literal["offline", "online"]) -> None:
        """Check that the package is installed, long before the first step."""
        self._wandb: Any = _require("wandb", extra="wandb", setting="log.wandb")
        self._mode = mode
        self._run: Any = None

    def on_start(self, run_info: RunInfo) -> None:
        settings = self._wandb.Settings(
            mode=self._mode,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            silent=True,
        )
        try:
            # A prompt for the key on a terminal would leave the other ranks waiting.
            if self._mode == "online" and not self._wandb.login(prompt=False, verify=False):
                raise self._wandb_error("no API key")
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", _WANDB_PROJECT),
                name=run_info.name,
                id=_run_id(run_info.output_dir),
                resume="allow" if self._mode == "online" else None,
                dir=str(run_info.output_dir),
                config=redact(run_info.config, names=True),
                settings=settings,
            )
        except self._wandb.Error as error:
            raise self._wandb_error(str(error)) from None
        # The package's step cannot decrease, but a resumed run's does, so our step is the x axis.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def on_step(self, record: StepRecord) -> None:
        self._run.log({"step": record.step, **record.figures})

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **flatten(values, "evaluation")})

    def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        images = {
            f"pictures/{picture.name}": self._wandb.Image(picture.image, caption=picture.title) for picture in pictures
        }
        self._run.log({"step": step, **images})

    def on_end(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "finished" else 1)
            self._run = None

    def _wandb_error(self, reason: str) -> ConfigError:
        return ConfigError(
            f"Weights & Biases cannot be used: {reason}",
            where="log.wandb",
            fix="run `wandb login` or set WANDB_API_KEY; or set log.wandb=offline and run `wandb sync` later",
        )


def _run_id(output_dir: Path) -> str:
    """Return the run id of this output directory; create it on first use."""
    path = output_dir / _WANDB_RUN_ID
    if not path.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _require(package: str, *, extra: str, setting: str) -> ModuleType:
    """Import an optional package, or raise an error that names its `extra` and the config key that requires it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package '{error.name}' is not installed",
            where=setting,
            fix=f"run `pip install -e '.[{extra}]'`, or switch off {setting}",
        ) from None
