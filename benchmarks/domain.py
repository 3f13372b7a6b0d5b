"""Going on from weights on a domain: what is gained there, what is lost elsewhere, and what an anchor saves of that.

A start is trained on general pictures, `m3i` on emoji in color. It goes on by `continue_m3i` on pictures that it has
never seen, of other things and as a scanner would have them: once with the anchor, which keeps its features near what
they were, and once without. All three are measured by `m3i-scale compare` on both sets. Several seeds, each with its
own start; differences are those between trainings of the same seed, with 95 % intervals over seeds.

    python benchmarks/domain.py --json [--seeds 3] [--start-steps 2000] [--steps 1000] [--output runs/domain]

What is done is not done again: results lie in --output, a folder for every training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
from _common import emit, emoji_shards, machine, say
from _domain import FIGURES, LAYER_DECAY, LR, GoneOn, Sets, Start, open_sets
from _intervals import LEVEL, mean_interval
from _one_stage_data import EMOJI
from _trainings import train_all
from filelock import FileLock, Timeout

from m3i_scale.errors import EXIT_USER_ERROR, UserError

SIDES = {"after": True, "after_without_anchor": False}
"""What goes on, and whether it is anchored."""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    output: Path = typer.Option(Path("runs/domain"), help="Keeps every training's result, and the two sets."),
    seeds: int = typer.Option(3, min=2, help="Starts, and trainings of each side that go on from them."),
    start_steps: int = typer.Option(2000, min=2, help="Steps of a start."),
    steps: int = typer.Option(1000, min=2, help="Steps on the domain."),
    workers: int = typer.Option(0, min=0, help="Trainings at a time; 0: one a core, or one a GPU."),
) -> None:
    """Print {domain, general: {measure: {before, after, after_without_anchor, difference, difference_without_anchor,
    anchor: {mean, low, high, seeds}}}}, settings, machine. `anchor` is the one side minus the other.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / ".lock", timeout=0):
            sets = open_sets(emoji_shards(), output.absolute() / "sets")
            document = compared(sets, output.absolute(), seeds, start_steps, steps, workers)
    except Timeout:
        say(f"error: another comparison writes into {output}: wait for it, or give another --output")
        sys.exit(EXIT_USER_ERROR)
    except UserError as fault:
        say(f"error: {fault}")
        sys.exit(EXIT_USER_ERROR)
    emit(document | {"machine": machine()})


def compared(sets: Sets, output: Path, seeds: int, start_steps: int, steps: int, workers: int) -> dict[str, Any]:
    """Train all, and return the figures by set and measure, and the settings."""
    starts = [Start("start", seed, output, sets, start_steps) for seed in range(seeds)]
    train_all(starts, workers)
    gone_on = [
        GoneOn(side, start.seed, output, sets, steps, start, anchored)
        for side, anchored in SIDES.items()
        for start in starts
    ]
    results = train_all(gone_on, workers)
    by_side = {
        side: [result["sets"] for one, result in zip(gone_on, results, strict=True) if one.name == side]
        for side in SIDES
    }
    settings = {
        **{"seeds": seeds, "start_steps": start_steps, "steps": steps, "batch": EMOJI.batch, "lr": LR},
        **{"layer_decay": LAYER_DECAY, "level": LEVEL},
        "samples": {"general": sets.general.samples, "domain": sets.domain.samples},
        "classes": {"general": sets.general.classes["main"], "domain": sets.domain.classes["main"]},
    }
    figures = {
        name: {measure: _figures(by_side, name, measure) for measure in FIGURES} for name in ("domain", "general")
    }
    return figures | {"settings": settings}


def _figures(by_side: dict[str, list[dict[str, Any]]], name: str, measure: str) -> dict[str, Any]:
    """Return means over seeds, and differences seed by seed, of one measure on one set."""
    anchored, free = ([sets[name][measure] for sets in by_side[side]] for side in SIDES)
    before = [figures["before"] for figures in anchored]
    after, without = ([figures["after"] for figures in side] for side in (anchored, free))
    return {
        "before": mean_interval(before),
        "after": mean_interval(after),
        "after_without_anchor": mean_interval(without),
        "difference": _paired(after, before),
        "difference_without_anchor": _paired(without, before),
        "anchor": _paired(after, without),
    }


def _paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    return mean_interval([one - other for one, other in zip(ours, theirs, strict=True)])


if __name__ == "__main__":
    typer.run(main)
