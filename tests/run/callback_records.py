"""Records of a run that never ran, for callbacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from m3i_scale.engine.peak import Peak
from m3i_scale.run.callbacks import Picture, RunInfo, StepRecord
from m3i_scale.run.flops import Work

CONFIG = {"name": "demo", "data": {"datasets": {"a": {"path": "https://me:hunter2@host/x.tar?signature=abc"}}}}

WORK = Work({"model": 1.0, "text": 0.0}, 1, Peak(1.0, "given"))


def info(output_dir: Path, start_step: int = 0, total_steps: int = 100) -> RunInfo:
    return RunInfo("demo", output_dir, total_steps, start_step, 2, CONFIG)


GROUPS = {"text": {"loss": 1.5, "nats": 2.0}, "intra": {"loss": 2.0}}


def record(
    step: int,
    changes: Mapping[str, float | None] | None = None,
    *,
    groups: Mapping[str, dict[str, float]] = GROUPS,
    health: Mapping[str, float] | None = None,
) -> StepRecord:
    """Return a record with changed figures; None removes a figure."""
    figures = {
        "loss": 3.5,
        "lr": 1e-3,
        "grad_norm": 0.9,
        "ema_decay": 0.996,
        "samples": step * 64,
        "quarantined": 0,
        "skipped_nonfinite": 0,
        "time/step": 2.0,
        "time/data_wait": 0.5,
        "time/data_wait_share": 0.25,
        "time/backward": 1.2,
        "time/other": 0.8,
        "throughput/samples_per_s": 32.0,
        "throughput/tokens_per_s": 3136.0,
        "perf/flops_per_s": 2e12,
        "perf/mfu": 0.25,
        "memory_gib": 1.25,
        **(changes or {}),
    }
    made = StepRecord(step, tuple(groups), {name: value for name, value in figures.items() if value is not None})
    of_groups = {f"{name}/{kind}": value for name, values in groups.items() for kind, value in values.items()}
    of_features = {"dense_std": 0.5, "pooled_rank": 12.0} if health is None else health
    return made.with_figures(of_groups | {f"health/{name}": value for name, value in of_features.items()})


def picture() -> Picture:
    return Picture("dense_pca", "Dense features", "A green field.", Image.new("RGB", (12, 8), "green"))


REWIND = {
    "rewound_from": 25,
    "rewound_to": 20,
    "skipped_samples": 320,
    "spike_since": 23,
    "loss": math.nan,
    "limit": 4.5,
    "number": 1,
    "most": 3,
}
