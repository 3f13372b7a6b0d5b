"""One stage with everything against its parts, at equal compute: the paper's second claim, at a small scale.

Every recipe trains the same small ViT on the same shards with the same crops, colours and optimizer, for as many steps
as the same number of counted FLOPs pays for (student, decoders, heads and targets, forward and backward). Frozen
features are then measured in what each part is good at, and with --downstream after a fine-tuning of
`benchmarks/downstream.py`. Several seeds; figures are means with 95 % intervals over seeds.

    python benchmarks/one_stage.py --json [--data FOLDER] [--markdown tables.md] [--plot curves.svg]
        [--downstream segmentation …]

What is done is not done again: results lie in --output, a folder for every training.
"""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import downstream
import torch
import typer
from _common import emit, emoji_shards, machine, need, say
from _intervals import LEVEL, difference_interval, mean_interval
from _one_stage import (
    ABLATIONS,
    BATCH,
    RECIPES,
    UNTRAINED,
    DataSet,
    Entry,
    Job,
    flop_per_sample,
    open_data,
    run_values,
    stop_all,
)
from _one_stage_report import markdown, plot
from filelock import FileLock, Timeout

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError, DataError, UserError, did_you_mean


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    data: Path = typer.Option(None, help="Folder of shards with train and val; default: the emoji set."),
    output: Path = typer.Option(Path("runs/one_stage"), help="Keeps every training's result."),
    budget: float = typer.Option(6.0, min=1e-6, help="TFLOP of one training."),
    seeds: int = typer.Option(3, min=2, help="Trainings of every recipe."),
    workers: int = typer.Option(0, min=0, help="Trainings at a time; 0: one a core, or one a GPU."),
    points: int = typer.Option(3, min=1, help="Measurements along the first seed's training; 1: at the end alone."),
    only: list[str] = typer.Option([], help="Only these recipes."),
    ablations: bool | None = typer.Option(
        None, help="Also m3i with the other choices that the paper leaves open; default: where nothing is left out."
    ),
    tasks: list[str] = typer.Option([], "--downstream", help="Also fine-tune every export by a task of downstream.py."),
    markdown_file: Path = typer.Option(None, "--markdown", help="Also write the tables."),
    plot_file: Path = typer.Option(None, "--plot", help="Also draw the curves (SVG; needs matplotlib)."),
) -> None:
    """Print {recipe: {measure: {mean, low, high, seeds}}}, ablations, curves, controls, settings, machine."""
    if plot_file is not None:
        need("matplotlib")
    try:
        for file in (markdown_file, plot_file):
            if file is not None and not file.absolute().parent.is_dir():
                raise ConfigError("no such folder", where=str(file.absolute().parent), fix=f"mkdir -p {file.parent}")
        asked = downstream.chosen(tasks) if tasks else []
        document = compare(data, output, budget, seeds, points, workers, _chosen(only, ablations), asked)
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    emit(document)
    if markdown_file is not None:
        markdown_file.write_text(markdown(document), encoding="utf-8")
    if plot_file is not None:
        plot(document, plot_file)


def _chosen(only: list[str], ablations: bool | None) -> tuple[list[Entry], list[Entry]]:
    """Recipes, and choices of m3i."""
    known = [entry.name for entry in RECIPES]
    for name in only:
        if name not in known:
            raise ConfigError(f"no recipe '{name}' in this comparison", fix=did_you_mean(name, known))
    entries = [entry for entry in RECIPES if not only or entry.name in only]
    if ablations and "m3i" not in {entry.name for entry in entries}:
        raise ConfigError("--ablations are those of m3i, which is left out", fix="--only m3i --ablations")
    wanted = not only if ablations is None else ablations
    return entries, list(ABLATIONS) if wanted else []


def compare(
    folder: Path | None,
    output: Path,
    budget: float,
    seeds: int,
    points: int,
    workers: int,
    chosen: tuple[list[Entry], list[Entry]],
    tasks: Sequence[downstream.Measured] = (),
) -> dict[str, Any]:
    """All trainings, in parallel, and what they come to."""
    entries, others = chosen
    data = open_data(folder if folder is not None else emoji_shards())
    # Boxes are of built-in scenes, whatever the data.
    shards = {task: downstream.data_of(task, None if task.kind == "detection" else data.folder) for task in tasks}
    every = [UNTRAINED, *entries, *others]
    jobs = [
        job for entry in every for job in _jobs(entry, data, output, budget, seeds, points if entry in entries else 1)
    ]
    check_budget(jobs)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            results = _run(jobs, workers or torch.cuda.device_count() or os.cpu_count() or 1, shards)
    except Timeout:
        raise DataError(
            "another comparison writes here", where=str(output), fix="wait for it, or give another --output"
        ) from None
    by_name: dict[str, list[dict[str, Any]]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_name.setdefault(job.entry.name, []).append(result)
    return _document(by_name, entries, others) | {
        "settings": {
            "data": str(data.folder),
            "samples": data.samples,
            "caption_tokens": data.tokens,
            "tflop": budget,
            "batch": BATCH,
            "seeds": seeds,
            "steps": {name: found[0]["steps"] for name, found in by_name.items()},
            "gflop_per_sample": {name: found[0]["gflop_per_sample"] for name, found in by_name.items()},
            "level": LEVEL,
        },
        "curves": {entry.name: _curve(by_name[entry.name][0], budget) for entry in entries},
        "machine": machine(),
    }


def check_budget(jobs: list[Job]) -> None:
    """Refuse a budget that is too small for some training, and name one that is enough for all.

    Raises:
        ConfigError: see `Job.steps`.
    """
    _ = max((job for job in jobs if job.entry.trained), key=lambda job: job.flop).steps


def _document(by_name: dict[str, list[dict[str, Any]]], entries: list[Entry], others: list[Entry]) -> dict[str, Any]:
    document: dict[str, Any] = {entry.name: _means(by_name[entry.name]) for entry in entries}
    document["ablations"] = {e.name: {"default": e.default, "measures": _means(by_name[e.name])} for e in others}
    compared = {name: found for name, found in by_name.items() if name not in ("m3i", "untrained")}
    if "m3i" in by_name:
        document["m3i_minus"] = {name: _differences(by_name["m3i"], found) for name, found in compared.items()}
    document["untrained"] = _means(by_name["untrained"])
    document["pixels"] = {name: figure["value"] for name, figure in by_name["untrained"][0]["pixels"].items()}
    document["guessing"] = {name: value for found in by_name.values() for name, value in found[0]["guessing"].items()}
    document["other_images"] = {
        entry.name: {
            name: (figure["high"] - figure["low"]) / 2 for name, figure in by_name[entry.name][0]["measures"].items()
        }
        for entry in entries
    }
    document["not_measured"] = {entry.name: by_name[entry.name][0]["not_measured"] for entry in entries}
    return document


def _jobs(entry: Entry, data: DataSet, output: Path, budget: float, seeds: int, points: int) -> list[Job]:
    flop = flop_per_sample(run_values(entry, data, 0, output), data)
    return [Job(entry, seed, data, output, flop, budget * 1e12, points if seed == 0 else 1) for seed in range(seeds)]


def _run(jobs: list[Job], workers: int, shards: dict[downstream.Measured, Path]) -> list[dict[str, Any]]:
    """Each worker has its share of the cores, and a GPU of its own where there are some."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    count, inherited = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = inherited.split(",")[:count] if inherited else [str(number) for number in range(count)]
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(workers):
        places.put(gpus[number % len(gpus)] if gpus else "")
    say(f"{len(jobs)} trainings, controls included, {workers} at a time; what is done is not done again")

    def work(job: Job) -> dict[str, Any]:
        place = places.get()
        try:
            environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
            environment |= {"CUDA_VISIBLE_DEVICES": place} if gpus else {}
            found = job.result(environment)
            return found | {"measures": found["measures"] | _fine_tuned(job, shards, environment)}
        finally:
            places.put(place)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()  # the first failure ends all
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
    return [future.result() for future in futures]


def _fine_tuned(job: Job, shards: dict[downstream.Measured, Path], environment: dict[str, str]) -> dict[str, Any]:
    """Figures of a job's export after the tasks of `downstream.py`."""
    measures = {}
    for task, folder in shards.items():
        kept = job.output / "downstream"
        found = downstream.result(task, job.folder / "export", folder, job.seed, kept, environment)
        say(f"{job.entry.name}, seed {job.seed}, {task.name}: {downstream.percent(found, task.figures[0]):.2f} %")
        for name in task.figures:
            measures[f"{task.name} {name}"] = {part: found["figures"][name][part] for part in ("value", "low", "high")}
    return measures


def _means(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: mean_interval(_seeds(results, name)) for name in results[0]["measures"]}


def _differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """m3i minus another row, with Welch's interval over the seeds of both."""
    return {
        name: difference_interval(_seeds(ours, name), _seeds(theirs, name))
        for name in ours[0]["measures"]
        if name in theirs[0]["measures"]
    }


def _seeds(results: list[dict[str, Any]], name: str) -> list[float]:
    return [result["measures"][name]["value"] for result in results]


def _curve(result: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """Measures of the first seed along its training, by compute."""
    return [
        {
            "tflop": budget * point["step"] / result["steps"],
            **{name: figure["value"] for name, figure in point["measures"].items()},
        }
        for point in result["curve"]
    ]


if __name__ == "__main__":
    typer.run(main)
