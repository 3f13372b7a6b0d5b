"""A run's folder with everything in it that a report can show, written in a moment and without training."""

from __future__ import annotations

import json
import math
import random
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.layout import step_name
from m3i_scale.config import load_run
from m3i_scale.files import json_line, write_json

GROUPS = {"intra": (1.3, 0.5), "inter": (1.4, 0.6), "text": (4.2, 2.1), "category": (2.2, 0.7)}
"""Loss at the start and at the end."""
SOURCES = {"photos": 0.75, "birds": 0.25}
PHASES = {
    "data": 0.06,
    "forward": 0.24,
    "teacher": 0.1,
    "heads": 0.11,
    "backward": 0.38,
    "reduce": 0.03,
    "optimizer": 0.05,
}
PICTURES = {
    "views": ("The batch as the model sees it", "Four images, each with its two views and its mask"),
    "dense_pca": ("Dense features, first three principal components", "Four images beside their features as colors"),
}
START = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)


def write_run(folder: Path, *, name: str = "photos-vit-l", steps: int = 2000, lr: float = 1e-3, seed: int = 0) -> Path:
    """A finished run, logged every 10 steps; on the way a host was lost, it was resumed, rewound and warned."""
    folder.mkdir(parents=True)
    overrides = [
        f"name={name}",
        f"output_dir={folder}",
        *(f"data.datasets.{source}.path=/data/{source}/train" for source in SOURCES),
        *(f"data.datasets.{source}.weight={weight}" for source, weight in SOURCES.items()),
        f"optim.steps={steps}",
        f"optim.lr={lr}",
        "optim.warmup_steps=100",
        "backbone.preset=vit-l/16",
        "checkpoint.keep_best={metric: evaluation/text/loss, mode: min, count: 1}",
    ]
    (folder / "run.yaml").write_text(
        yaml.safe_dump(load_run("m3i", overrides).model_dump(mode="json")), encoding="utf-8"
    )
    lines = _metrics(name, steps, lr, random.Random(seed))
    (folder / "metrics.jsonl").write_text("".join(map(json_line, lines)), encoding="utf-8")
    for step in (steps // 2, steps * 3 // 4, steps):
        _checkpoint(folder / "checkpoints" / step_name(step), step)
    _quarantine(folder)
    _evaluations(folder, steps)
    _attempts(folder, steps)
    for step in (steps // 2, steps):
        _pictures(folder / "pictures" / step_name(step), step)
    return folder


def _metrics(name: str, steps: int, lr: float, draw: random.Random) -> list[dict[str, Any]]:
    def line(kind: str, step: int, **values: Any) -> dict[str, Any]:
        time = (START + timedelta(seconds=1.9 * step)).isoformat(timespec="milliseconds")
        return {"kind": kind, "step": step, "time": time, **values}

    start = {
        "name": name,
        "total_steps": steps,
        "world_size": 8,
        "flop_per_step": 4e15,
        "peak_tflops": 989.0,
        "peak_source": "h100-bf16",
        "device": "NVIDIA H100 80GB HBM3",
        "micro_batch_size": 64,
    }
    resumed, rewound, warned = steps // 4, steps // 2, steps * 5 // 8
    lines = [line("run", 0, **start)]
    for step in range(10, steps + 1, 10):
        lines.append(line("train", step, **_figures(step / steps, step, lr, draw)))
        if step == resumed:
            lines.append(line("run", step, **start | {"world_size": 4}))
        if step == rewound:
            limits = {"spike_since": step + 30, "loss": "inf", "limit": 12.5, "number": 1, "most": 3}
            lines.append(line("rewind", step, rewound_from=step + 40, rewound_to=step, skipped_samples=20480, **limits))
        if step == warned:
            words = {"what": "a group dominates the gradient", "why": "grad_norm of text is 120 times that of inter"}
            lines.append(line("warning", step, group="text", fix="lower its weight", **words))
        if step % (steps // 10) == 0:
            losses = {f"evaluation/{group}/loss": _falling(group, step / steps) + 0.1 for group in GROUPS}
            figures = losses | {"evaluation/category/top_1": 0.7 * step / steps}
            lines.append(line("evaluation", step, **figures))
    return [*lines, line("end", steps, status="finished")]


def _falling(group: str, share: float) -> float:
    start, end = GROUPS[group]
    return end + (start - end) * math.exp(-4 * share)


def _figures(share: float, step: int, lr: float, draw: random.Random) -> dict[str, Any]:
    """The figures of a logged step; `share` of the run is done."""

    def about(value: float) -> float:
        return value * draw.uniform(0.96, 1.04)

    values: dict[str, Any] = {"lr": lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * share))}
    losses = {group: about(_falling(group, share)) for group in GROUPS}
    values |= {"loss": sum(losses.values()), "samples": step * 512, "quarantined": int(share * 5)}
    for group, loss in losses.items():
        values |= {
            f"loss/{group}": loss,
            f"mi/{group}": max(0.0, GROUPS[group][0] - loss),
            f"loss_weight/{group}": 1.0 + 0.2 * math.sin(3 * share),
            f"grad_norm/{group}": about(0.002),
            f"loss_samples/{group}": 512.0,
        }
    for source, asked in SOURCES.items():
        values |= {f"dataset/{source}/share": about(asked), f"dataset/{source}/asked": asked}
        values |= {f"dataset/{source}/recent_share": about(asked), f"dataset/{source}/recent_asked": asked}
        values[f"dataset/{source}/epoch"] = 2 * share
    wait_s, step_s = about(0.1), about(1.9)
    return values | {
        "information": about(3 * share),
        "grad_norm": "inf" if step == 50 else about(2.5),
        "ema_decay": 1 - 0.004 * (1 - share),
        "skipped_nonfinite": 0,
        "time/step": step_s,
        "time/data_wait": wait_s,
        "time/data_wait_share": wait_s / step_s,
        "throughput/samples_per_s": 512 / step_s,
        "throughput/tokens_per_s": 512 * 196 / step_s,
        "perf/flops_per_s": 4e15 / step_s,
        "perf/mfu": 4e15 / step_s / (8 * 989e12),
        **{f"time/{phase}": value * step_s for phase, value in PHASES.items()},
        "time/other": (1 - sum(PHASES.values())) * step_s,
        "memory_gib": 61.5 + share,
        "health/dense_std": about(0.8),
        "health/dense_rank": about(40.0),
        "health/text_spread": about(0.6),
        "health/text_scale": 14 + 20 * share,
    }


def _checkpoint(final: Path, step: int) -> None:
    temporary = begin(final)
    (temporary / "meta.json").write_text(json.dumps({"step": step, "samples": step * 512, "world_size": 8}))
    (temporary / "buffers.safetensors").write_bytes(bytes(100_000))
    commit(final, temporary, {"step": step, "world_size": 8})


def _quarantine(folder: Path) -> None:
    entries = [
        ("photos", "/data/photos/train/images-000000.tar", "k0001", "image cannot be decoded"),
        ("photos", "/data/photos/train/images-000000.tar", "k0002", "no image"),
        ("birds", "https://example.org/b-000003.tar", "*", "shard lost"),
    ]
    lines = [
        {"source": source, "url": url, "key": key, "offset": 0, "reason": reason, "detail": "seen at its decoding"}
        for source, url, key, reason in entries
    ]
    (folder / "quarantine.jsonl").write_text("".join(map(json_line, lines)), encoding="utf-8")


def _evaluations(folder: Path, steps: int) -> None:
    def measured(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.03, "high": value + 0.03, "level": 0.95, "unit": "sample"}

    knn = {"k=10": measured(0.53), "k=20": measured(0.54), "chance": 0.1, "majority": 0.2}
    linear = {"accuracy": measured(0.61), "C": 1.0, "chance": 0.1, "majority": 0.2}
    model = {"name": "export", "type": "vit", "image_size": 224, "export": {"checkpoint": step_name(steps)}}
    data = {"samples": 1000, "labelled": 1000, "captioned": 1000}
    evaluation = {"model": model, "data": data, "level": 0.95, "measures": {"knn": knn, "linear": linear}}
    write_json(folder / "evaluation.json", evaluation | {"not_measured": {"dense": "no masks"}, "warnings": []})
    fine_tuned = {"task": "classification", "protocol": "finetune", "published": None, "deviations": ["fewer epochs"]}
    figures = {"top-1": measured(0.71), "classes": 10}
    write_json(
        folder / "finetune.json", fine_tuned | {"samples": 900, "classes": 10, "top_1": 71.0, "figures": figures}
    )


def _attempts(folder: Path, steps: int) -> None:
    cause = {"time": START.timestamp() + 500, "host": "node1", "rank": 5, "step": steps // 4, "phase": "backward"}
    cause |= {"kind": "host", "message": "the host does not answer", "exit_code": None, "lines": [], "trace": []}
    first = {"attempt": 1, "hosts": ["node0", "node1"], "ranks": 8, "status": "failed", "first_step": 1}
    first |= {"last_step": steps // 4 + 3, "started": START.timestamp(), "ended": START.timestamp() + 500}
    first |= {"lost": ["node1"], "left_out": {}, "came_back": [], "left": {}, "cause": cause}
    first |= {"micro_batch_size": 8, "logs": str(folder / "logs" / "001")}
    second = first | {"attempt": 2, "hosts": ["node0"], "ranks": 4, "status": "finished", "first_step": steps // 4 + 1}
    second |= {"last_step": steps, "started": START.timestamp() + 520, "ended": START.timestamp() + 1.9 * steps}
    write_json(folder / "attempts.json", [first, second | {"lost": [], "cause": None}])


def scene() -> Image.Image:
    image = Image.effect_noise((160, 120), 60).convert("RGB")
    ImageDraw.Draw(image).ellipse((30, 20, 110, 100), fill=(220, 90, 40))
    return image


def _pictures(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    entries = []
    for name, (title, alt) in PICTURES.items():
        scene().save(folder / f"{name}.jpg")
        entries.append({"name": name, "file": f"{name}.jpg", "title": title, "alt": alt})
    write_json(folder / "pictures.json", {"step": step, "pictures": entries})
