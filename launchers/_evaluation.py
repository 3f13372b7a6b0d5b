"""Evaluate the quickstart's export, random weights and raw pixels in an art style that training has not seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors.torch import load_file, save_file

from m3i_scale import build_objective
from m3i_scale.config import RunConfig
from m3i_scale.errors import UserError
from m3i_scale.evaluation.commands import evaluate as evaluate_model
from m3i_scale.evaluation.compare import compare
from m3i_scale.files import write_json
from m3i_scale.output import quiet_loading

COMMAND = [sys.executable, "-m", "m3i_scale"]
ASKED = ("retrieval", "dense", "few_shot", "linear")
PICTURES, DENSE_PCA = "evaluation_pictures", "dense_pca.jpg"
MODEL_PREFIXES = {".": "student.model.", "text": "text.model."}
"""Names of the training module begin with these, by folder of an export."""


@dataclass(frozen=True)
class Measure:
    """A row of the table of results."""

    title: str
    name: str
    label: str
    """In the documents of `evaluate` and `compare`."""

    @property
    def is_probe(self) -> bool:
        """Return whether raw pixels can be measured, too."""
        return self.name != "retrieval"


MEASURES = (
    Measure("image → text retrieval, R@10", "retrieval", "image_to_text R@10"),
    Measure("text → image retrieval, R@10", "retrieval", "text_to_image R@10"),
    Measure("class of a patch: linear probe, mean IoU", "dense", "mean_iou"),
    Measure("class of an image: 5 training images per class, accuracy", "few_shot", "k=5"),
    Measure("class of an image: linear probe, accuracy", "linear", "accuracy"),
)


def tool(*arguments: str) -> dict[str, Any]:
    """Run `m3i-scale … --json` in a new process, and return its document.

    Raises:
        UserError: the command failed; its output is printed.
    """
    done = subprocess.run([*COMMAND, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise UserError(
            f"`m3i-scale {' '.join(arguments[:2])}` failed with exit code {done.returncode}",
            why="see above",
            fix="fix the cause and rerun the same command; finished stages are kept",
        )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def write_random_weights(run: RunConfig, export: Path, to: Path) -> None:
    """Copy an export, with the initial weights of its run instead of the trained ones."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(export, to, ignore=shutil.ignore_patterns("README.md", "export.json"))
    initial = build_objective(run).state_dict()
    for folder, prefix in MODEL_PREFIXES.items():
        weights = {name.removeprefix(prefix): value for name, value in initial.items() if name.startswith(prefix)}
        save_file(weights, to / folder / "model.safetensors", {"format": "pt"})
    for path in (to / "heads").glob("*.safetensors"):
        save_file({name: initial[name] for name in load_file(path)}, path)


def evaluate(run: RunConfig, model: Path, shards: Path) -> list[str]:
    """Measure the export, random weights and raw pixels on concepts of the training data in the held-out art style.

    Writes evaluation.json, which the model card and the report show, comparison.json and pictures into the run folder.
    """
    folder, random = run.output_dir, run.output_dir / "random"
    data, pictures = folder / "held_out_style", folder / PICTURES
    write_random_weights(run, model, random)
    shutil.rmtree(pictures, ignore_errors=True)
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    for split, source in {"train": "train", "val": "style"}.items():
        (data / split).symlink_to((shards / source).resolve(), target_is_directory=True)
    val, train = str(data / "val"), str(data / "train")
    with tempfile.TemporaryDirectory() as cache, quiet_loading():  # the export's features are computed once
        options: dict[str, Any] = {"measures": ASKED, "cache_dir": Path(cache)}
        evaluation = evaluate_model(model, val, train_data=train, baseline="pixels", pictures=pictures, **options)
        comparison, _ = compare(random, model, str(data), **options)
    write_json(folder / "evaluation.json", evaluation)
    write_json(folder / "comparison.json", comparison)
    rows = results(folder)
    clear = [row for row in rows if row.is_clear]
    return [
        f"{evaluation['data']['samples']:,} images in the art style that training has not seen (Noto)",
        f"clear gain over random weights and raw pixels: {len(clear)} of {len(rows)} metrics",
        f"picture of the patch features: {pictures / DENSE_PCA}",
    ]


@dataclass(frozen=True)
class Result:
    """One metric of the trained model, of random weights and of raw pixels. Each is `value`, `low`, `high`."""

    title: str
    trained: dict[str, float]
    random: dict[str, float]
    pixels: dict[str, float] | None
    gain_over_random: dict[str, float]
    gain_over_pixels: dict[str, float] | None
    chance: float | None

    @property
    def is_clear(self) -> bool:
        """Return whether all gains exceed their confidence intervals. Without pixels, chance takes their place."""
        over_pixels = (
            self.gain_over_pixels["low"] if self.gain_over_pixels else self.trained["low"] - (self.chance or 0)
        )
        return self.gain_over_random["low"] > 0 and over_pixels > 0


def results(folder: Path) -> list[Result]:
    """Read the results of `evaluate` from a run folder."""
    names = ("evaluation.json", "comparison.json")
    evaluation, comparison = (json.loads((folder / name).read_text(encoding="utf-8")) for name in names)
    compared, baseline = comparison["sets"]["data"]["measures"], evaluation["baseline"]
    found = []
    for measure in MEASURES:
        values = compared[f"{measure.name} {measure.label}"]
        pixels = baseline["measures"][measure.name][measure.label] if measure.is_probe else None
        gain = baseline["advantage_of_model"][measure.name][measure.label] if measure.is_probe else None
        chance = None
        if not measure.is_probe:
            direction, depth = measure.label.split()
            chance = evaluation["measures"][measure.name][direction][depth]["chance"]
        title = measure.title if chance is None else f"{measure.title} (chance: {chance:.3f})"
        found.append(Result(title, values["after"], values["before"], pixels, values["difference"], gain, chance))
    return found


def results_table(folder: Path) -> Table:
    """Return what a run has learned: a row per metric, with paired confidence intervals of the gains."""
    title = f"picture of what was learned: {folder / PICTURES / DENSE_PCA}"
    table = Table(title=f"{title}\nfrozen features in the held-out art style; gains with 95% confidence intervals")
    table.add_column("metric", overflow="fold")
    for name in ("trained", "random weights", "raw pixels", "gain over random weights", "gain over raw pixels"):
        table.add_column(name, justify="right")
    for row in results(folder):
        table.add_row(
            row.title,
            f"[bold]{row.trained['value']:.3f}[/]",
            f"{row.random['value']:.3f}",
            f"{row.pixels['value']:.3f}" if row.pixels else "no text",
            _gain(row.gain_over_random),
            _gain(row.gain_over_pixels) if row.gain_over_pixels else "–",
        )
    return table


def _gain(difference: dict[str, float]) -> str:
    text = f"{difference['value']:+.3f} ({difference['low']:+.3f} … {difference['high']:+.3f})"
    return f"[green]{text}[/]" if difference["low"] > 0 else text
