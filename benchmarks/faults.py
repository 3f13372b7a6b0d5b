"""Kill a training run hundreds of times, most of them inside a save, and see that nothing that was committed is lost.

The whole all-in-one recipe under ZeRO-3 on two ranks, with a save in the background every second step. A rank, all
ranks or the launcher get SIGKILL: at a random file operation of a load, a save, a commit or retention, or at a random
moment. Some plans go on with other numbers of ranks. All processes are forks of this one, which has imported all.

    python benchmarks/faults.py --json
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: forks must not inherit threads

import typer
from _common import emit, machine, say
from _faults import KILLS_A_PLAN, Bench
from _shards import make_shards

import m3i_scale.run.train  # noqa: F401  all that a rank needs, before the forks


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    kills: int = 200,
    seed: int = typer.Option(-1, help="Of plans and kills; −1 draws a new one."),
    minutes: float = typer.Option(0, min=0, help="Begin no further plan after so long; 0: no limit."),
    keep: Path | None = typer.Option(None, help="Keep all runs in this folder, which must not exist."),
) -> None:
    """Print {kills, torn_points_hit, lost_commits, non_identical, resumes, seconds, …}; exit code 1 where a run lost
    anything."""
    logging.disable(logging.WARNING)
    seed = seed if seed >= 0 else random.SystemRandom().randrange(2**31)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        folder.mkdir(exist_ok=keep is None)
        bench = Bench(folder, make_shards(folder), random.Random(seed))
        say(f"{kills} kills, seed {seed}; the run that is left alone …")
        bench.left_alone()
        say(f"{bench.seconds:.1f} s, operations by rank and phase: {bench.operations}")
        while bench.found.kills < kills and not bench.found.faults:
            if minutes and time.perf_counter() - started > 60 * minutes:
                break
            bench.plan(min(KILLS_A_PLAN, kills - bench.found.kills))
            say(f"{bench.found.kills} kills, {time.perf_counter() - started:.0f} s: {dict(bench.found.by)}")
    found = bench.found
    emit(
        {
            "kills": found.kills,
            "kills_by": dict(found.by),
            "kills_in_a_save": found.in_a_save,
            "torn_points_hit": len(found.points),
            "lost_commits": found.lost_commits,
            "torn_checkpoints": found.torn,
            "resumes_from_an_older_step": found.older_resumes,
            "second_jobs_refused": found.refused,
            "non_identical": found.non_identical,
            "non_identical_on_other_ranks": found.non_identical_on_other_ranks,
            "largest_loss_difference_on_other_ranks": found.largest_loss_difference,
            "plans": found.plans,
            "plans_on_other_ranks": found.plans_on_other_ranks,
            "resumes": found.resumes,
            "faults": found.faults,
            "seed": seed,
            "seconds": time.perf_counter() - started,
            "machine": machine(),
        }
    )
    raise typer.Exit(0 if found.good() else 1)


if __name__ == "__main__":
    typer.run(main)
