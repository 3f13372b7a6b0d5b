"""Compare an export with random weights of its architecture: segmentation, classification, few-shot, detection.

Every training runs `m3i-scale finetune` with a built-in protocol that is short enough for two cores. The tasks are
linear segmentation on a frozen backbone, and fine-tuning of all weights: on all labels, on five images per class, and
with a small Mask R-CNN.
Every seed has a different image order, initialization of the head, few-shot subset and random backbone. Results are
means with 95% intervals over seeds.

    python benchmarks/downstream.py --json [--export FOLDER …] [--only segmentation …] [--data FOLDER]

Results are stored in --output, and finished trainings are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from _common import emit, emoji_shards, machine, say, scene_shards
from _intervals import difference_interval, mean_interval
from _trainings import stop_all, tool
from transformers import AutoConfig, AutoModel

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError, DataError, UserError, did_you_mean
from m3i_scale.tasks.base import Task

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = Path("runs/quickstart/export")
CODE = ("m3i_scale", "protocols", "ds_configs", "benchmarks/downstream.py")
QUIET = ("log.progress=false", "evaluation.batches=1")
"""Only the results of the last step are used, so evaluations during training are short."""


@dataclass(frozen=True)
class DownstreamTask:
    """A task and its training."""

    name: str
    command: tuple[str, ...]
    metrics: tuple[str, ...]
    """Names in the result of `evaluate`, the main one first."""
    overrides: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Return the command of `finetune`."""
        return self.command[0]


TASKS = (
    DownstreamTask("segmentation", ("segmentation", "--protocol", "segment", "--epochs", "1"), ("mIoU",), ()),
    DownstreamTask("classification", ("classification", "--epochs", "1"), ("top-1",), ("optim.lr=1.0e-3",)),
    DownstreamTask(
        "classification_5_per_class",
        ("classification", "--per-class", "5", "--epochs", "40"),
        ("top-1",),
        ("optim.lr=1.0e-3",),
    ),
    DownstreamTask(
        "detection",
        ("detection", "--protocol", "detect", "--epochs", "2"),
        ("box_AP", "mask_AP"),
        (
            "data.augment.scale_jitter=[0.8,1.25]",  # at half the size, an object would be less than two patches wide
            "task.head.mask_side=7",
            "task.head.regions.per_image=32",
            "task.head.score_above=0.01",  # scores are low after two epochs
        ),
    ),
)


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    exports: list[Path] = typer.Option(
        [], "--export", help="Export, or several that the seeds use in turn. Default: the export of the quickstart."
    ),
    only: list[str] = typer.Option([], help="Only these tasks; `classification` selects both of its tasks."),
    data: Path = typer.Option(
        None, help="Folder with train and val shards; default: the emoji set; for detection, scenes of emoji."
    ),
    seeds: int = typer.Option(3, min=2, help="Trainings per task and initialization."),
    output: Path = typer.Option(Path("runs/downstream"), help="Keeps every training's result."),
    workers: int = typer.Option(0, min=0, help="Trainings at a time; 0: one per core, or one per GPU."),
) -> None:
    """Print {task: {export, random: {seeds, mean, low, high}, difference: {mean, low, high}, seconds}}, machine."""
    try:
        folders = [_checked(folder) for folder in exports] or [_quickstart()]
        tasks = {task: data_of(task, data) for task in chosen(only)}
        document = {task.name: compare(task, folders, shards, seeds, output, workers) for task, shards in tasks.items()}
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    emit(document | {"exports": [str(export) for export in folders], "machine": machine()})


def _checked(folder: Path) -> Path:
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "not a model that transformers can load", where=f"--export {folder}", why=str(error).splitlines()[0]
        ) from None
    return folder.resolve()


def _quickstart() -> Path:
    if not QUICKSTART.is_dir():
        raise ConfigError(
            "the quickstart has not been run here",
            where=str(QUICKSTART),
            fix="bash launchers/quickstart.sh, or --export /data/export",
        )
    return _checked(QUICKSTART)


def chosen(only: list[str]) -> list[DownstreamTask]:
    """Return the tasks with these names or kinds, or all tasks if `only` is empty.

    Raises:
        ConfigError: there is no such task.
    """
    groups = sorted({task.kind for task in TASKS})
    known = [*dict.fromkeys([*groups, *(task.name for task in TASKS)])]
    for name in only:
        if name not in known:
            raise ConfigError(f"no task '{name}' in this comparison", fix=did_you_mean(name, known))
    return [task for task in TASKS if not only or task.name in only or task.kind in only]


def data_of(task: DownstreamTask, given: Path | None) -> Path:
    """Return the shards of a task: `given`, or the built-in ones.

    Raises:
        DataError: `given` does not have the labels of the task.
    """
    if given is None:
        return (scene_shards() if task.kind == "detection" else emoji_shards()).resolve()
    labels = given / "train" / Task.class_of(task.kind).labels_file
    if not labels.is_file():
        raise DataError(f"no data for {task.name}", where=str(labels), fix="other data, or other tasks")
    return given.resolve()


def compare(
    task: DownstreamTask, exports: list[Path], data: Path, seeds: int, output: Path, workers: int
) -> dict[str, Any]:
    """Train from the exports and from random weights, in parallel, and return means, intervals and difference."""
    jobs = [
        (side, seed, start)
        for seed in range(seeds)
        for side, start in (
            ("export", exports[seed % len(exports)]),
            ("random", random_weights(exports[seed % len(exports)], seed, output)),
        )
    ]
    count = torch.cuda.device_count()
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    workers = workers or count or os.cpu_count() or 1
    for number in range(workers):
        places.put(number % max(count, 1))
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), "TOKENIZERS_PARALLELISM": "false"}

    def work(job: tuple[str, int, Path]) -> dict[str, Any]:
        side, seed, start = job
        place = places.get()
        try:
            gpu = {"CUDA_VISIBLE_DEVICES": str(place)} if count else {}
            document = result(task, start, data, seed, output, environment | gpu)
        finally:
            places.put(place)
        say(f"{task.name}, {side}, seed {seed}: {percent(document, task.metrics[0]):.2f} %")
        return document

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            results = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
    metrics = {}
    for name in task.metrics:
        export, random = (
            [percent(document, name) for (side, *_), document in zip(jobs, results, strict=True) if side == wanted]
            for wanted in ("export", "random")
        )
        metrics[name] = {
            "export": mean_interval(export),
            "random": mean_interval(random),
            "difference": difference_interval(export, random),
        }
    main_metric, *others = task.metrics
    return metrics[main_metric] | {
        "metric": f"{main_metric}, percent",
        "other_metrics": {name: metrics[name] for name in others},
        "command": ["m3i-scale", "finetune", *task.command, *task.overrides],
        "data": str(data),
        "seconds": round(sum(document["seconds"] for document in results) / workers),  # includes earlier calls
    }


def percent(document: dict[str, Any], metric: str) -> float:
    """Return a metric of a `finetune` result, in percent."""
    value: float = document["figures"][metric]["value"]
    return 100 * value


def random_weights(export: Path, seed: int, output: Path) -> Path:
    """Return a folder with the architecture and the image processor of an export, and random weights."""
    config = AutoConfig.from_pretrained(export, local_files_only=True, trust_remote_code=False)
    name = hashlib.sha256((export / "config.json").read_bytes()).hexdigest()[:12]
    folder = output / "random" / f"{name}-{seed}"
    if not (folder / "preprocessor_config.json").is_file():
        torch.manual_seed(seed)
        AutoModel.from_config(config, trust_remote_code=False).save_pretrained(folder)
        shutil.copy(export / "preprocessor_config.json", folder)  # last: its presence marks a complete folder
    return folder.resolve()


def _code() -> list[Path]:
    files = [file for name in CODE for file in [ROOT / name, *sorted((ROOT / name).rglob("*"))]]
    return [file for file in files if file.suffix in {".py", ".json", ".yaml"}]


def result(
    task: DownstreamTask, start: Path, data: Path, seed: int, output: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Fine-tune and return the result of `finetune`, or the stored one for the same weights, data and code."""
    digest = hashlib.sha256(json.dumps([task.command, task.overrides, seed, torch.__version__]).encode())
    weights = sorted(start.glob("*.safetensors"))
    manifests = [data / split / "manifest.json" for split in ("train", "val")]
    for file in [*weights, *manifests, *_code()]:
        digest.update(file.read_bytes())
    folder = output / f"{task.name}-{start.name}-{seed}-{digest.hexdigest()[:12]}"
    path = folder / "result.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        engine = [] if torch.cuda.is_available() else ["deepspeed=zero1_cpu_fp32"]
        few = ["--subset-seed", str(seed)] if "--per-class" in task.command else []
        command = ["finetune", task.kind, str(start), "--data", str(data), *task.command[1:], *few]
        command += [*task.overrides, *engine, f"seed={seed}", f"output_dir={folder / 'run'}", *QUIET]
        started = time.monotonic()
        document = tool(command, folder / "finetune.log", environment)
        document["seconds"] = time.monotonic() - started
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        shutil.rmtree(folder / "run")
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


if __name__ == "__main__":
    typer.run(main)
