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

from m3i_scale.backbones.families import PRESETS
from m3i_scale.config import known_protocols, known_runs, run_values
from m3i_scale.config.run_control import PROBES
from m3i_scale.errors import UserError
from m3i_scale.host.findings import NOT_JUDGED, Finding, finding
from m3i_scale.objective.encoders import EmaSpec
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.regularizers.prototypes import Sharpened
from m3i_scale.objective.schedule import values_of
from m3i_scale.objective.targets.patches import Gram
from m3i_scale.report.run_files import RunFiles, read_run
from m3i_scale.run.callbacks import StepRecord
from m3i_scale.run.hooks.metrics import PATIENCE, accuracy_margin, record_warnings
from m3i_scale.run.run_warnings import MAX_EPOCHS, USUAL_EPOCHS

EVALUATIONS, RECORDS = 3, 20
"""Numbers of evaluations and of log records of which the median counts."""
LEAST_SHARE, MOST_HIGH_NORM, MOST_RISE, MOST_DROP, MOST_LR_FACTOR = 2 / 3, 0.01, 0.2, 0.02, 2.0
"""Minimum effective rank and evenness as a fraction of the maximum in the run; maximum fraction of high-norm tokens,
rise of the patch similarity, drop of an accuracy, and factor between the learning rate and the scaled ones."""
LEAST_TEMPERATURE: float = Sharpened.model_fields["target_temperature"].default
_ONLINE = "evaluation.online.data=/data/shards/val"
Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Steps and finite values of a metric, each of shape N."""
RuleResult = tuple[str, list[tuple[str, str, str]]]
"""Observation, and the problems: observation with numbers, consequence, and settings that fix it."""


def diagnose(folder: Path) -> list[Finding]:
    """Return the findings of all rules for the run in `folder`. Problems are warnings. The value of a rule that raises
    a UserError, for example without data, is `NOT_JUDGED` and the reason."""
    run, findings = read_run(folder), list[Finding]()
    for rule in RULES:
        try:
            summary, problems = rule(run)
        except UserError as error:
            findings.append(Finding(rule.__name__, run.name, True, f"{NOT_JUDGED}: {error.what}", fix=error.fix))
        else:
            found = [finding(rule.__name__, run.name, value, warning=why, fix=fix) for value, why, fix in problems]
            findings += found or [finding(rule.__name__, run.name, summary)]
    return findings


def warnings(run: RunFiles) -> RuleResult:
    """Find the warnings that training wrote, and those that hold in the last records."""
    count, problems, teachers = len(run.steps), [], _teachers(run)
    if count < PATIENCE:
        raise UserError(f"{count} log records, and the rule needs {PATIENCE}", fix="log.every_steps=1")
    written = {(line["group"], line["what"]): (line["step"], line["why"], line["fix"]) for line in run.warnings}
    held = [_warnings_at(run, row) for row in range(0 if written else count - PATIENCE, count)]
    now = {key: reason for key, reason in held[-1].items() if all(key in row for row in held[-PATIENCE:])}
    for key in {**written, **now}:
        step, *reason = written.get(key, (int(run.steps[-PATIENCE]), "", ""))
        why, fix = now.get(key, reason)
        state = f"holds since step {step}" if key in now else f"written at step {step}"
        if key not in now and any(key in row for row in held):  # else no record shows it, for example a skipped step
            after = [int(at) for at, row in zip(run.steps, held, strict=True) if at > step and key not in row]
            state += f", recovered at step {after[0]}" if after else ""
        setting = teachers[key[0]][1] if key[0] in teachers and fix.startswith("a higher target_temperature") else ""
        if fix.startswith("a lower optim.lr") and key[0] not in ("evaluation", "guard"):
            setting = _lr_setting(run)
        problems.append((f"{key[0]}: {key[1]}; {state}", why, f"{setting}, or {fix}" if setting else fix))
    return f"no warning in {count} log records", problems


def _warnings_at(run: RunFiles, row: int) -> dict[tuple[str, str], tuple[str, str]]:
    """Return why and fix of the warnings that hold in one record. A std that is NaN is a problem, not missing."""
    values = ((name, float(column[row])) for name, column in run.figures.items())
    figures = {name: value for name, value in values if not math.isnan(value) or name.endswith("_std")}
    targets = tuple(name.removeprefix("loss/") for name in run.figures if re.fullmatch("loss/[^/]+", name))
    record = StepRecord(int(run.steps[row]), targets, figures)
    return {(item.group, item.what): (item.why, item.fix) for item in record_warnings(record)}


def rank(run: RunFiles) -> RuleResult:
    """Find an effective rank that falls: of the online evaluation, or of training batches with the same size."""
    why, fix = "the features use fewer dimensions, which can mean representation collapse", _lr_setting(run)
    with suppress(UserError):
        recipe = parse_recipe(_section(run, "recipe"))
        ema = recipe.ema or EmaSpec()
        start = round(1 - (1 - ema.start) / 5, 6)
        if any(target.encoder == "ema" for target in recipe.targets):
            fix = f"recipe.ema.start={start} recipe.ema.end={max(start, ema.end)}, or {fix}"
    with suppress(UserError):
        return _trend(_evaluated(run, "rankme"), why, fix)
    steps, values = _logged(run, "health/pooled_rank")
    changes = [line["step"] for line in (*run.starts[-1:], *run.stages[-1:])]  # the micro-batch limits the rank
    used = steps > max([_section(run, "optim").get("warmup_steps", 0), *changes])
    if used.sum() < 2 * RECORDS:  # the medians would share values
        few = f"few evaluations of rankme, and {used.sum()} records after warm-up, last start and last stage"
        raise UserError(few, fix=_evaluate_setting(run, "rankme"))
    return _trend({"health/pooled_rank": (steps[used], values[used])}, why, fix)


def high_norm_tokens(run: RunFiles) -> RuleResult:
    """Find a fraction of patch tokens with high norm that is large and has risen. Registers prevent them."""
    series, why = _evaluated(run, "high_norm_tokens"), "these patches store global information: noisy dense features"
    backbone = _section(run, "backbone")
    model = str(backbone.get("from_pretrained") or backbone.get("preset"))
    variant, fix = (
        model.replace("dinov2-", "dinov2-reg-"),
        "a backbone with registers, such as dinov3-b/16, in a new run",
    )
    if re.search("registers|-reg-|dinov3", model) or (backbone.get("config") or {}).get("num_register_tokens"):
        fix = "a larger weight of patch-level targets: the backbone has registers"
    elif variant != model and variant in PRESETS:
        fix = f"backbone.preset={variant} in a new run"
    return _trend(series, why, fix, lambda least: max(MOST_HIGH_NORM, 1.5 * least))


def patch_similarity(run: RunFiles) -> RuleResult:
    """Find patches of an image that become alike. Gram anchoring preserves their differences (DINOv3)."""
    targets, series = parse_recipe(_section(run, "recipe")).targets, _evaluated(run, "patch_similarity")
    if not any(target.dense for target in targets):
        raise UserError("the recipe has no patch-level target, and image-level targets make patches alike")
    steps, values = next(iter(series.values()))
    fix = _steps_setting(run, int(steps[values <= values.min() + MOST_RISE][-1]))
    fix += ", or a target with `kind: gram` and an early export as teacher"
    for number, target in enumerate(targets):
        if isinstance(target, Gram):
            key, weight = f"recipe.targets.{number}.weight", target.weight
            fix = f"larger values in the schedule {key}" if isinstance(weight, list) else f"{key}={2 * weight:g}"
    return _trend(series, "dense features degrade if all patches are alike", fix, lambda least: least + MOST_RISE)


def _trend(series: dict[str, Series], why: str, fix: str, most: Callable[[float], float] | None = None) -> RuleResult:
    """Find metrics with a newest median above `most` of their minimum; None: below `LEAST_SHARE` of their maximum."""
    summary, problems = [], []
    for name, (steps, values) in series.items():
        window = EVALUATIONS if name.startswith("evaluation/") else RECORDS
        medians_N = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
        at = int(medians_N.argmin() if most else medians_N.argmax())
        extreme = f"{'minimum' if most else 'maximum'} {medians_N[at]:.3g} at step {steps[at + window - 1]}"
        summary.append(f"{name} is {medians_N[-1]:.3g} at step {steps[-1]} (median of {window}), {extreme}")
        if medians_N[-1] > most(medians_N[at]) if most else medians_N[-1] < LEAST_SHARE * medians_N[at]:
            problems.append((summary[-1], why, fix))
    return "; ".join(summary), problems


def learning_rate(run: RunFiles) -> RuleResult:
    """Compare learning rate and batch size with the built-in configs that have the recipe of the run."""
    recipe, is_pretrained = _section(run, "recipe").get("name"), bool(_section(run, "backbone").get("from_pretrained"))
    lr, batch_size = (_section(run, "optim").get(key) or math.nan for key in ("lr", "batch_size"))
    scaled = []
    for config in map(run_values, known_runs().keys() - known_protocols().keys()):
        has_weights = bool(config.get("backbone", {}).get("from_pretrained"))
        if (config["recipe"]["name"], has_weights) == (recipe, is_pretrained):
            usual, ratio = config["optim"]["lr"], batch_size / config["optim"]["batch_size"]
            linear, root = usual * ratio, usual * math.sqrt(ratio)
            most = max(linear, min(usual, MOST_LR_FACTOR * root))  # AdamW is often used without scaling
            fits = min(linear, root) / MOST_LR_FACTOR <= lr <= most * MOST_LR_FACTOR
            scaled.append((abs(math.log(ratio)), config["name"], root, linear, fits))
    if not scaled:
        raise UserError("no built-in config has the recipe and the initialization of this run")
    _, name, root, linear, _ = min(scaled)
    value = f"optim.lr is {lr:.3g} with optim.batch_size {batch_size}; {name} scales to "
    value += f"{root:.3g} (square root) or {linear:.3g} (linear)"
    problem = (value, "the learning rate is unusual for the batch size", f"optim.lr={root:.3g}, if accuracies stay low")
    return value, [] if any(fits for *_, fits in scaled) else [problem]


def teacher_temperature(run: RunFiles) -> RuleResult:
    """Find teacher temperatures that are too low, or low while fewer prototypes are used."""
    problems, teachers, why = [], _teachers(run), "a teacher that is too sharp collapses to few prototypes"
    if not teachers:
        raise UserError("no target of the recipe has a teacher temperature, or it has user-defined classes")
    for name, (temperature, fix) in teachers.items():
        most, metric = max(values_of(temperature)), f"health/{name}_evenness"
        value, series = f"target_temperature of {name} is {most:.3g}", _logged(run, metric)
        if most < LEAST_TEMPERATURE and not isinstance(temperature, list):
            problems.append((f"{value}, below {LEAST_TEMPERATURE}", why, fix))
        elif most <= LEAST_TEMPERATURE and len(series[0]) >= 2 * RECORDS:
            problems += _trend({f"{value}, and {metric}": series}, why, fix)[1]
    return f"at least {LEAST_TEMPERATURE}, or a schedule: {', '.join(teachers)}", problems


def epochs(run: RunFiles) -> RuleResult:
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
        raise UserError("no metric dataset/NAME/epoch above 0")
    return "; ".join(summary), problems


def overfitting(run: RunFiles) -> RuleResult:
    """Find accuracies of the online evaluation below their best value while the loss fell."""
    summary, problems, (logged, loss) = [], [], _logged(run, "loss")
    count = min((line.get("evaluation/online_labeled", math.inf) for line in run.evaluations), default=math.inf)
    for name, (steps, values) in _evaluated(run, "knn", "linear", least=EVALUATIONS + 1).items():
        at = int(values.argmax())
        summary.append(f"{name} is {values[-1]:.3f}, maximum {values[at]:.3f} at step {steps[at]}")
        before = loss[: max(int((logged <= steps[at]).sum()), 1)][-RECORDS:]
        margin = max(MOST_DROP, accuracy_margin(values[at], count))
        falls = values[-EVALUATIONS:].max() < values[at] - margin
        if falls and steps[at] == 0:
            problems.append((summary[-1], "the features are worse than the initial weights", _lr_setting(run)))
        elif falls and loss.size and loss[-RECORDS:].mean() < before.mean():
            value = f"{summary[-1]}; the loss fell from {before.mean():.4g} to {loss[-RECORDS:].mean():.4g}"
            keep_best = _section(run, "checkpoint").get("keep_best") or {}
            fix = f"checkpoint.keep_best={{metric: {name}, mode: max}}, or " if keep_best.get("metric") != name else ""
            problems.append((value, "the run overfits", fix + _steps_setting(run, int(steps[at]))))
    return "; ".join(summary), problems


def improvement(run: RunFiles) -> RuleResult:
    """Compare the newest accuracies with the accuracies of random initial weights."""
    if _section(run, "backbone").get("from_pretrained"):
        raise UserError("the initial weights are pretrained")
    count = min((line.get("evaluation/online_labeled", math.inf) for line in run.evaluations), default=math.inf)
    summary, improves = [], False
    for name, (steps, values) in _evaluated(run, "knn", "linear", least=EVALUATIONS + 1).items():
        if steps[0] == 0:
            margin = accuracy_margin(values[0], count)
            improves |= bool(values[-1] > values[0] + margin)
            summary.append(f"{name} is {values[-1]:.3f}, {values[0]:.3f} at step 0 (± {margin:.3f})")
    if not summary:
        raise UserError("no online evaluation at step 0", fix=_ONLINE)
    value, why = "; ".join(summary), "the features are not measurably better than random weights"
    fix = f"optim.steps={2 * (run.total_steps or run.step)}, or more images"
    return value, [] if improves else [(value, why, fix)]


RULES = (
    warnings,
    improvement,
    rank,
    high_norm_tokens,
    patch_similarity,
    learning_rate,
    teacher_temperature,
    epochs,
    overfitting,
)
"""Rules in the printed order; a finding has the name of its rule."""


def _logged(run: RunFiles, metric: str) -> Series:
    values = run.figures.get(metric, np.full(len(run.steps), np.nan))
    return run.steps[np.isfinite(values)], values[np.isfinite(values)]


def _evaluated(run: RunFiles, *metrics: str, least: int = 2 * EVALUATIONS) -> dict[str, Series]:
    """Return the metrics of the online evaluation that have enough values for two medians, or `least`."""
    found = {}
    for name in (f"evaluation/{encoder}/{metric}" for metric in metrics for encoder in ("ema", "student")):
        lines = [line for line in run.evaluations if math.isfinite(line.get(name, math.nan))]
        if len(lines) >= least:
            found[name] = np.array([line["step"] for line in lines]), np.array([line[name] for line in lines])
    if not found:
        fix = _evaluate_setting(run, metrics[0])
        raise UserError(f"fewer than {least} evaluations of {' or '.join(metrics)}", fix=fix)
    return found


def _evaluate_setting(run: RunFiles, metric: str) -> str:
    """Return the setting that adds a metric to the online evaluation, or measures it more often."""
    online, kind = _section(run, "evaluation").get("online"), metric if metric in (*PROBES, "rankme") else "patches"
    if not online:
        return _ONLINE
    if kind not in (kinds := online.get("metrics") or [kind]):
        return f"evaluation.online.metrics=[{', '.join([*kinds, kind])}]"
    every = max((run.total_steps or run.step) // (2 * EVALUATIONS), 1)
    often = every >= online.get("every_steps", math.inf)
    return "diagnose the run later" if often else f"evaluation.online.every_steps={every}"


def _section(run: RunFiles, name: str) -> dict[str, Any]:
    return run.settings.get(name) or {}


def _teachers(run: RunFiles) -> dict[str, tuple[float | list[tuple[float, float]], str]]:
    """Return the teacher temperature of targets that have one, with a setting for the schedule of DINOv2."""
    found: dict[str, tuple[float | list[tuple[float, float]], str]] = {}
    with suppress(UserError):  # for example user-defined classes, which are not imported
        for number, target in enumerate(parse_recipe(_section(run, "recipe")).targets):
            if isinstance(target.regularizer, Sharpened):
                most = round(min(0.07, *(0.7 * one for one in values_of(target.distribution.temperature))), 4)
                setting = f"target_temperature={[[0, min(most, LEAST_TEMPERATURE)], [0.06, most]]}"
                setting = f"recipe.targets.{number}.regularizer.{setting}"
                found[target.name] = target.regularizer.target_temperature, setting
    return found


def _lr_setting(run: RunFiles) -> str:
    return f"optim.lr={_section(run, 'optim').get('lr', 1e-3) / 3:.3g}"


def _steps_setting(run: RunFiles, steps: float) -> str:
    """Return the settings of a run that ends earlier."""
    steps = max(round(steps), 1)
    warmup = f" optim.warmup_steps={steps // 10}" if _section(run, "optim").get("warmup_steps", 0) >= steps else ""
    return f"optim.steps={steps}{warmup}" + (", with fewer stages.N.steps" if run.settings.get("stages") else "")
