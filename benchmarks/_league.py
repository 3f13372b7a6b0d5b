"""Trainings of `league.py`: the configs of protocols/imagenette, and their results during training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _trainings import ROOT, Training, tool

from m3i_scale.config import load_run, run_values
from m3i_scale.errors import UserError
from m3i_scale.report.run_files import read_run

PROTOCOLS = ROOT / "protocols" / "imagenette"
EPOCHS = 200
"""Number of epochs in the protocols."""


@dataclass(frozen=True)
class Published:
    """Published results of a method, in percent."""

    knn: float
    linear: float
    encoder: str = "student"
    """Encoder that was evaluated there: student or ema (EMA teacher)."""
    pool: str = "cls"
    """Its features: class token or mean patch token."""
    note: str = ""


METHODS = {
    "dino": Published(83.8, 86.1, "ema"),
    "mae": Published(72.1, 84.1, pool="mean"),
    "barlow": Published(81.2, 83.0),
    "vicreg": Published(75.0, 79.4),
    "simclr": Published(73.3, 74.9),
    "moco": Published(70.0, 70.8, "ema"),
    "byol": Published(56.0, 63.9, "ema"),
    "simsiam": Published(54.9, 62.8),
    "ibot": Published(43.3, 57.9, "ema"),
    "dinov2": Published(29.6, 37.2, "ema", note="at epoch 37 of 200, unfinished"),
    "ijepa": Published(33.2, 34.0, pool="mean"),
    "data2vec": Published(31.0, 26.3, "ema", note="probe fitted on the mean patch token, tested on the class token"),
}
"""stable-pretraining (github.com/rbalestr-lab) at 9aa93f8b, benchmarks/imagenet10/RESULTS.md, of 2026-05-11. Each is
the best value over the epochs, chosen on the validation images."""
SMALL = (
    "backbone.preset=null",
    "backbone.config={hidden_size: 192, num_hidden_layers: 6, num_attention_heads: 3, intermediate_size: 768, "
    "image_size: 64, patch_size: 16}",
)
"""Backbone of `--small`: the patch size of the protocols, so 4 × 4 patches."""


@dataclass(frozen=True)
class Size:
    """Size of the trainings, as set by `--small` and `--epochs`."""

    small: bool
    epochs: int

    @property
    def is_published(self) -> bool:
        """Return whether the results can be compared with the published ones."""
        return not self.small and self.epochs == EPOCHS

    @property
    def title(self) -> str:
        """Return a name for folders."""
        return f"{'small-' if self.small else ''}{self.epochs}-epochs"

    def overrides(self, method: str) -> list[str]:
        """Return the changes to the protocol of a method. The warm-up stays a hundredth of the steps."""
        run = load_run(str(PROTOCOLS / f"{method}.yaml"))
        steps = max(2, round(run.optim.steps * self.epochs / EPOCHS))
        overrides = [f"optim.steps={steps}", f"optim.warmup_steps={max(1, steps // 100)}"]
        overrides += [] if torch.cuda.is_available() else ["deepspeed=zero1_cpu_fp32"]
        if self.small:
            overrides += SMALL
            views = run.recipe.get("views", [])
            overrides += [f"recipe.views.{number}.size=32" for number, view in enumerate(views) if "size" in view]
            targets = enumerate(run.recipe["targets"])
            overrides += [f"recipe.targets.{number}.layers=6" for number, target in targets if "layers" in target]
        return overrides


@dataclass(frozen=True)
class LeagueRun(Training):
    """Training of one method, evaluated while it trains."""

    code = (*Training.code, "benchmarks/_league.py", "protocols/imagenette")
    data: Path
    """Folder with train and val shards."""
    sha256: str
    """SHA-256 of the manifests."""
    size: Size
    points: int
    """Number of evaluations."""

    def values(self, folder: Path) -> dict[str, Any]:
        """Return the config of the protocol with data, output folder and online evaluation."""
        values = run_values(str(PROTOCOLS / f"{self.name}.yaml"), self.size.overrides(self.name))
        values |= {"output_dir": str(folder / "run"), "seed": self.seed}
        values["data"] = values["data"] | {"datasets": {"main": {"path": str(self.data / "train")}}}
        values["checkpoint"] = {"every_steps": max(1, values["optim"]["steps"] // 10), "keep_latest": 1}
        values["log"] = {"every_steps": 20, "progress": False}
        online = {
            "every_steps": max(1, values["optim"]["steps"] // self.points),
            "metrics": ["knn", "linear", "rankme"],
        }
        online |= {"data": str(self.data / "val"), "train_data": str(self.data / "train")}
        online |= (
            {"samples": 2000, "train_samples": 4000} if self.size.small else {"samples": 3925, "train_samples": 9469}
        )
        values["evaluation"] = {"online": online | {"pool": METHODS[self.name].pool}}
        return values

    def depends(self) -> tuple[dict[str, Any], list[Any]]:
        """Return the config without paths, and the SHA-256 of the data."""
        values = self.values(Path())
        values["data"]["datasets"]["main"]["path"] = values["evaluation"]["online"]["data"] = ""
        values["evaluation"]["online"]["train_data"] = ""
        return values, [self.sha256]

    def measured(self, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Return the metrics of the last evaluation, the best accuracies, and the curve over all evaluations."""
        run = read_run(folder / "run")
        prefix = f"evaluation/{METHODS[self.name].encoder}/"
        curve = [
            {"step": line["step"], **{name: line[prefix + name] for name in ("knn", "linear", "rankme")}}
            for line in run.evaluations
            if prefix + "knn" in line and line["step"] > 0  # step 0 evaluates the initial weights
        ]
        if not curve:
            raise UserError(
                "the run has no evaluation", where=str(folder / "run"), fix="remove the folder, and try again"
            )
        best = {f"best_{name}": max(point[name] for point in curve) for name in ("knn", "linear")}
        return {"steps": run.step, **curve[-1], **best, "curve": curve}

    def share_curve(self) -> None:
        """Copy the metrics into a folder that `m3i-scale report` overlays with other runs."""
        folder = self.output / f"curves-{self.size.title}" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "run" / "metrics.jsonl", folder / "metrics.jsonl")


def plan_method(method: str, size: Size, log: Path) -> dict[str, float]:
    """Return the hours and the memory in GiB that a training takes on one H100, estimated by `m3i-scale plan`."""
    overrides = [one for one in size.overrides(method) if not one.startswith("deepspeed=")]
    document = tool(["plan", str(PROTOCOLS / f"{method}.yaml"), *overrides, "--ranks-per-node", "1"], log, {})
    return {"hours": document["gpu_hours"], "gib": document["peak_gib_per_rank"]}
