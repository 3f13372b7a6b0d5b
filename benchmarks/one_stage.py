"""One stage with everything against its parts, at equal compute: the paper's second claim, at a small scale.

Every recipe trains the same small ViT on the same shards with the same augmentation and optimizer, for as many steps as
the same number of counted FLOPs pays for (student, decoders, heads and targets, forward and backward). Frozen features
are then measured in what each part is good at. Several seeds; figures are means with 95 % intervals over seeds.

    python benchmarks/one_stage.py --json [--data FOLDER] [--markdown tables.md] [--plot curves.svg]

What is done is not done again: results lie in --output, a folder for every training.
"""

from __future__ import annotations

import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer
from _common import emit, machine, say
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
    tool,
)
from _one_stage_report import markdown, plot
from scipy.stats import t

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError, UserError, did_you_mean

MEASURES = ("linear", "knn", "dense", "zero_shot", "retrieval")
LEVEL = 0.95


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    data: Path = typer.Option(None, help="Folder of `m3i-scale shards make` with train and val; default: emoji."),  # noqa: B008
    output: Path = typer.Option(Path("runs/one_stage"), help="Keeps every training's result."),  # noqa: B008
    budget: float = typer.Option(6.0, help="TFLOP of one training."),
    seeds: int = typer.Option(3, min=2, help="Trainings of every recipe."),
    workers: int = typer.Option(0, help="Trainings at a time; 0: one a core, or one a GPU."),
    only: list[str] = typer.Option([], help="Only these recipes."),  # noqa: B008
    ablations: bool = typer.Option(True, help="Also m3i with the other choices that the paper leaves open."),
    markdown_file: Path = typer.Option(None, "--markdown", help="Also write the tables."),  # noqa: B008
    plot_file: Path = typer.Option(None, "--plot", help="Also draw the curves (SVG; needs matplotlib)."),  # noqa: B008
) -> None:
    """Print {recipe: {measure: {mean, low, high, seeds}}}, ablations, curves, pixels, guessing, settings, machine."""
    try:
        document = compare(data, output, budget, seeds, workers, only, ablations)
        if markdown_file is not None:
            markdown_file.write_text(markdown(document), encoding="utf-8")
        if plot_file is not None:
            plot(document, plot_file)
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    emit(document)


def compare(
    folder: Path | None, output: Path, budget: float, seeds: int, workers: int, only: list[str], ablations: bool
) -> dict[str, Any]:
    """All trainings, in parallel, and what they come to."""
    known = [entry.name for entry in RECIPES]
    for name in only:
        if name not in known:
            raise ConfigError(f"no recipe '{name}' in this comparison", fix=did_you_mean(name, known))
    entries = [entry for entry in RECIPES if not only or entry.name in only]
    others = list(ABLATIONS) if ablations and not only else []
    controls = [UNTRAINED]
    data = open_data(folder if folder is not None else _emoji())
    jobs = [
        job
        for entry in (*controls, *entries, *others)
        for job in _jobs(entry, data, output, budget, seeds, entry in entries)
    ]
    results = _run(jobs, workers or torch.cuda.device_count() or os.cpu_count() or 1)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_name.setdefault(job.entry.name, []).append(result)
    first = by_name[entries[-1].name][0]
    document: dict[str, Any] = {entry.name: _means(by_name[entry.name]) for entry in entries}
    document["ablations"] = {e.name: {"default": e.default, "measures": _means(by_name[e.name])} for e in others}
    document["untrained"] = _means(by_name["untrained"])
    document["pixels"] = {name: figure["value"] for name, figure in by_name["untrained"][0]["pixels"].items()}
    document["guessing"] = first["guessing"]
    document["test_interval"] = {
        name: (figure["high"] - figure["low"]) / 2 for name, figure in first["measures"].items()
    }
    document["curves"] = {entry.name: _curve(by_name[entry.name][0], budget) for entry in entries}
    document["not_measured"] = {entry.name: by_name[entry.name][0]["not_measured"] for entry in entries}
    document["settings"] = {
        "data": str(data.folder),
        "samples": data.samples,
        "tflop": budget,
        "batch": BATCH,
        "seeds": seeds,
        "steps": {name: found[0]["steps"] for name, found in by_name.items()},
        "gflop_per_sample": {name: found[0]["gflop_per_sample"] for name, found in by_name.items()},
        "level": LEVEL,
    }
    return document | {"machine": machine()}


def _emoji() -> Path:
    """The built-in set, made where it is missing."""
    folder = Path(os.environ.get("M3I_EMOJI_FOLDER", "data/emoji"))
    if not folder.exists():
        font = os.environ.get("M3I_NOTO_FONT")
        say(f"making the emoji shards in {folder}")
        log = folder.parent / "emoji.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        tool(["shards", "make", "emoji", "--output", str(folder), *(["--noto-font", font] if font else [])], log, {})
    return folder


def _jobs(entry: Entry, data: DataSet, output: Path, budget: float, seeds: int, main_row: bool) -> list[Job]:
    name = entry.name.replace(" ", "-")
    flop = flop_per_sample(run_values(entry, data, 0, output), data.classes)
    return [
        Job(
            entry,
            seed,
            data,
            output / f"{data.folder.resolve().name}-{name}-{seed}",
            flop,
            budget * 1e12,
            main_row and seed == 0,
        )
        for seed in range(seeds)
    ]


def _run(jobs: list[Job], workers: int) -> list[dict[str, Any]]:
    """Each worker has its share of the cores, or a GPU of its own."""
    threads, gpus = max(1, (os.cpu_count() or 1) // workers), torch.cuda.device_count()
    say(f"{len(jobs)} trainings, {workers} at a time")

    def work(numbered: tuple[int, Job]) -> dict[str, Any]:
        number, job = numbered
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
        return job.result(environment)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, numbered) for numbered in enumerate(jobs)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _means(results: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in MEASURES:
        values = [result["measures"][name]["value"] for result in results if name in result["measures"]]
        if values:
            found[name] = mean_interval(values)
    return found


def mean_interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds and its Student interval: what other seeds would change, not what other test images would."""
    mean, count = statistics.fmean(values), len(values)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(values) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": values}


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
