"""Retention rules: which checkpoints of a folder to keep, and whether the rules of a run have an effect. One process,
no collectives: any thread may call it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from m3i_scale.checkpoint.commit import discard, point_latest
from m3i_scale.checkpoint.layout import checkpoints, named_latest, step_of
from m3i_scale.checkpoint.manifest import verify
from m3i_scale.config import KeepBestConfig, RetentionConfig, RunConfig
from m3i_scale.config.run_control import ONLINE_METRICS, PROBES, WITH_TEXT, OnlineEvaluationConfig
from m3i_scale.errors import CheckpointError, ConfigError, did_you_mean
from m3i_scale.files import folder_bytes, read_json_lines
from m3i_scale.host.output_dir import METRICS
from m3i_scale.objective.recipe import Recipe

Metrics = Mapping[int, Mapping[str, float]]
"""Evaluation metrics, by step."""
PREFIX = "evaluation/"
LAST_GOOD = "the last good one, though larger than the limit"
_BETTER = {"loss": "min", "nats": "max", "miou": "max", "box_ap": "max", "mask_ap": "max", "top_1": "max"} | {
    name: "min" if metric == "patches" else "max" for metric, names in ONLINE_METRICS.items() for name in names
}
"""Whether lower or higher values are better. Metrics of user-defined targets are not listed."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint's properties that retention depends on."""

    path: Path
    step: int
    size: int
    """Bytes on disk."""
    good: bool
    """Valid, as far as known; invalid ones do not count for any rule."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Evaluation metrics at its step."""


@dataclass
class Pruned:
    """Result of the retention rules."""

    kept: dict[Path, list[str]]
    """Reasons of the kept checkpoints."""
    removed: list[Entry]
    """Removed or, in a plan, to be removed; the newest first."""

    @property
    def over_limit(self) -> bool:
        """Return whether one checkpoint alone exceeds the limit of all."""
        return any(LAST_GOOD in reasons for reasons in self.kept.values())


def which_to_keep(entries: Iterable[Entry], rules: RetentionConfig) -> dict[Path, list[str]]:
    """Return the checkpoints to keep, each with every reason; the others are removed.

    The newest valid one always stays. If all together exceed `max_gib`, the last in this order are removed first: the
    newest; the best; other recent ones; multiples of `keep_every_steps`, newest first; invalid ones. A checkpoint kept
    by several rules counts once. An invalid one stays while it is newer than those kept by `keep_latest`, because a run
    that fell back replaces it. Without a valid checkpoint, everything stays.

    Applying the rules to the kept checkpoints keeps all of them, and a larger limit never keeps fewer.
    """
    newest_first = sorted(entries, key=lambda entry: (entry.step, entry.path.name), reverse=True)
    good = [entry for entry in newest_first if entry.good]
    if not good:
        return {entry.path: ["there is no good one"] for entry in newest_first}
    reasons: dict[Path, list[str]] = {}
    for entry, reason in _by_weight(newest_first, good, rules):
        reasons.setdefault(entry.path, []).append(reason)
    if rules.max_bytes is None:
        return reasons
    sizes = {entry.path: entry.size for entry in newest_first}
    kept: dict[Path, list[str]] = {}
    total = 0
    for path, of_path in reasons.items():
        total += sizes[path]
        if total > rules.max_bytes:
            return kept or {path: [*of_path, LAST_GOOD]}
        kept[path] = of_path
    return kept


def ranked(entries: Iterable[Entry], best: KeepBestConfig) -> list[Entry]:
    """Return the checkpoints with a finite value of the metric: the best first, of equal ones the newest first."""
    sign = 1 if best.mode == "min" else -1
    known = [entry for entry in entries if math.isfinite(entry.metrics.get(best.metric, math.nan))]
    return sorted(known, key=lambda entry: (sign * entry.metrics[best.metric], -entry.step))


def entries_of(root: Path, metrics: Metrics) -> list[Entry]:
    """Return the checkpoints of a folder, which may be missing, the newest first. Names and sizes of files determine
    validity."""
    steps = [(path, step_of(path) or 0) for path in checkpoints(root)]
    return [
        Entry(path, step, folder_bytes(path), not verify(path, contents=False), metrics.get(step, {}))
        for path, step in steps
    ]


def plan_prune(root: Path, rules: RetentionConfig, metrics: Metrics, *, committed: Path | None = None) -> Pruned:
    """Return the checkpoints to keep and to remove. If any would be removed, the newest presumably valid one is
    verified byte by byte first; if it is corrupt, it counts for no rule and the next one is verified. `committed` was
    just committed by this process and is not verified again."""
    entries = entries_of(root, metrics)
    while True:
        kept = which_to_keep(entries, rules)
        removed = [entry for entry in entries if entry.path not in kept]
        newest = next((entry for entry in entries if entry.good), None)
        if not removed or newest is None or newest.path == committed or not verify(newest.path):
            return Pruned(kept, removed)
        entries = [replace(entry, good=False) if entry is newest else entry for entry in entries]


def prune(
    root: Path, rules: RetentionConfig, metrics: Metrics | None = None, *, committed: Path | None = None
) -> Pruned:
    """Remove the checkpoints that no rule keeps; see `plan_prune`. The caller holds the lock of the output directory.
    The newest is removed first, so that a kill during pruning leaves the older ones for the next time."""
    pruned = plan_prune(root, rules, metrics or {}, committed=committed)
    for entry in pruned.removed:
        discard(entry.path)
    remaining = checkpoints(root)
    if remaining and named_latest(root) in {entry.path.name for entry in pruned.removed}:
        point_latest(remaining[0])  # the newest one was corrupt and was removed
    return pruned


def _by_weight(
    newest_first: Sequence[Entry], good: Sequence[Entry], rules: RetentionConfig
) -> Iterator[tuple[Entry, str]]:
    """Yield (checkpoint, reason), the most important first."""
    yield good[0], f"latest 1 of {rules.keep_latest}"
    if rules.keep_best is not None:
        for rank, entry in enumerate(ranked(good, rules.keep_best)[: rules.keep_best.count], start=1):
            value = entry.metrics[rules.keep_best.metric]
            yield entry, f"best {rank} of {rules.keep_best.count}: {rules.keep_best.metric} {value:.6g}"
    for number, entry in enumerate(good[1 : rules.keep_latest], start=2):
        yield entry, f"latest {number} of {rules.keep_latest}"
    if rules.keep_every_steps is not None:
        for entry in good:
            if entry.step % rules.keep_every_steps == 0:
                yield entry, f"every {rules.keep_every_steps} steps"
    full = len(good) >= rules.keep_latest
    for entry in newest_first:
        if not entry.good and not (full and entry.step < good[rules.keep_latest - 1].step):
            yield entry, "not good, and as new as the kept ones"


# ------------------------------------------------------------------ metrics and checks before step 1


def evaluations(output_dir: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of the evaluations at each step, from the run's metrics.jsonl. The file no longer has lines of
    steps that a resumed run repeats, so all metrics belong to current weights."""
    by_step: dict[int, dict[str, float]] = {}
    path = output_dir / METRICS
    try:
        for record in read_json_lines(path, containing='"kind": "evaluation"'):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not written by this package
                figures = {name: float(value) for name, value in record.items() if name.startswith(PREFIX)}
                by_step.setdefault(int(record["step"]), {}).update(figures)
    except FileNotFoundError:
        return by_step
    except OSError as error:
        raise CheckpointError(
            f"the evaluation metrics cannot be read: {error.strerror}",
            where=str(path),
            why="without them the best checkpoints are unknown",
            fix="make the file readable",
        ) from None
    return by_step


def evaluated_metrics(recipe: Recipe) -> set[str]:
    """Return the names of all metrics that an evaluation of this recipe writes. Mutual information of densities is only
    estimated on logged training steps."""
    names = {f"{PREFIX}loss"}
    for target in recipe.targets:
        figures = ["loss", "count"] + (["nats"] if target.distribution.bounds_information else [])
        figures += target.evaluated
        names |= {f"{PREFIX}{target.name}/{figure}" for figure in figures}
    return names


def online_metrics(online: OnlineEvaluationConfig, recipe: Recipe) -> set[str]:
    """Return the names of all metrics that the online evaluation of this recipe can write."""
    encoders = ["student"] if recipe.ema is None else ["student", "ema"]
    return {
        f"{PREFIX}{encoder}/{name}"
        for metric in online.metrics or ONLINE_METRICS
        for encoder in (encoders[:1] if metric in WITH_TEXT else encoders)
        for name in ONLINE_METRICS[metric]
        if (online.train_data is not None or metric not in PROBES)
        and (recipe.uses_text_tower or metric not in WITH_TEXT)
    }


def check_retention(run: RunConfig, recipe: Recipe) -> None:
    """Validate that the retention rules of `checkpoint` have an effect and that the run produces their metrics."""
    checkpoint = run.checkpoint
    saves, steps, every = checkpoint.every_steps, run.optim.steps, checkpoint.keep_every_steps
    if every is not None and not _meet(saves, every, steps):
        raise ConfigError(
            f"checkpoint.keep_every_steps has no effect: no checkpoint is saved at a multiple of {every} steps",
            where=f"checkpoint.every_steps: {saves}, optim.steps: {steps}",
            fix=f"use a multiple of {saves} that is at most {steps}",
        )
    if checkpoint.keep_best is not None:
        _check_best(run, recipe, checkpoint.keep_best)


def _check_best(run: RunConfig, recipe: Recipe, best: KeepBestConfig) -> None:
    metric, saves = best.metric, run.checkpoint.every_steps
    key, evaluates, known = "evaluation.every_steps", run.evaluation.every_steps, set[str]()
    if evaluates:
        known |= evaluated_metrics(recipe)
    if (online := run.evaluation.online) is not None:
        measured = online_metrics(online, recipe)
        known |= measured
        if metric in measured or not evaluates:
            key, evaluates = "evaluation.online.every_steps", online.every_steps
    if not known:
        raise ConfigError(
            "checkpoint.keep_best has no effect: the run evaluates nothing",
            where="evaluation.every_steps: 0",
            fix=f"set evaluation.every_steps={saves} and data.validation, or evaluation.online",
        )
    if online is not None and metric not in known and "/" in metric and metric.rpartition("/")[2] in _BETTER:
        _check_measured(online, recipe, metric)
    if metric not in known:
        name = metric.partition("/")[2] or metric
        near = did_you_mean(metric if metric.startswith(PREFIX) else PREFIX + name, known)
        raise ConfigError(f"no evaluation of this run writes '{metric}'", where="checkpoint.keep_best.metric", fix=near)
    figure = metric.rpartition("/")[2]
    mode = _BETTER.get(figure, best.mode)
    if best.mode != mode:
        raise ConfigError(
            f"checkpoint.keep_best would keep the worst checkpoints: '{metric}' is better if "
            f"{'higher' if mode == 'max' else 'lower'}",
            where=f"checkpoint.keep_best.mode: {best.mode}",
            fix=f"checkpoint.keep_best.mode={mode}",
        )
    if not _meet(saves, evaluates, run.optim.steps):
        raise ConfigError(
            "checkpoint.keep_best has no effect: at most the last checkpoint is saved at a step that is evaluated",
            where=f"checkpoint.every_steps: {saves}, {key}: {evaluates}",
            fix=f"{key}={saves}",
        )


def _check_measured(online: OnlineEvaluationConfig, recipe: Recipe, metric: str) -> None:
    """Raise an error with the reason if this run does not measure an existing metric of the online evaluation."""
    *_, encoder, name = metric.split("/")
    where, kind = "checkpoint.keep_best.metric", next((kind for kind in PROBES if kind == name), None)
    if encoder == "ema" and recipe.ema is None:
        fix = f"use {PREFIX}student/{name}"
        raise ConfigError(f"the recipe has no EMA teacher for '{metric}'", where=where, fix=fix)
    if kind is not None and online.train_data is None:
        fix = "set evaluation.online.train_data=/data/shards/train"
        raise ConfigError(f"'{metric}' needs evaluation.online.train_data", where=where, fix=fix)


def _meet(saves: int, every: int, steps: int) -> bool:
    """Return whether a saved step (a multiple of `saves`, or the last step) is ever a multiple of `every`."""
    return math.lcm(saves, every) <= steps or steps % every == 0
