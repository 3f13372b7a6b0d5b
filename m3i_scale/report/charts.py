"""Charts of a report: their metrics, units and descriptions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from m3i_scale.report.run_files import SCORES, RunFiles

PERCENT = "%"
"""Unit of metrics from 0 to 1 that are displayed in percent."""


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
        "group_loss", "objective", "Loss by group", "nats",
        "−log P̂ of each group of targets, without its weight, with its regulariser.", "loss/([^/]+)",
    ),
    Chart("loss_term", "objective", "Loss by term", "", "Terms of a group's loss, as a detector's.", "loss/(.+/.+)"),
    Chart(
        "nats", "objective", "Information by group", "nats",
        'What the representation tells about each target: a bound or an estimate. "information" is their sum.',
        "mi/(.+)|(information)",
    ),
    Chart(
        "group_weight", "objective", "Weight by group", "",
        "Factor of each group's loss in the sum; moves where the balance does.", "loss_weight/(.+)",
    ),
    Chart(
        "group_grad_norm", "objective", "Gradient norm by group", "",
        "Norm of the gradient that each group sends into the visible tokens of the encoder's output.",
        "grad_norm/(.+)",
    ),
    Chart("grad_norm", "objective", "Gradient norm", "", "Norm of the whole gradient before clipping.", "grad_norm"),
    Chart("lr", "objective", "Learning rate", "", "Of the step.", "lr"),
    Chart("ema_decay", "objective", "EMA decay", "", "At 1 the EMA teacher does not change.", "ema_decay"),
    Chart(
        "skipped", "objective", "Skipped steps", "steps",
        "Left out so far because a loss or gradient was not finite, or overflowed in fp16.",
        "(skipped_steps|skipped_nonfinite)",
    ),
    Chart("loss_scale", "objective", "Loss scale", "", "Factor of the loss in the backward pass, fp16.", "loss_scale"),
    Chart(
        "samples_per_s", "speed", "Throughput", "samples/s", "Samples through all ranks in a second.",
        "throughput/samples_per_s",
    ),
    Chart(
        "mfu", "speed", "MFU", PERCENT, "Counted FLOPs of the model as a share of what the devices could compute.",
        "perf/mfu",
    ),
    Chart(
        "step_times", "speed", "Time per section of a step", "s",
        "Mean fraction over the ranks, times the time of a step.", "time/(?!step|data_wait)(.+)", stacked=True,
    ),
    Chart(
        "step_s", "speed", "Time of a step", "s",
        "Wall-clock time of a step, and how much of it the slowest rank waited for data.",
        "time/(step|data_wait)",
    ),
    Chart(
        "data_wait_share", "speed", "Data wait", PERCENT, "Share of a step spent waiting for data; near 0 when the "
        "loader keeps up.", "time/data_wait_share",
    ),
    Chart(
        "tokens_per_s", "speed", "Tokens", "tokens/s", "Visible patch tokens through the backbone, all ranks.",
        "throughput/tokens_per_s",
    ),
    Chart("memory", "speed", "Memory", "GiB", "Peak memory of the rank that used most.", "memory_gib"),
    Chart(
        "health_std", "health", "Spread of features", "",
        "Standard deviation over samples, mean over channels. Near 0: the features are constant.", "health/(.+)_std",
    ),
    Chart(
        "health_rank", "health", "Effective rank of features", "dimensions",
        "How many directions are used alike: 1 is a line, the width of the model all of them.", "health/(.+)_rank",
    ),
    Chart(
        "health_spread", "health", "Spread of targets", "0 to 1",
        "0: all samples have the same target, it has collapsed.", "health/(.+)_spread",
    ),
    Chart(
        "health_evenness", "health", "Use of prototypes", "0 to 1", "0: one prototype takes all samples.",
        "health/(.+)_evenness",
    ),
    Chart(
        "health_scale", "health", "Scale of text targets", "", "1/τ, the inverse temperature, at most 100.",
        "health/(.+)_scale",
    ),
    Chart("count", "health", "Samples with a target", "samples", "Of a micro-batch, all ranks.", "loss_samples/(.+)"),
    Chart(
        "mixture", "data", "Mixture of datasets", PERCENT,
        "Fraction of each dataset among the samples since the last record. Dashed: the target, given weights, "
        "schedules and exhausted datasets.", "dataset/(.+/recent_(?:share|asked))",
    ),
    Chart("epoch", "data", "Epochs", "epochs", "So far, corrupt samples included.", "dataset/(.+)/epoch"),
    Chart(
        "quarantined", "data", "Quarantined samples", "samples",
        "Put aside as unreadable so far: how often, and how many different ones.", "(quarantined|quarantined_samples)",
    ),
)  # fmt: skip


def evaluation_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return a chart for every metric of evaluations during training, scores first and counts last. `loss` of all
    groups is one chart."""
    names = {key for run in runs for line in run.evaluations for key in line if key.startswith("evaluation/")}
    first, last = [*SCORES, "loss", "nats"], ["count"]
    order = {kind: place for place, kind in enumerate([*first, "", *last])}
    kinds = sorted({name.rpartition("/")[2] for name in names}, key=lambda kind: (order.get(kind, len(first)), kind))
    return [
        Chart(
            f"evaluation_{kind}", "results", f"While training: {SCORES.get(kind, kind.replace('_', ' '))}",
            PERCENT if kind in SCORES else "",
            "Measured while training, on data.validation.",
            rf"evaluation/(?:(.+)/)?{re.escape(kind)}",
        )
        for kind in kinds
    ]  # fmt: skip
