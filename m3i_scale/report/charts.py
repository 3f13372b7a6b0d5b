"""Charts of a report: their metrics, units and descriptions, and their data from the curves of one or several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tsdownsample import MinMaxLTTBDownsampler

from m3i_scale.config.run_control import ONLINE_METRICS
from m3i_scale.report.run_files import SCORES, RunFiles

PERCENT = "%"
"""Unit of metrics from 0 to 1 that are displayed in percent."""
MOST_POINTS = 2_000
"""Maximum points per curve."""
ALL_POINTS = 150_000
"""Maximum points of all curves together: about 2.5 MB of the page."""
_SUMMARISED = 6
"""Maximum number of curves with newest values in the text below a chart."""
Points = tuple[NDArray[np.int64], NDArray[np.float64]]
_ASKED = "/recent_asked"
_ONLINE = frozenset(name for names in ONLINE_METRICS.values() for name in names)
_IN_WORDS = {"": "", PERCENT: "", "0 to 1": " From 0 to 1."}


@dataclass(frozen=True)
class Chart:
    """One chart: its metrics in metrics.jsonl, with a description."""

    id: str
    tab: str
    title: str
    unit: str
    """Unit of the axis; empty for a dimensionless number, `PERCENT` or "0 to 1" for values of at most 1."""
    about: str
    pattern: str
    """Regular expression that must match the full metric name. A matched group, if any, is the legend entry."""
    stacked: bool = False


CHARTS = (
    Chart("loss", "overview", "Loss", "nats", "Weighted sum of the groups' losses.", "loss"),
    Chart(
        "group_loss", "losses", "Loss by group", "nats",
        "−log P̂ of each group of targets and its regularizer, unweighted.", "loss/([^/]+)",
    ),
    Chart("loss_term", "losses", "Loss by term", "", "Terms of a group's loss, e.g. of a detector.", "loss/(.+/.+)"),
    Chart(
        "nats", "losses", "Mutual information by group", "nats",
        'Lower bound or estimate of the mutual information with each target. "information" is their sum.',
        "mi/(.+)|(information)",
    ),
    Chart(
        "group_weight", "losses", "Weight by group", "",
        "Weight of each group's loss in the sum. Loss balancing changes it.", "loss_weight/(.+)",
    ),
    Chart(
        "group_grad_norm", "losses", "Gradient norm by group", "",
        "Norm of the gradient of each group's loss with respect to the visible tokens of the encoder output.",
        "grad_norm/(.+)",
    ),
    Chart("grad_norm", "losses", "Gradient norm", "", "Total gradient norm before clipping.", "grad_norm"),
    Chart("lr", "losses", "Learning rate", "", "Learning rate of the step.", "lr"),
    Chart("ema_decay", "losses", "EMA decay", "", "At 1 the EMA teacher does not change.", "ema_decay"),
    Chart(
        "skipped", "losses", "Skipped steps", "steps",
        "Steps skipped so far: non-finite loss or gradient, or fp16 overflow.",
        "(skipped_steps|skipped_nonfinite)",
    ),
    Chart("loss_scale", "losses", "Loss scale", "", "fp16 loss scale.", "loss_scale"),
    Chart(
        "samples_per_s", "speed", "Throughput", "samples/s", "Samples per second over all ranks.",
        "throughput/samples_per_s",
    ),
    Chart(
        "mfu", "speed", "MFU", PERCENT, "Counted FLOPs of the model as a fraction of the peak of the devices.",
        "perf/mfu",
    ),
    Chart(
        "step_times", "speed", "Time per section of a step", "s",
        "Mean fraction over the ranks, times the time of a step.", "time/(?!step|data_wait)(.+)", stacked=True,
    ),
    Chart(
        "step_s", "speed", "Time of a step", "s",
        "Wall-clock time per step, and data wait of the slowest rank.",
        "time/(step|data_wait)",
    ),
    Chart(
        "data_wait_share", "speed", "Data wait", PERCENT, "Fraction of a step spent waiting for data; near 0 if the "
        "loader keeps up.", "time/data_wait_share",
    ),
    Chart(
        "tokens_per_s", "speed", "Tokens", "tokens/s", "Visible patch tokens per second over all ranks.",
        "throughput/tokens_per_s",
    ),
    Chart("memory", "speed", "Memory", "GiB", "Peak memory of the rank that used most.", "memory_gib"),
    Chart(
        "health_std", "health", "Spread of features", "",
        "Standard deviation over samples, mean over channels. Near 0: the features are constant.", "health/(.+)_std",
    ),
    Chart(
        "health_rank", "health", "Effective rank of features", "dimensions",
        "Number of equally used dimensions, from 1 to the width of the model.", "health/(.+)_rank",
    ),
    Chart(
        "health_spread", "health", "Spread of targets", "0 to 1",
        "0: all samples have the same target (collapse).", "health/(.+)_spread",
    ),
    Chart(
        "health_evenness", "health", "Use of prototypes", "0 to 1", "0: all samples are assigned to one prototype.",
        "health/(.+)_evenness",
    ),
    Chart(
        "health_scale", "health", "Scale of text targets", "", "1/τ, the inverse temperature, at most 100.",
        "health/(.+)_scale",
    ),
    Chart("count", "health", "Samples with a target", "samples", "Micro-batch, all ranks.", "loss_samples/(.+)"),
    Chart(
        "mixture", "data", "Mixture of datasets", PERCENT,
        "Fraction of each dataset among the samples since the last record. Dashed: the target, given weights, "
        "schedules and exhausted datasets.", "dataset/(.+/recent_(?:share|asked))",
    ),
    Chart("epoch", "data", "Epochs", "epochs", "Epochs so far, including corrupt samples.", "dataset/(.+)/epoch"),
    Chart(
        "quarantined", "data", "Quarantined samples", "samples",
        "Unreadable samples so far, counted once per epoch.", "quarantined",
    ),
)  # fmt: skip


def evaluation_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return a chart for every metric of evaluations during training, scores first and counts last. `loss` of all
    groups is one chart."""
    names = {key for run in runs for line in run.evaluations for key in line if key.startswith("evaluation/")}
    names -= {"evaluation/online_s", "evaluation/online_labeled"}
    first, last = [*SCORES, "loss", "nats"], ["count"]
    order = {kind: place for place, kind in enumerate([*first, "", *last])}
    kinds = sorted({name.rpartition("/")[2] for name in names}, key=lambda kind: (order.get(kind, len(first)), kind))
    return [
        Chart(
            f"evaluation_{kind}", "results", f"Evaluation: {SCORES.get(kind, kind.replace('_', ' '))}",
            PERCENT if kind in SCORES else "",
            "Features on evaluation.online.data." if kind in _ONLINE else "On data.validation during training.",
            rf"evaluation/(?:(.+)/)?{re.escape(kind)}",
        )
        for kind in kinds
    ]  # fmt: skip


def filled_charts(runs: Sequence[RunFiles], names: Sequence[str], charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Return the charts with data from any run, as JSON values. Curves of one `group` share their color. A curve is
    downsampled to `MOST_POINTS` points, or fewer to stay below `ALL_POINTS` in total."""
    curves = [
        _evaluations_of(run) | {name: (run.steps, values) for name, values in run.figures.items()} for run in runs
    ]
    wanted = [(chart, list(_series_of(chart, curves))) for chart in charts]
    total = sum(len(found) for _, found in wanted)
    count = max(3, min(MOST_POINTS, ALL_POINTS // max(1, total)))
    return [_filled(chart, found, count, names) for chart, found in wanted if found]


def _evaluations_of(run: RunFiles) -> dict[str, Points]:
    by_name: dict[str, list[tuple[int, float]]] = {}
    for line in run.evaluations:
        for name, value in line.items():
            if name.startswith("evaluation/"):
                by_name.setdefault(name, []).append((line["step"], value))
    return {
        name: (np.array([step for step, _ in points], np.int64), np.array([value for _, value in points]))
        for name, points in by_name.items()
    }


def _series_of(chart: Chart, curves: Sequence[Mapping[str, Points]]) -> Iterator[tuple[int, str, Points]]:
    """Yield run, legend entry and points of a chart's curves that have any finite point. Groups come before their sums,
    so that a group has the same color in every chart."""
    pattern = re.compile(chart.pattern)
    for run, by_name in enumerate(curves):
        matches = [(match, by_name[name]) for name in by_name if (match := pattern.fullmatch(name))]
        for match, (steps, values) in sorted(matches, key=lambda found: found[0].lastindex or math.inf):
            if np.isfinite(values).any():
                part = next((part for part in match.groups() if part), None)
                yield run, part or ("all" if pattern.groups else chart.title), (steps, values)


def _every_so_many(steps: NDArray[np.int64], values: NDArray[np.float64], count: int) -> Points:
    """Return at most `count` points, at the same steps for every curve, because stacked values must add up."""
    chosen = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    return steps[chosen], values[chosen]


def _rounded(value: float) -> float | None:
    """Round to five significant digits; None for values outside JSON, such as overflow of the largest floats."""
    rounded = float(f"{value:.5g}")
    return rounded if math.isfinite(rounded) else None


def _in_words(value: float, *, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _filled(
    chart: Chart, series: Sequence[tuple[int, str, Points]], count: int, names: Sequence[str]
) -> dict[str, Any]:
    lines, newest = [], []
    for run, name, (steps, values) in series:
        is_asked = name.endswith(_ASKED)
        group = name.removesuffix(_ASKED).removesuffix("/recent_share")
        shown_name = f"{group} (target)" if is_asked else group
        x, y = _every_so_many(steps, values, count) if chart.stacked else downsample(steps, values, count)
        lines.append({
            "run": run,
            "group": group,
            "name": shown_name,
            "x": [int(step) for step in x],
            "y": [_rounded(value) for value in y],
            "dashed": is_asked,
        })  # fmt: skip
        finite = values[np.isfinite(values)]
        last = _in_words(float(finite[-1]), percent=chart.unit == PERCENT)
        of_run = f" ({names[run]})" if len(names) > 1 else ""
        newest.append((last if shown_name == chart.title else f"{shown_name} {last}") + of_run)
    summary = "Newest: " + ", ".join(newest) + "." if len(newest) <= _SUMMARISED else ""
    return {
        "id": chart.id,
        "tab": chart.tab,
        "title": chart.title,
        "unit": "" if chart.unit in _IN_WORDS else chart.unit,
        "percent": chart.unit == PERCENT,
        "about": chart.about + _IN_WORDS.get(chart.unit, f" In {chart.unit}."),
        "summary": summary,
        "stacked": chart.stacked,
        "series": lines,
    }


def downsample(x: NDArray[Any], y: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Downsample a curve (x and y of shape N, x increasing) to at most `count` ≥ 3 points with MinMaxLTTB.

    The extremes of every interval are candidates. Largest-triangle-three-buckets selects those that change the line
    most. Values are never averaged or moved. Points with non-finite y are dropped, because a line cannot show them.

    Source: Van Der Donckt et al., MinMaxLTTB: Leveraging MinMax-Preselection to Scale LTTB, 2023 (arXiv:2305.00332).
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= count:
        return x, y
    chosen = MinMaxLTTBDownsampler().downsample(np.ascontiguousarray(x), np.ascontiguousarray(y), n_out=count)
    return x[chosen], y[chosen]
