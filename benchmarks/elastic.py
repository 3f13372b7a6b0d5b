"""Kill ranks and loader workers, change the numbers of both, and compare with one process that is left alone.

Random plans of segments: each runs on other ranks and workers, and most are ended by SIGKILL of a worker, of a rank or
of all, at any moment between saved states or inside of a save. Compared are keys, order and pixels of every batch.

    python benchmarks/elastic.py --json
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import typer
from _common import emit, machine, say
from _elastic import GLOBAL, STREAMS, run_plans, summary


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    plans: int = 20,
    steps: int = 60,
    seed: int = typer.Option(-1, help="Of shards, plans and kills; −1 draws a new one."),
) -> None:
    """Print {lost, repeated, order_identical, pixels_identical, plans: […], …}; exit code 1 unless 0, 0, true, true."""
    seed = seed if seed >= 0 else random.SystemRandom().randrange(2**31)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        say(f"{plans} plans of {steps} steps, {GLOBAL} samples of {STREAMS} streams each, seed {seed} …")
        results = run_plans(Path(name), plans, steps, seed)
    found = summary(results)
    good = (found["lost"], found["repeated"], found["order_identical"], found["pixels_identical"])
    seconds = time.perf_counter() - started
    emit({**found, "steps": steps, "batch": GLOBAL, "seed": seed, "seconds": seconds, "machine": machine()})
    raise typer.Exit(0 if good == (0, 0, True, True) else 1)


if __name__ == "__main__":
    typer.run(main)
