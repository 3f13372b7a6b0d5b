"""Train twelve methods on Imagenette with the settings of a published table, and compare the results.

    python benchmarks/league.py --dry-run --json
    python benchmarks/league.py --data /data/photos/imagenette --json [--only mae --only simclr] [--hours 24]
    python benchmarks/league.py --data /data/photos/imagenette --small --json

ViT-S/16 at 224 pixels, 200 epochs (protocols/imagenette/*.yaml; docs/benchmarks/league.md lists the differences). Needs
a GPU, except with --small: 64 pixels and a small ViT, to try the commands on a CPU. Trainings have a folder in --output
and resume; finished ones are not repeated. `m3i-scale report RUN OUTPUT/curves-200-epochs/mae` overlays a run and a
curve.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
import typer
from _common import emit, machine, say
from _league import EPOCHS, METHODS, LeagueRun, Size, plan_method
from _trainings import train_all
from filelock import FileLock, Timeout
from PIL import Image

from m3i_scale.data.images import READ_FORMATS
from m3i_scale.errors import EXIT_FAILED, EXIT_USER_ERROR, ConfigError, DataError, UserError, did_you_mean

SMALL_EPOCHS = 10
SMALL_METHODS = ("mae", "simclr", "byol")
POINTS, SMALL_POINTS = 20, 5
"""Number of evaluations of a training."""
LEAST_SIDE = 224
"""Minimum short side of the stored images, in pixels. Crops of smaller images would be enlarged."""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    data: Path = typer.Option(None, help="Folder with train and val shards of Imagenette (examples/photos.py)."),
    output: Path = typer.Option(Path("runs/league"), help="Keeps every training's result."),
    only: list[str] = typer.Option([], help="Only these methods; default with --small: mae, simclr, byol."),
    hours: float = typer.Option(None, min=0.01, help="Start no training after this many hours."),
    epochs: int = typer.Option(None, min=1, help=f"Default: {EPOCHS}; {SMALL_EPOCHS} with --small."),
    small: bool = typer.Option(False, help="64 pixels and a ViT with 6 layers of width 192."),
    dry_run: bool = typer.Option(False, help="Only print the estimated hours on one H100."),
    workers: int = typer.Option(0, min=0, help="Trainings at a time; 0: one per core, or one per GPU."),
    markdown: Path = typer.Option(None, help="Also write the table."),
) -> None:
    """Print {method: {knn, linear, best_knn, best_linear, published, …}}, not_run, failed, settings, machine.

    Exit with 1 if a training failed.
    """
    size = Size(small, epochs or (SMALL_EPOCHS if small else EPOCHS))
    names = list(dict.fromkeys(only)) or list(SMALL_METHODS if small else METHODS)
    try:
        for name in names:
            if name not in METHODS:
                raise ConfigError(f"no method '{name}' in the league", fix=did_you_mean(name, METHODS))
        if markdown is not None and (dry_run or not markdown.absolute().parent.is_dir()):
            why = "--dry-run has no results for --markdown" if dry_run else "no such folder"
            raise ConfigError(why, where=str(markdown), fix="leave out --markdown" if dry_run else "create the folder")
        output.mkdir(parents=True, exist_ok=True)
        if dry_run:
            document = _plan(names, size, output)
        else:
            document = _train(_runs(data, names, size, output), workers, hours, output)
    except Timeout:
        say(f"error: another league writes to {output}: wait, or use another --output")
        sys.exit(EXIT_USER_ERROR)
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    emit(document | {"settings": {"epochs": size.epochs, "small": small}, "machine": machine()})
    if markdown is not None:
        markdown.write_text(table(document, size), encoding="utf-8")
    if document.get("failed"):
        sys.exit(EXIT_FAILED)


def _plan(names: list[str], size: Size, output: Path) -> dict[str, Any]:
    """Return the estimated hours of every method and of all."""
    document: dict[str, Any] = {}
    for name in names:
        document[name] = plan_method(name, size, output / "plan.log") | {"published": _published(name)}
        say(f"{name}: {document[name]['hours']:.2f} h, {document[name]['gib']:.1f} GiB")
    return document | {"hours": sum(document[name]["hours"] for name in names)}


def _published(name: str) -> dict[str, Any]:
    one = METHODS[name]
    return {"knn": one.knn, "linear": one.linear} | ({"note": one.note} if one.note else {})


def _runs(data: Path | None, names: list[str], size: Size, output: Path) -> list[LeagueRun]:
    """Return the trainings.

    Raises:
        ConfigError: no data, or full-size trainings without a GPU.
        DataError: the folder does not have the shards, or their images are too small.
    """
    if data is None:
        raise ConfigError("--data is required", fix="--data /data/photos/imagenette, or --dry-run")
    if not (size.small or torch.cuda.is_available()):
        raise ConfigError("full-size trainings take days per method without a GPU", fix="add --small or --dry-run")
    digest = hashlib.sha256()
    for split in ("train", "val"):
        manifest = data / split / "manifest.json"
        if not manifest.is_file():
            fix = f"python examples/photos.py … --image-size {64 if size.small else 256}"
            raise DataError(f"no shards of '{split}'", where=str(manifest.parent), fix=fix)
        digest.update(manifest.read_bytes())
    if not size.small and (side := _side(data / "train")) < LEAST_SIDE:
        raise DataError(
            f"images must have at least {LEAST_SIDE} pixels, got {side}",
            where=str(data),
            fix="python examples/photos.py … --image-size 256",
        )
    points = SMALL_POINTS if size.small else POINTS
    return [LeagueRun(name, 0, output, data.absolute(), digest.hexdigest(), size, points) for name in names]


def _side(shards: Path) -> int:
    """Return the short side of the first image."""
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith((".jpg", ".png", ".webp")):
                    with Image.open(io.BytesIO(tar.extractfile(member).read()), formats=READ_FORMATS) as image:
                        return min(image.size)
    raise DataError("the shards contain no images", where=str(shards))


def _train(runs: list[LeagueRun], workers: int, hours: float | None, output: Path) -> dict[str, Any]:
    """Run the trainings, and return their results. Those that fail do not stop the others."""
    end = time.monotonic() + 3600 * hours if hours else float("inf")

    def work(run: LeagueRun, environment: dict[str, str]) -> dict[str, Any]:
        if time.monotonic() > end and not (run.folder / "result.json").is_file():
            return {}
        try:
            result = run.result(environment)
        except UserError as fault:
            say(f"{run.name}: {fault}")
            return {"error": str(fault)}
        run.share_curve()
        return result | {"published": _published(run.name)}

    with FileLock(output / ".lock", timeout=0):
        results = dict(zip((run.name for run in runs), train_all(runs, workers, work), strict=True))
    document: dict[str, Any] = {name: result for name, result in results.items() if result and "error" not in result}
    document["not_run"] = [name for name, result in results.items() if not result]
    return document | {"failed": {name: result["error"] for name, result in results.items() if "error" in result}}


def table(document: dict[str, Any], size: Size) -> str:
    """Return the results in percent as a Markdown table, with the published ones if the size is theirs."""
    lines = ["| method | kNN, best (last) | published | linear, best (last) | published |", "|---|---|---|---|---|"]
    for name, row in document.items():
        if name in METHODS:
            ours = [f"{100 * row[f'best_{one}']:.1f} ({100 * row[one]:.1f})" for one in ("knn", "linear")]
            published = [str(row["published"][one]) if size.is_published else "–" for one in ("knn", "linear")]
            lines.append(f"| {name} | {ours[0]} | {published[0]} | {ours[1]} | {published[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
