"""Validation of the retention rules before step 1, and the metrics that they use."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from m3i_scale.config import KeepBestConfig, RunConfig
from m3i_scale.errors import CheckpointError, ConfigError, did_you_mean
from m3i_scale.files import read_json_lines
from m3i_scale.host.output_dir import METRICS
from m3i_scale.objective.recipe import Recipe

PREFIX = "evaluation/"
_BETTER = {"loss": "min", "nats": "max", "miou": "max", "box_ap": "max", "mask_ap": "max", "top_1": "max"}
"""Metric name → `min` if lower values are better, `max` if higher. Metrics of user-defined targets are not listed."""


def evaluations(output_dir: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of the last evaluation at each step, from the run's metrics.jsonl. The file no longer has
    lines of steps that a resumed run repeats, so all metrics belong to current weights."""
    by_step: dict[int, dict[str, float]] = {}
    path = output_dir / METRICS
    try:
        for record in read_json_lines(path, containing='"kind": "evaluation"'):
            with suppress(ValueError, KeyError, TypeError):  # not written by this package
                figures = {name: float(value) for name, value in record.items() if name.startswith(PREFIX)}
                by_step[int(record["step"])] = figures
    except FileNotFoundError:
        return by_step
    except OSError as error:
        raise CheckpointError(
            f"the figures of evaluations cannot be read: {error.strerror}",
            where=str(path),
            why="without them nobody knows which checkpoints are the best",
            fix="make the file readable",
        ) from None
    return by_step


def evaluated_figures(recipe: Recipe) -> set[str]:
    """Return the names of all metrics that an evaluation of this recipe writes. Mutual information of densities is only
    estimated on logged training steps."""
    names = {f"{PREFIX}loss"}
    for target in recipe.targets:
        figures = ["loss", "count"] + (["nats"] if target.distribution.bounds_information else [])
        figures += target.evaluated
        names |= {f"{PREFIX}{target.name}/{figure}" for figure in figures}
    return names


def check_retention(run: RunConfig, recipe: Recipe) -> None:
    """Validate that the retention rules of `checkpoint` have an effect and that the run produces their metrics."""
    checkpoint = run.checkpoint
    saves, steps, every = checkpoint.every_steps, run.optim.steps, checkpoint.keep_every_steps
    if every is not None and not _meet(saves, every, steps):
        raise ConfigError(
            f"checkpoint.keep_every_steps has no effect: no checkpoint is of a multiple of {every} steps",
            where=f"checkpoint.every_steps: {saves}, optim.steps: {steps}",
            fix=f"take a multiple of {saves} that is not larger than {steps}",
        )
    if checkpoint.keep_best is None:
        return
    _check_best(run, recipe, checkpoint.keep_best)
    evaluates = run.evaluation.every_steps
    if every is not None and evaluates % every == 0 and checkpoint.max_gib is None:
        raise ConfigError(
            "checkpoint.keep_best has no effect: keep_every_steps keeps every checkpoint that is evaluated",
            where=f"checkpoint.keep_every_steps: {every}, evaluation.every_steps: {evaluates}",
            fix="take keep_best out, raise keep_every_steps, or set checkpoint.max_gib",
        )


def _check_best(run: RunConfig, recipe: Recipe, best: KeepBestConfig) -> None:
    metric = best.metric
    evaluates, saves = run.evaluation.every_steps, run.checkpoint.every_steps
    known = evaluated_figures(recipe)
    if not evaluates:
        raise ConfigError(
            "checkpoint.keep_best has no effect: the run evaluates nothing",
            where="evaluation.every_steps: 0",
            fix=f"evaluation.every_steps={saves}, and data.validation",
        )
    if metric not in known:
        near = did_you_mean(metric if metric.startswith(PREFIX) else PREFIX + metric.partition("/")[2], known)
        raise ConfigError(f"no evaluation of this run writes '{metric}'", where="checkpoint.keep_best.metric", fix=near)
    figure = metric.rpartition("/")[2]
    mode = _BETTER.get(figure, best.mode)
    if best.mode != mode:
        raise ConfigError(
            f"the worst checkpoints would be kept: '{metric}' is better when {'higher' if mode == 'max' else 'lower'}",
            where=f"checkpoint.keep_best.mode: {best.mode}",
            fix=f"checkpoint.keep_best.mode={mode}",
        )
    if not _meet(saves, evaluates, run.optim.steps):
        raise ConfigError(
            "checkpoint.keep_best has no effect: no checkpoint is of a step that is evaluated",
            where=f"checkpoint.every_steps: {saves}, evaluation.every_steps: {evaluates}",
            fix=f"evaluation.every_steps={saves}",
        )


def _meet(saves: int, every: int, steps: int) -> bool:
    """Return whether a saved step (a multiple of `saves`, or the last step) is ever a multiple of `every`."""
    return math.lcm(saves, every) <= steps or steps % every == 0
