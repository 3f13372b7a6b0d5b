"""Records of a run that never ran, for callbacks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from m3i_scale.run.callbacks import Picture, Rewind, RunInfo, StepRecord

CONFIG = {"name": "demo", "data": {"datasets": {"a": {"path": "https://me:hunter2@host/x.tar?signature=abc"}}}}


def info(output_dir: Path, start_step: int = 0, total_steps: int = 100) -> RunInfo:
    return RunInfo("demo", output_dir, total_steps, start_step, 2, CONFIG)


def record(step: int, **changes: Any) -> StepRecord:
    made = StepRecord(
        step=step,
        total_steps=100,
        samples=step * 64,
        loss=3.5,
        lr=1e-3,
        grad_norm=0.9,
        groups={"text": {"loss": 1.5, "nats": 2.0}, "intra": {"loss": 2.0}},
        information=2.0,
        health={"dense_std": 0.5, "health/pooled_rank": 12.0},
        ema_decay=0.996,
        step_s=2.0,
        data_wait_s=0.5,
        samples_per_s=32.0,
        tokens_per_s=3136.0,
        quarantined=0,
        memory_gib=1.25,
        times_s={"backward": 1.2, "other": 0.8},
        flop_per_s=2e12,
        mfu=0.25,
    )
    return replace(made, **changes)


def picture() -> Picture:
    return Picture("dense_pca", "Dense features", "A green field.", Image.new("RGB", (12, 8), "green"))


REWIND = Rewind(
    rewound_from=25,
    rewound_to=20,
    skipped_samples=320,
    spike_since=23,
    loss=math.nan,
    limit=4.5,
    number=1,
    most=3,
)
