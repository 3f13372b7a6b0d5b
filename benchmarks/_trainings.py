"""Trainings of a benchmark. Each has its own folder, is evaluated once, and resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from _common import say

from m3i_scale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Training(ABC):
    """One training with one seed, and its evaluation."""

    name: str
    seed: int
    output: Path
    """Folder of all results. Each result has a subfolder named by the hash of its settings, code and data."""

    code: ClassVar[tuple[str, ...]] = ("m3i_scale", "ds_configs", "recipes", "benchmarks/_trainings.py")
    """Files and folders that a result depends on; a change in them trains anew."""

    @abstractmethod
    def values(self, folder: Path) -> dict[str, Any]:
        """Return the whole run file; its output lies in `folder`."""

    @abstractmethod
    def depends(self) -> tuple[dict[str, Any], list[Any]]:
        """Return the run file without paths, and what else the result depends on beside code, torch and machine."""

    @abstractmethod
    def measured(self, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Evaluate the trained run in `folder`."""

    @property
    def folder(self) -> Path:
        """Return where its result lies, and the export that was measured last."""
        return self._folder(self.key())

    def _folder(self, key: str) -> Path:
        return self.output / f"{self.name.replace(' ', '-')}-{self.seed}-{key[:12]}"

    def key(self) -> str:
        """Return a hash of what the result depends on: settings, data, code, torch, and what it ran on."""
        values, others = self.depends()
        machine = [torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"]
        digest = hashlib.sha256(json.dumps([values, *others, machine], sort_keys=True).encode())
        for name in self.code:
            path = ROOT / name
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in (file for file in files if file.suffix in (".py", ".json", ".yaml")):
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def result(self, environment: dict[str, str]) -> dict[str, Any]:
        """Train and measure, or return what an earlier call with the same settings, data and code found.

        A training that was cut off goes on from its newest checkpoint.
        """
        key = self.key()
        folder = self._folder(key)
        path = folder / "result.json"
        if path.is_file():
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return known
        folder.mkdir(parents=True, exist_ok=True)
        values = self.values(folder)
        run_file, trained = folder / "run.yaml", folder / "trained"
        run_file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        if not trained.exists():
            self.say(f"{values['optim']['steps']} steps")
            tool(["train", str(run_file)], folder / "train.log", environment)
            trained.touch()
        found = self.measured(folder, environment)
        if self.key() != key:
            raise UserError(
                f"the code changed while '{self.name}' was measured",
                where=str(folder),
                fix="give the same command again: it takes the code as it is now",
            )
        write(path, found)
        for checkpoint in (folder / "run" / "checkpoints").glob("step-*"):
            shutil.rmtree(checkpoint)
        return found

    def say(self, text: str) -> None:
        """Print the progress of this training."""
        say(f"{self.name}, seed {self.seed}: {text}")


def train_all(
    trainings: Sequence[Training], workers: int, work: Callable[[Any, dict[str, str]], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return the results of all, some at a time. A worker has its share of the cores, and a GPU of its own where there
    are some.

    Args:
        trainings: in the order in which they begin.
        workers: trainings at a time; 0: one a core, or one a GPU.
        work: given a training and its environment; default: its `result`.
    """
    workers = workers or torch.cuda.device_count() or os.cpu_count() or 1
    threads = max(1, (os.cpu_count() or 1) // workers)
    count, inherited = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = inherited.split(",")[:count] if inherited else [str(number) for number in range(count)]
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(workers):
        places.put(gpus[number % len(gpus)] if gpus else "")
    say(f"{len(trainings)} trainings, {workers} at a time; what is done is not done again")

    def at_a_place(one: Training) -> dict[str, Any]:
        place = places.get()
        try:
            environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
            environment |= {"CUDA_VISIBLE_DEVICES": place} if gpus else {}
            return one.result(environment) if work is None else work(one, environment)
        finally:
            places.put(place)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(at_a_place, one) for one in trainings]
        try:
            for future in as_completed(futures):
                future.result()  # the first failure ends all
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
    return [future.result() for future in futures]


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
    partial.rename(path)


_running: set[subprocess.Popen[str]] = set()


def tool(
    arguments: list[str], log: Path, environment: dict[str, str], program: tuple[str, ...] = ("-m", "m3i_scale")
) -> Any:
    """Run one `m3i-scale` command in a process of its own; return its document, where it prints one.

    Args:
        program: another module or script for Python to run.

    Raises:
        UserError: it failed.
    """
    as_json = [] if arguments[0] == "train" else ["--json"]
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, *program, *arguments, *as_json],
            stdout=subprocess.PIPE if as_json else stream,
            stderr=stream,
            env=os.environ | environment,
            text=True,
        )
        _running.add(process)
        printed, _ = process.communicate()
        _running.discard(process)
    if process.returncode:
        name = "m3i-scale" if program[-1] == "m3i_scale" else Path(program[-1]).name
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise UserError(
            f"`{name} {arguments[0]}` ended with exit code {process.returncode}",
            where=str(log),
            why=tail,
            fix="fix the cause and run the same command again; finished trainings are kept",
        )
    return json.loads(printed) if as_json else {}


def stop_all() -> None:
    """End the commands that run now: their trainings save and can go on."""
    for process in list(_running):
        process.terminate()
