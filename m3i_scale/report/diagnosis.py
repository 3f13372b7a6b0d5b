"""Diagnosis of a run from its records. Each rule is a function that returns problems, with settings that fix them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import PRESETS
from m3i_scale.config import BackboneConfig, known_protocols, known_runs, run_values
from m3i_scale.errors import UserError
from m3i_scale.host.findings import Finding, finding
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.regularizers.prototypes import Sharpened
from m3i_scale.objective.schedule import values_of
from m3i_scale.report.run_files import RunFiles, read_run
from m3i_scale.run.callbacks import StepRecord
from m3i_scale.run.hooks.metrics import PATIENCE, record_warnings
from m3i_scale.run.run_warnings import MAX_EPOCHS, USUAL_EPOCHS

EVALUATIONS, RECORDS = 3, 20
"""Numbers of evaluations and of log records of which the median counts."""
LEAST_SHARE, MOST_HIGH_NORM, MOST_RISE, MOST_DROP, MOST_LR_FACTOR = 2 / 3, 0.01, 0.2, 0.02, 2.0
"""Minimum effective rank and evenness as a fraction of the maximum in the run; maximum fraction of high-norm tokens,
rise of the patch similarity, drop of an accuracy, and factor between the learning rate and the scaling rules."""
LEAST_TEMPERATURE: float = Sharpened.model_fields["target_temperature"].default
_ONLINE = "evaluation.online.data=/data/shards/val"
Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Steps and finite values of a metric, each of shape N."""
Judged = tuple[str, list[tuple[str, str, str]]]
"""Observation, and the problems: observation with numbers, consequence, and settings that fix it."""


class MissingRecordsError(Exception):
    """The records lack the data of a rule. Arguments: the missing data, and optionally a setting that records it."""


def diagnose(folder: Path) -> list[Finding]:
    """Return the findings of all rules for the run in `folder`. Problems are warnings. A rule without data has a
    finding with the missing data in `why`, which is no warning."""
    run, findings = read_run(folder), list[Finding]()
    for rule in RULES:
        try:
            summary, problems = rule(run)
        except MissingRecordsError as missing:
            findings.append(Finding(rule.__name__, run.name, True, "not judged", *missing.args))
        else:
            found = [finding(rule.__name__, run.name, value, warning=why, fix=fix) for value, why, fix in problems]
            findings += found or [finding(rule.__name__, run.name, summary)]
    return findings


def warnings(run: RunFiles) -> Judged:
    """Find the warnings that training wrote, and those that hold in the last records."""
    count, problems = len(run.steps), []
    if count < PATIENCE:
        raise MissingRecordsError(f"{count} log records, and the rule needs {PATIENCE}", "log.every_steps=1")
    held = [_warnings_at(run, row) for row in range(count - PATIENCE, count)]
    now = {key: reason for key, reason in held[-1].items() if all(key in earlier for earlier in held)}
    written = {(line["group"], line["what"]): (line["step"], line["why"], line["fix"]) for line in run.warnings}
    for key in {**written, **now}:
        step, *reason = written.get(key, (int(run.steps[-PATIENCE]), "", ""))
        why, fix = now.get(key, reason)
        after = range(int(np.searchsorted(run.steps, step, side="right")), 0 if key in now else count)
        recovered = next((int(run.steps[row]) for row in after if key not in _warnings_at(run, row)), None)
        state = f"holds since step {step}" if key in now else f"held at step {step}"
        state += "" if recovered is None else f", recovered at step {recovered}"
        setting = _lr_setting(run) if "optim.lr" in fix else None
        if "target_temperature" in fix:
            setting = _teachers(run).get(key[0], (0, setting))[1]
        problems.append((f"{key[0]}: {key[1]}; {state}", why, f"{setting}, or {fix}" if setting else fix))
    return f"no warning in {count} log records", problems


def _warnings_at(run: RunFiles, row: int) -> dict[tuple[str, str], tuple[str, str]]:
    """Return why and fix of the warnings that hold in one record. A std that is NaN is a problem, not missing."""
    values = {name: float(column[row]) for name, column in run.figures.items()}
    figures = {name: value for name, value in values.items() if not math.isnan(value) or name.endswith("_std")}
    losses = (name.removeprefix("loss/") for name in run.figures if name.startswith("loss/"))
    record = StepRecord(int(run.steps[row]), tuple(name for name in losses if "/" not in name), figures)
    return {(item.group, item.what): (item.why, item.fix) for item in record_warnings(record)}


def rank(run: RunFiles) -> Judged:
    """Find an effective rank that falls: of the online evaluation, or of training batches after the warm-up."""
    why = "the features use ever fewer dimensions, which is representation collapse"
    with suppress(MissingRecordsError):
        return _trend(_evaluated(run, "rankme"), why, _lr_setting(run))
    steps, values = _logged(run, "health/pooled_rank")
    trained = steps > _section(run, "optim").get("warmup_steps", 0)
    if trained.sum() <= RECORDS:
        raise MissingRecordsError(f"no RankMe, and {trained.sum()} health/pooled_rank after the warm-up", _ONLINE)
    return _trend({"health/pooled_rank": (steps[trained], values[trained])}, why, _lr_setting(run), window=RECORDS)


def high_norm_tokens(run: RunFiles) -> Judged:
    """Find a fraction of patch tokens with high norm that is large and has risen."""
    series, why = _evaluated(run, "high_norm_tokens"), "these patches store global information: noisy dense features"
    return _trend(series, why, lambda _: _register_setting(run), lambda least: max(MOST_HIGH_NORM, 1.5 * least))


def patch_similarity(run: RunFiles) -> Judged:
    """Find patches of an image that become alike. Gram anchoring preserves their differences (DINOv3)."""
    series, why = _evaluated(run, "patch_similarity"), "dense features degrade if all patches of an image are alike"
    gram = [
        f"recipe.targets.{number}.weight={2 * term.get('weight', 1.0):g}"
        for number, term in enumerate(_section(run, "recipe").get("targets") or [])
        if term.get("kind") == "gram" and not isinstance(term.get("weight"), list)
    ]
    other = "a target with `kind: gram` and an early export as teacher"
    fix = gram[0] if gram else lambda step: f"{_steps_setting(run, step)}, or {other}"
    return _trend(series, why, fix, lambda least: least + MOST_RISE)


def _trend(
    series: dict[str, Series],
    why: str,
    fix: str | Callable[[int], str],
    most: Callable[[float], float] | None = None,
    window: int = EVALUATIONS,
) -> Judged:
    """Find metrics with a newest median above `most` of their minimum; None: below `LEAST_SHARE` of their maximum.
    A function `fix` gets the last step without the problem."""
    summary, problems = [], []
    for name, (steps, values) in series.items():
        medians_N = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
        at = int(medians_N.argmin() if most else medians_N.argmax())
        is_bad_N = medians_N > most(medians_N[at]) if most else medians_N < LEAST_SHARE * medians_N[at]
        extreme = f"{'minimum' if most else 'maximum'} {medians_N[at]:.3g} at step {steps[at + window - 1]}"
        summary.append(f"{name} is {medians_N[-1]:.3g} at step {steps[-1]}, {extreme}")
        if is_bad_N[-1]:
            step = int(steps[window - 1 :][~is_bad_N][-1])
            problems.append((summary[-1], why, fix if isinstance(fix, str) else fix(step)))
    return "; ".join(summary), problems


def learning_rate(run: RunFiles) -> Judged:
    """Compare learning rate and batch size with the built-in config of the run, or all that have its recipe."""
    usual = {name: run_values(name) for name in sorted(known_runs().keys() - known_protocols().keys())}
    recipe, is_pretrained = _section(run, "recipe").get("name"), bool(_section(run, "backbone").get("from_pretrained"))
    names = [name for name in usual if usual[name]["recipe"]["name"] == recipe]
    names = [name for name in names if bool(usual[name].get("backbone", {}).get("from_pretrained")) == is_pretrained]
    lr, batch_size = (_section(run, "optim").get(key) for key in ("lr", "batch_size"))
    if not names or not lr or not batch_size:
        raise MissingRecordsError("no built-in config has the recipe and the initialization of this run")
    value, fixes = f"optim.lr is {lr:.3g} with optim.batch_size {batch_size}", []
    for name in [run.name] if run.name in names else names:
        usual_lr, ratio = usual[name]["optim"]["lr"], batch_size / usual[name]["optim"]["batch_size"]
        linear, root = usual_lr * ratio, usual_lr * math.sqrt(ratio)
        value += f"; {name} scales to {linear:.3g} (linear) or {root:.3g} (square root)"
        fixes.append(f"optim.lr={linear:.3g}")
        if min(linear, root) / MOST_LR_FACTOR <= lr <= max(linear, root) * MOST_LR_FACTOR:
            return value, []
    return value, [(value, "the learning rate does not fit the batch size", fixes[0])]


def teacher_temperature(run: RunFiles) -> Judged:
    """Find teacher temperatures that are too low, or low while fewer prototypes are used."""
    problems, teachers, why = [], _teachers(run), "a teacher that is too sharp collapses to few prototypes"
    if not teachers:
        raise MissingRecordsError("no target of the recipe has a teacher temperature, or it has user-defined classes")
    for name, (temperature, fix) in teachers.items():
        most, metric = max(values_of(temperature)), f"health/{name}_evenness"
        value, series = f"target_temperature of {name} is {most:.3g}", _logged(run, metric)
        if most < LEAST_TEMPERATURE and not isinstance(temperature, list):
            problems.append((f"{value}, below {LEAST_TEMPERATURE}", why, fix))
        elif most <= LEAST_TEMPERATURE and len(series[0]) > RECORDS:
            problems += _trend({f"{value}, and {metric}": series}, why, fix, window=RECORDS)[1]
    return f"at least {LEAST_TEMPERATURE}, or a schedule: {', '.join(teachers)}", problems


def epochs(run: RunFiles) -> Judged:
    """Project the epochs of each dataset to the end of the run."""
    summary, problems, datasets = [], [], _section(run, "data").get("datasets") or {}
    logged = {name.split("/")[1]: _logged(run, name) for name in run.figures if re.fullmatch("dataset/.+/epoch", name)}
    for name, (steps, epochs) in logged.items():
        if not epochs[-1:].any():
            continue
        total, per_step = run.total_steps or int(steps[-1]), float(epochs[-1] / steps[-1])
        projected = min(total * per_step, (datasets.get(name) or {}).get("epochs") or math.inf)
        summary.append(f"{name}: {projected:,.1f} epochs until step {total}")
        if projected > MAX_EPOCHS:
            fix = f"{_steps_setting(run, USUAL_EPOCHS / per_step)} for {USUAL_EPOCHS} epochs, or more images"
            problems.append((summary[-1], f"images repeat more than {MAX_EPOCHS} times", fix))
    if not summary:
        raise MissingRecordsError("no metric dataset/NAME/epoch above 0")
    return "; ".join(summary), problems


def overfitting(run: RunFiles) -> Judged:
    """Find accuracies of the online evaluation below their best value while the loss fell."""
    summary, problems, (logged, loss) = [], [], _logged(run, "loss")
    for name, (steps, values) in _evaluated(run, "knn", "linear").items():
        at = int(values.argmax())
        before, now = (part[-RECORDS:].mean() if part.size else math.nan for part in (loss[logged <= steps[at]], loss))
        summary.append(f"{name} is {values[-1]:.3f}, maximum {values[at]:.3f} at step {steps[at]}")
        if values[-EVALUATIONS:].max() < values[at] - MOST_DROP and now < before:
            keep_best = _section(run, "checkpoint").get("keep_best") or {}
            fix = f"checkpoint.keep_best={{metric: {name}, mode: max}}, or " if keep_best.get("metric") != name else ""
            value = f"{summary[-1]}; the loss fell from {before:.4g} to {now:.4g}"
            problems.append((value, "the run overfits", fix + _steps_setting(run, int(steps[at]))))
    return "; ".join(summary), problems


RULES = (warnings, rank, high_norm_tokens, patch_similarity, learning_rate, teacher_temperature, epochs, overfitting)
"""Rules in the printed order; a finding has the name of its rule."""


def _logged(run: RunFiles, metric: str) -> Series:
    values = run.figures.get(metric, np.full(len(run.steps), np.nan))
    return run.steps[np.isfinite(values)], values[np.isfinite(values)]


def _evaluated(run: RunFiles, *metrics: str) -> dict[str, Series]:
    """Return the metrics of the online evaluation that have enough values."""
    found = {}
    for name in (f"evaluation/{encoder}/{metric}" for metric in metrics for encoder in ("ema", "student")):
        lines = [line for line in run.evaluations if math.isfinite(line.get(name, math.nan))]
        if len(lines) > EVALUATIONS:
            found[name] = np.array([line["step"] for line in lines]), np.array([line[name] for line in lines])
    if not found:
        raise MissingRecordsError(f"fewer than {EVALUATIONS + 1} online evaluations of {' or '.join(metrics)}", _ONLINE)
    return found


def _section(run: RunFiles, name: str) -> dict[str, Any]:
    return run.settings.get(name) or {}


def _teachers(run: RunFiles) -> dict[str, tuple[float | list[tuple[float, float]], str]]:
    """Return the teacher temperature of targets that have one, with a setting for the schedule of DINOv2."""
    found: dict[str, tuple[float | list[tuple[float, float]], str]] = {}
    with suppress(UserError):  # for example user-defined classes, which are not imported
        for number, target in enumerate(parse_recipe(_section(run, "recipe")).targets):
            if isinstance(target.regularizer, Sharpened):
                most = round(min(0.07, *(0.7 * one for one in values_of(target.distribution.temperature))), 4)
                schedule = [[0, min(most, LEAST_TEMPERATURE)], [0.06, most]]
                setting = f"recipe.targets.{number}.regularizer.target_temperature={schedule}"
                found[target.name] = target.regularizer.target_temperature, setting
    return found


def _lr_setting(run: RunFiles) -> str:
    return f"optim.lr={_section(run, 'optim').get('lr', 1e-3) / 3:.3g}"


def _steps_setting(run: RunFiles, steps: float) -> str:
    """Return the settings of a run that ends earlier."""
    steps = max(round(steps), 1)
    warmup = f" optim.warmup_steps={steps // 10}" if _section(run, "optim").get("warmup_steps", 0) >= steps else ""
    return f"optim.steps={steps}{warmup}" + (", with fewer stages.N.steps" if run.settings.get("stages") else "")


def _register_setting(run: RunFiles) -> str:
    """Return a setting for more register tokens, or for the backbone with registers that is most similar."""
    backbone, similar = _section(run, "backbone"), dict[str, tuple[bool, int]]()
    if backbone.get("from_pretrained"):
        return "backbone.from_pretrained=facebook/dinov2-with-registers-base in a new run"
    here = backbone_config(BackboneConfig(preset=backbone.get("preset"), config=backbone.get("config") or {}))
    if count := getattr(here, "num_register_tokens", 0):
        return f"backbone.config.num_register_tokens={2 * count} in a new run"
    for name in PRESETS:
        with suppress(UserError):  # fields of `backbone.config` that this preset does not have
            other = backbone_config(BackboneConfig(preset=name, config=backbone.get("config") or {}))
            if getattr(other, "num_register_tokens", 0):
                similar[name] = other.patch_size != here.patch_size, abs(other.hidden_size - here.hidden_size)
    return f"backbone.preset={min(similar, key=similar.__getitem__, default='dinov3-b/16')} in a new run"
