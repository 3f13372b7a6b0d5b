"""One stage with everything against its parts: the paper's second claim, at a small scale.

Every recipe trains the same small ViT on the same shards with the same crops, colors and optimizer, under one of two
protocols. `compute`: for as many steps as the same number of counted FLOPs pays for (student, decoders, heads and
targets, forward and backward). `samples`: for as many as it pays for in `m3i`, so that all see as many samples, as the
paper compares. Exports are evaluated with frozen features, and after fine-tuning by `benchmarks/downstream.py`. Recipes
have a mean rank over the metrics in which the best of them beats raw pixels, chance and untrained weights. Results are
means over several seeds with 95 % intervals; differences are those between trainings of the same seed.

    python benchmarks/one_stage.py --json [--protocol samples] [--budget 2 --budget 6 …] [--data DIR | --photos DIR]
        [--markdown tables.md] [--plot curves.svg]

Every training has a folder in --output. Trainings that have a result there are not repeated.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import downstream
import typer
from _common import emit, emoji_shards, machine, need, say
from _intervals import LEVEL, mean_interval
from _mean_rank import counted_metrics, mean_ranks
from _one_stage import ABLATIONS, RECIPES, UNTRAINED, Entry, Job, flop_per_sample, run_values
from _one_stage_data import EMOJI, PHOTOS, DataSet, open_data, open_photos
from _one_stage_report import markdown, plot
from _trainings import train_all
from filelock import FileLock, Timeout

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError, DataError, UserError, did_you_mean
from m3i_scale.tasks.base import Task

TASKS = ("segmentation", "classification_5_per_class", "detection")
"""Those of `downstream.py` that exports are measured by."""
Protocol = Literal["compute", "samples"]


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    data: Path = typer.Option(None, help="Folder of shards with train and val; default: the emoji set."),
    photos: Path = typer.Option(None, help="Folder of examples/photos.py, in place of --data."),
    output: Path = typer.Option(Path("runs/one_stage"), help="Keeps every training's result."),
    protocol: Protocol = typer.Option("compute", help="What is equal: counted compute, or samples seen."),
    budgets: list[float] = typer.Option(
        [],
        "--budget",
        min=1e-6,
        help="TFLOP of one training, of `m3i`'s where samples are equal; several: a ladder. Default: "
        f"{EMOJI.budget:g}, with --photos {PHOTOS.budget:g}.",
    ),
    seeds: int = typer.Option(3, min=2, help="Trainings of every recipe."),
    workers: int = typer.Option(0, min=0, help="Trainings at a time; 0: one a core, or one a GPU."),
    points: int = typer.Option(
        None,
        min=1,
        help="Measurements along the first seed's training; default: 3; 1, at the end, of a ladder or --photos.",
    ),
    only: list[str] = typer.Option([], help="Only these recipes."),
    ablations: list[str] = typer.Option(
        [],
        help="Also m3i with another choice, by name; several: repeat; all; none. Default: all where no recipe is left "
        "out, except with --photos.",
    ),
    tasks: list[str] = typer.Option(
        [],
        "--downstream",
        help="Train every export by these tasks of downstream.py; none: by none. Default: segmentation, "
        "classification_5_per_class and detection, where the data have labels for them.",
    ),
    markdown_file: Path = typer.Option(None, "--markdown", help="Also write the tables."),
    plot_file: Path = typer.Option(None, "--plot", help="Also draw the curves (SVG; needs matplotlib)."),
) -> None:
    """Print {recipe: {measure: {mean, low, high, seeds}}, counted: {metric: …}, mean_rank: {recipe: …}}, m3i_minus,
    ablations, curves, baselines, settings, machine. Of a ladder: those of its largest budget, with the metrics that
    count there, and the ranks and results by budget.
    """
    if plot_file is not None:
        need("matplotlib")
    try:
        for file in (markdown_file, plot_file):
            if file is not None and not file.absolute().parent.is_dir():
                raise ConfigError("no such folder", where=str(file.absolute().parent), fix=f"mkdir -p {file.parent}")
        if len(set(budgets)) > 1 and points is not None:
            raise ConfigError("the curves of a ladder are drawn over its budgets", fix="leave out --points")
        if photos is not None and data is not None:
            raise ConfigError("--photos cannot be combined with --data", fix="leave one out")
        if photos is not None and tasks not in ([], ["none"]):
            raise ConfigError("--photos cannot be combined with --downstream", fix="leave one out")
        opened = open_data(data or emoji_shards()) if photos is None else open_photos(photos)
        comparison = Comparison(
            opened,
            output,
            protocol,
            sorted(set(budgets)) or [opened.setting.budget],
            seeds,
            points or (1 if len(set(budgets)) > 1 else opened.setting.points),
            *_chosen(only, ablations or ["none" if only or photos is not None else "all"]),
        )
        asked = [] if tasks == ["none"] else downstream.chosen(tasks)
        document = comparison.document(workers, asked if tasks else comparison.tasks())
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    emit(document)
    if markdown_file is not None:
        markdown_file.write_text(markdown(document), encoding="utf-8")
    if plot_file is not None:
        plot(document, plot_file)


def _chosen(only: list[str], ablations: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Return the compared recipes, and the variants of m3i."""
    entries = _by_name("recipe", only or ["all"], RECIPES)
    others = _by_name("ablation", ablations, ABLATIONS)
    if others and "m3i" not in {entry.name for entry in entries}:
        raise ConfigError("--ablations compares variants of m3i, which is left out", fix="add --only m3i")
    return entries, others


def _by_name(what: str, names: list[str], entries: tuple[Entry, ...]) -> list[Entry]:
    if names == ["all"]:
        return list(entries)
    if names == ["none"] and what == "ablation":
        return []
    known = [entry.name for entry in entries]
    for name in names:
        if name not in known:
            raise ConfigError(f"no {what} '{name}' in this comparison", fix=did_you_mean(name, known))
    return [entry for entry in entries if entry.name in names]


@dataclass(frozen=True)
class Comparison:
    """Trains recipes, and compares them."""

    data: DataSet
    output: Path
    protocol: Protocol
    budgets: list[float]
    """TFLOP, ascending."""
    seeds: int
    points: int
    entries: list[Entry]
    others: list[Entry]
    """`m3i` with other choices."""

    def tasks(self) -> list[downstream.DownstreamTask]:
        """Return the tasks that exports are trained by where none is named: those that the data have labels for."""
        if not self.data.fine_tuned:
            return []
        train = self.data.folder / "train"
        return [
            task
            for task in downstream.TASKS
            if task.name in TASKS
            and (task.kind == "detection" or (train / Task.class_of(task.kind).labels_file).is_file())
        ]

    def document(self, workers: int, tasks: list[downstream.DownstreamTask]) -> dict[str, Any]:
        """Run all trainings in parallel, and return the results."""
        # Detection always uses the built-in scenes.
        shards = {
            task: downstream.data_of(task, None if task.kind == "detection" else self.data.folder) for task in tasks
        }
        controls = self._jobs(UNTRAINED, self.budgets[0])
        trained = {
            (budget, entry.name): self._jobs(entry, budget)
            for budget in self.budgets
            for entry in (*self.entries, *self.others)
        }
        jobs = [*controls, *(job for of_row in trained.values() for job in of_row)]
        check_budget(jobs)

        def work(job: Job, environment: dict[str, str]) -> dict[str, Any]:
            result = job.result(environment)
            tasks = {} if job.entry.default else shards  # ablations are compared by frozen features only
            return result | {"measures": result["measures"] | _fine_tuned(job, tasks, environment)}

        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output / ".lock", timeout=0):
                results = iter(train_all(jobs, workers, work))
        except Timeout:
            raise DataError(
                "another comparison writes to this folder", where=str(self.output), fix="wait, or use another --output"
            ) from None
        untrained = [next(results) for _ in controls]
        by_row = {row: [next(results) for _ in of_row] for row, of_row in trained.items()}
        by_budget = {
            budget: {entry.name: by_row[budget, entry.name] for entry in (*self.entries, *self.others)}
            for budget in self.budgets
        }
        largest = by_budget[self.budgets[-1]]
        counted = counted_metrics({entry.name: largest[entry.name] for entry in self.entries}, untrained)
        document = self._rows(largest, counted) | {"counted": counted} | self._baselines(largest, untrained)
        if len(self.budgets) > 1:
            ladder = {f"{budget:g}": self._rows(by_name, counted) for budget, by_name in by_budget.items()}
            document["ladder"] = ladder
        settings = {
            "data": str(self.data.folder),
            "samples": self.data.samples,
            "caption_tokens": self.data.tokens,
            "protocol": self.protocol,
            "tflop": self.budgets[-1],
            "batch": self.data.setting.batch,
            "model": asdict(self.data.setting),
            "seeds": self.seeds,
            "steps": {name: results[0]["steps"] for name, results in largest.items()},
            "gflop_per_sample": {name: results[0]["gflop_per_sample"] for name, results in largest.items()},
            "level": LEVEL,
        }
        curves = {entry.name: self._curve([rows[entry.name] for rows in by_budget.values()]) for entry in self.entries}
        return document | {"settings": settings, "curves": curves, "machine": machine()}

    def _jobs(self, entry: Entry, budget: float) -> list[Job]:
        flop = self._flop(entry)
        (paid,) = (other for other in RECIPES if other.name == "m3i") if self.protocol == "samples" else (entry,)
        price, points = self._flop(paid), self.points if entry in self.entries else 1
        return [
            Job(entry.name, seed, self.output, entry, self.data, flop, price, budget * 1e12, points if seed == 0 else 1)
            for seed in range(self.seeds)
        ]

    def _flop(self, entry: Entry) -> float:
        return flop_per_sample(run_values(entry, self.data, 0, self.output), self.data)

    def _rows(self, by_name: dict[str, list[dict[str, Any]]], counted: dict[str, Any]) -> dict[str, Any]:
        """Return the results of every recipe at one budget, and their ranks."""
        rows: dict[str, Any] = {entry.name: _means(by_name[entry.name]) for entry in self.entries}
        compared = {entry.name: by_name[entry.name] for entry in self.entries}
        rows["mean_rank"] = mean_ranks(compared, [name for name, one in counted.items() if one["counts"]])
        rows["ablations"] = {
            entry.name: {"default": entry.default, "measures": _means(by_name[entry.name])} for entry in self.others
        }
        if "m3i" in by_name:
            rows["m3i_minus"] = {
                name: _differences(by_name["m3i"], results) for name, results in by_name.items() if name != "m3i"
            }
        return rows

    def _baselines(self, by_name: dict[str, list[dict[str, Any]]], untrained: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the results of the baselines, and the sampling error of the test images."""
        chance = {name: value for results in by_name.values() for name, value in results[0]["chance"].items()}
        firsts = {entry.name: by_name[entry.name][0] for entry in self.entries}
        return {
            "untrained": _means(untrained),
            "pixels": {name: figure["value"] for name, figure in untrained[0]["pixels"].items()},
            "chance": chance,
            "other_images": {
                name: {measure: (figure["high"] - figure["low"]) / 2 for measure, figure in first["measures"].items()}
                for name, first in firsts.items()
            },
            "not_measured": {name: first["not_measured"] for name, first in firsts.items()},
        }

    def _curve(self, by_budget: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return measures by samples and compute: means over budgets, or of the first seed along its training."""
        batch = self.data.setting.batch
        if len(by_budget) > 1:
            points = [
                (results[0], results[0]["steps"], {name: figure["mean"] for name, figure in _means(results).items()})
                for results in by_budget
            ]
        else:
            first = by_budget[0][0]
            points = [
                (first, point["step"], {name: figure["value"] for name, figure in point["measures"].items()})
                for point in first["curve"]
            ]
        return [
            {"tflop": step * batch * result["gflop_per_sample"] / 1e3, "samples": step * batch, **measures}
            for result, step, measures in points
        ]


def check_budget(jobs: list[Job]) -> None:
    """Check that the budget is large enough for every training; the error names one that is.

    Raises:
        ConfigError: see `Job.steps`.
    """
    _ = max((job for job in jobs if job.entry.trained), key=lambda job: job.price / job.budget).steps


def _fine_tuned(job: Job, shards: dict[downstream.DownstreamTask, Path], environment: dict[str, str]) -> dict[str, Any]:
    """Return the results of a job's export after fine-tuning by tasks of `downstream.py`."""
    measures = {}
    for task, folder in shards.items():
        kept = job.output / "downstream"
        result = downstream.result(task, job.folder / "export", folder, job.seed, kept, environment)
        say(f"{job.entry.name}, seed {job.seed}, {task.name}: {downstream.percent(result, task.metrics[0]):.2f} %")
        for name in task.metrics:
            measures[f"{task.name} {name}"] = {part: result["figures"][name][part] for part in ("value", "low", "high")}
    return measures


def _means(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: mean_interval(_seeds(results, name)) for name in results[0]["measures"]}


def _differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return m3i minus another row, paired by seed: same order of samples, augmentation and initial weights."""
    return {
        name: mean_interval([one - other for one, other in zip(_seeds(ours, name), _seeds(theirs, name), strict=True)])
        for name in ours[0]["measures"]
        if name in theirs[0]["measures"]
    }


def _seeds(results: list[dict[str, Any]], name: str) -> list[float]:
    return [result["measures"][name]["value"] for result in results]


if __name__ == "__main__":
    typer.run(main)
