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
    first, last = [*SCORES, "loss", "nats"], ["count"]
    order = {kind: place for place, kind in enumerate([*first, "", *last])}
    kinds = sorted({name.rpartition("/")[2] for name in names}, key=lambda kind: (order.get(kind, len(first)), kind))
    return [
        Chart(
            f"evaluation_{kind}", "results", f"Evaluation: {SCORES.get(kind, kind.replace('_', ' '))}",
            PERCENT if kind in SCORES else "",
            "On data.validation during training.",
            rf"evaluation/(?:(.+)/)?{re.escape(kind)}",
        )
        for kind in kinds
    ]  # fmt: skip
