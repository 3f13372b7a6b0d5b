"""Resume on other numbers of ranks, under other ZeRO stages, in another precision, and compare the loss curve with that
of a run that stays as it is.

The whole all-in-one recipe, EMA teacher included, on shards that the benchmark makes itself. Every segment is a run
of its own that resumes from the checkpoint of the one before. In fp32 the curves differ by the order of additions only;
in the last chain a part is computed in bf16.

    python benchmarks/reshard.py --json
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import typer
from _common import emit, machine, say
from _reshard import Shape, largest_difference, run_chain
from _shards import make_shards


def fp32(ranks: int, stage: int) -> Shape:
    """A segment in fp32."""
    return Shape(ranks, "zero3_cpu_fp32") if stage == 3 else Shape(ranks, "zero1_cpu_fp32", stage)


OFFLOAD = Shape(1, "zero3_bf16_cpu_offload")
CHAINS = {
    "4 → 2 → 3 → 1 → 2 ranks, ZeRO-3": [fp32(ranks, 3) for ranks in (4, 2, 3, 1, 2)],
    "ZeRO 3 → 1 → 2 → 3, 2 ranks": [fp32(2, stage) for stage in (3, 1, 2, 3)],
    "both: (3, ZeRO-1) → (1, ZeRO-3) → (4, ZeRO-2)": [fp32(3, 1), fp32(1, 3), fp32(4, 2)],
    "bf16 on 2 → fp32 on 1 → bf16, optimizer offloaded": [Shape(2, "zero3_cpu"), fp32(1, 3), OFFLOAD],
}
TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2
"""Relative; the order of additions grows with every step."""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    steps: int = typer.Option(4, help="Of every segment."),
) -> None:
    """Print {chains: [{name, steps, max_loss_difference, seconds}], machine}; exit code 1 where a curve differs."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder, samples_per_shard=8)
        longest = max(len(shapes) for shapes in CHAINS.values())
        say(f"the run that stays as it is, {longest * steps} steps on one rank …")
        wanted = run_chain(folder, shards, "whole", [fp32(1, 1)], longest * steps)
        for number, (title, shapes) in enumerate(CHAINS.items()):
            say(f"{title} …")
            started = time.perf_counter()
            losses = run_chain(folder, shards, f"chain-{number}", shapes, steps)
            same_steps = {step: wanted[step] for step in range(1, steps * len(shapes) + 1)}
            found.append(
                {
                    "name": title,
                    "steps": len(losses),
                    "max_loss_difference": largest_difference(losses, same_steps),
                    "tolerance": BF16_TOLERANCE if "bf16" in title else TOLERANCE,
                    "seconds": time.perf_counter() - started,
                }
            )
    emit({"chains": found, "machine": machine()})
    raise typer.Exit(int(any(chain["max_loss_difference"] > chain["tolerance"] for chain in found)))


if __name__ == "__main__":
    typer.run(main)
