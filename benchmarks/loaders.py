"""Samples a second of this project's stream and of other libraries' loaders, on the same images, in turn.

A random crop and a flip of pictures (PNG of 128 px, or JPEG made of them) to uint8 tensors in batches, with 0, 1 and 2
workers. Ours takes its state after every batch, as a run does that may be killed; the others take none. Then: how long
a loader that starts from the middle of a pass takes to its first batch, what it loses or repeats, and whether memory
grows over a long stream.

    python benchmarks/loaders.py --json

Libraries that are not installed are named with the reason; `python -m pip install -e '.[peers]'` brings most of them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from _common import emit, emoji_shards, machine, say
from _loaders import Corpus, make_corpus
from _loaders_process import Process
from _loaders_sides import OURS, SIDES, prepare

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError, UserError, did_you_mean

POSITIONS = [0.1, 0.5, 0.9]


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    data: Path = typer.Option(None, help="Folder of shards with images; default: the emoji set."),
    images: str = typer.Option("png", help="png or jpeg."),
    samples: int = typer.Option(38_400, min=64, help="Of a pass; images repeat."),
    batch: int = typer.Option(64, min=8, help="A multiple of 8."),
    crop: int = typer.Option(64, min=8, help="Side in pixels."),
    workers: list[int] = typer.Option([0, 1, 2], help="Loader processes."),
    repeats: int = typer.Option(5, min=1, help="Turns of every library."),
    draw: int = typer.Option(4_096, min=8, help="Samples of a turn."),
    decoder: str = typer.Option("pillow", help="Of the other libraries, where they take bytes: pillow or torchvision."),
    only: list[str] = typer.Option([], help="Only these libraries."),
    resume: bool = typer.Option(True, help="Measure resumes."),
    memory_s: float = typer.Option(120.0, min=0, help="Seconds of the stream whose memory is watched; 0: none."),
    hour: bool = typer.Option(False, "--hour", help="Watch memory for an hour."),
    folder: Path = typer.Option(None, help="Keeps the layouts for another run; default: a temporary folder."),
) -> None:
    """Print {workers: {count: {library: samples/s}}, ratio_to_fastest, resume_s, resume, memory, missing, machine}."""
    try:
        kind = _one_of("--images", images, {"png": "png", "jpeg": "jpg"})
        decoder = _one_of("--decoder", decoder, {"pillow": "pillow", "torchvision": "torchvision"})
        for name in only:
            _one_of("--only", name, {side: side for side in SIDES})
        names = [name for name in SIDES if not only or name in only or name == OURS]
        with tempfile.TemporaryDirectory() as temporary:
            place = folder or Path(temporary) / "layouts"
            corpus = _corpus(data, place, samples, kind, crop)
            missing = _prepare(corpus, names)
            settings = {"folder": str(place), "samples": corpus.samples, "kind": kind, "batch": batch, "crop": crop}
            settings["decoder"] = decoder
            sides = [Process(name, settings, place / f"{name}.log") for name in names if name not in missing]
            try:
                found = _measure(sides, workers, repeats, draw, resume, 3_600.0 if hour else memory_s)
            finally:
                for side in sides:
                    side.end()
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    missing |= {side.name: side.fault for side in sides if side.fault is not None}
    emit(
        {
            **found,
            "missing": missing,
            "settings": {**settings, "folder": None, "draw": draw, "repeats": repeats},
            "machine": machine(),
        }
    )


def _one_of(option: str, value: str, known: dict[str, str]) -> str:
    if value not in known:
        raise ConfigError(f"'{value}' is not known", where=option, fix=did_you_mean(value, list(known)))
    return known[value]


def _corpus(data: Path | None, place: Path, samples: int, kind: str, crop: int) -> Corpus:
    if (place / "tar").exists():
        made = sum(1 for _ in Corpus(place, 0, kind).encoded())
        if made != samples // 64 * 64:
            raise ConfigError(f"it holds {made} samples of kind {kind}", where=str(place), fix="give another --folder")
        return Corpus(place, made, kind)
    say("making the layouts …")
    return make_corpus(data if data is not None else emoji_shards() / "train", place, samples, kind, crop)


def _prepare(corpus: Corpus, names: list[str]) -> dict[str, str]:
    """Make the layouts; why libraries are missing."""
    missing: dict[str, str] = {}
    for name in names:
        why = SIDES[name].why_missing()
        if why is None:
            try:
                prepare(corpus, [name])
            except Exception as error:  # a library that cannot write its layout is told, like one that is not there
                why = f"its layout could not be made: {type(error).__name__}: {error}"[:400]
        if why is not None:
            say(f"{name} is missing: {why}")
            missing[name] = why
    return missing


def _measure(
    sides: list[Process], workers: list[int], repeats: int, draw: int, resume: bool, memory_s: float
) -> dict[str, Any]:
    speeds = {str(count): _speeds(sides, count, repeats, draw) for count in workers}
    found: dict[str, Any] = {
        "workers": {count: {name: values["median"] for name, values in of.items()} for count, of in speeds.items()},
        "best": {count: {name: values["best"] for name, values in of.items()} for count, of in speeds.items()},
        "ratio_to_fastest": {count: _ratio(of, "median") for count, of in speeds.items()},
        "ratio_to_fastest_best": {count: _ratio(of, "best") for count, of in speeds.items()},
    }
    if resume:
        say("resumes …")
        told = {side.name: side.ask("resume", shares=POSITIONS) for side in sides}
        found["resume"] = {name: answer for name, answer in told.items() if answer}
        found["resume_s"] = {name: _slowest(of["seconds"]) for name, of in found["resume"].items()}
    if memory_s:
        say(f"memory, {memory_s:g} s …")
        ours = next(side for side in sides if side.name == OURS)
        ours.ask("open", workers=max(workers))
        found["memory"] = ours.ask("remember", seconds=memory_s)
        ours.ask("close")
    return found


def _speeds(sides: list[Process], workers: int, repeats: int, draw: int) -> dict[str, dict[str, float]]:
    """Samples a second of every library, drawn in turn; the order of the turns rotates."""
    say(f"{workers} workers …")
    for side in sides:
        side.ask("open", workers=workers)
    seen: dict[str, list[float]] = {side.name: [] for side in sides}
    for repeat in range(repeats):
        first = repeat % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            answer = side.ask("draw", samples=draw)
            if answer:
                seen[side.name].append(answer["samples"] / answer["seconds"])
    for side in sides:
        side.ask("close")
    return {name: {"median": statistics.median(values), "best": max(values)} for name, values in seen.items() if values}


def _slowest(seconds: dict[str, float | None]) -> float | None:
    """Of the positions at which the library gave anything."""
    return max((value for value in seconds.values() if value is not None), default=None)


def _ratio(speeds: dict[str, dict[str, float]], which: str) -> float | None:
    """Ours ÷ the fastest other; None where there is none."""
    others = [values[which] for name, values in speeds.items() if name != OURS]
    return speeds[OURS][which] / max(others) if others and OURS in speeds else None


if __name__ == "__main__":
    typer.run(main)
