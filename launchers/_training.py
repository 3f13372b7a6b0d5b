"""Train under the `deepspeed` launcher, kill the ranks half-way, resume with the same command, compare."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.checkpoint.layout import MANIFEST, read_meta
from m3i_scale.config import RunConfig
from m3i_scale.errors import UserError

POLL_S = 0.05


@dataclass(frozen=True)
class TrainingPlan:
    """What is launched, on how many ranks."""

    run_file: str
    overrides: list[str]
    run: RunConfig
    ranks: int

    def command(self, port: int) -> list[str]:
        """The command line of a launch; both launches differ in the port alone."""
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        launch = [
            launcher,
            "--num_accelerators",
            str(self.ranks),
            "--master_port",
            str(port),
            "--no_local_rank",
            "--quiet",
        ]
        return [*launch, "--module", "m3i_scale", "train", self.run_file, *self.overrides]


class Training:
    """The two launches of the quickstart."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan, self.run = plan, plan.run
        self.metrics = plan.run.output_dir / "metrics.jsonl"
        self.replaced = plan.run.output_dir / "metrics.replaced.jsonl"

    def until_killed(self) -> list[str]:
        """Train until some steps after the checkpoint half-way are done, then SIGKILL launcher and ranks.

        Raises:
            UserError: the training ended by itself, or there is no room for a kill between half-way and the end.
        """
        middle = half_way(self.run)
        with self._launched() as process:
            while not self._passed(middle):
                if process.poll() is not None:
                    raise UserError(
                        f"the training ended by itself with exit code {process.returncode} before it could be killed",
                        where=str(self.run.output_dir),
                        fix=f"see above; where it had been finished before, remove {self.run.output_dir}",
                    )
                time.sleep(POLL_S)
            victims = kill_all(process)
        last = train_lines(self.metrics)[-1]["step"]
        return [
            f"{victims} processes killed after step {last} of {self.run.optim.steps}",
            f"checkpoint of step {middle}",
        ]

    def to_the_end(self) -> list[str]:
        """The same command again; it must go on from the newest checkpoint and repeat the lost steps exactly.

        Raises:
            UserError: the training failed, started from somewhere else, or came to other losses.
        """
        newest = read_meta(self.run.output_dir / "checkpoints" / (self._latest() or ""))["step"]
        with self._launched() as process:
            code = process.wait()
        if code:
            raise UserError(
                f"the resumed training ended with exit code {code}", where=str(self.metrics), why="see above"
            )
        started = [line["step"] for line in read_lines(self.metrics) if line["kind"] == "run"][-1]
        if started != newest:
            raise UserError(f"the training started at step {started}, its checkpoint is of step {newest}")
        lines = train_lines(self.metrics)
        figures = [f"from step {started} to {lines[-1]['step']}, loss {lines[0]['loss']:.3f} → {lines[-1]['loss']:.3f}"]
        figures.append(self._repeated(started))
        throughput = sorted(line["throughput/samples_per_s"] for line in lines)[len(lines) // 2]
        return [*figures, f"{throughput:.0f} images/s (median)"]

    def _repeated(self, started: int) -> str:
        """How the steps that the kill lost compare with their repetition."""
        lost = {line["step"]: line["loss"] for line in train_lines(self.replaced) if line["step"] > started}
        again = {line["step"]: line["loss"] for line in train_lines(self.metrics)}
        # A line is a mean over log.every_steps; the first one is whole only where the checkpoint lies on that grid.
        steps = sorted(lost) if started % self.run.log.every_steps == 0 else sorted(lost)[1:]
        different = [step for step in steps if lost[step] != again.get(step)]
        if not steps:
            return "no complete record to compare with"
        if different and self.run.deepspeed.startswith("zero3_cpu"):
            step = different[0]
            raise UserError(
                f"step {step} was lost with loss {lost[step]!r} and repeated with {again.get(step)!r}",
                where=str(self.replaced),
                why="a resumed run must repeat the lost steps bit-identically",
            )
        return f"{len(steps)} lost records repeated: {'different' if different else 'bit-identical'}"

    def _passed(self, middle: int) -> bool:
        name = self._latest()
        committed = name is not None and int(name.rpartition("-")[2]) >= middle
        return committed and any(line["step"] > middle for line in train_lines(self.metrics))

    def _latest(self) -> str | None:
        latest = self.run.output_dir / "checkpoints" / "latest"
        name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
        return name if name and (latest.parent / name / MANIFEST).is_file() else None

    @contextmanager
    def _launched(self) -> Iterator[subprocess.Popen[bytes]]:
        """A training in a process group of its own; whatever happens, nothing of it is left afterwards."""
        threads = max((os.cpu_count() or 1) // self.plan.ranks, 1)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(self.plan.command(get_free_port()), env=environment, start_new_session=True)
        try:
            yield process
        finally:
            kill_all(process)


def half_way(run: RunConfig) -> int:
    """The step of the first checkpoint at or after the middle.

    Raises:
        UserError: no record is logged between that checkpoint and the end, so there is no moment for a kill.
    """
    every, steps, log = run.checkpoint.every_steps, run.optim.steps, run.log.every_steps
    middle = -(-steps // 2 // every) * every or every
    if (middle // log + 1) * log >= steps:
        raise UserError(
            f"nothing is logged between the checkpoint half-way (step {middle}) and the end (step {steps})",
            fix="smaller checkpoint.every_steps and log.every_steps, or more optim.steps",
        )
    return middle


def kill_all(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL the launcher and everything below it, and wait until all are gone; returns how many there were."""
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()  # before psutil, which would take its exit status away
    psutil.wait_procs(family)
    return len(family)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file; [] where there is none."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def train_lines(path: Path) -> list[dict[str, Any]]:
    """Records of training steps."""
    return [line for line in read_lines(path) if line["kind"] == "train"]
