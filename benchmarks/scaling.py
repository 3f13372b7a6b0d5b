"""The tables of docs/benchmarks/scaling.md, by the package's own plan: 8 to 4,096 GPUs on three networks. Nothing is
measured.

python benchmarks/scaling.py --json
python benchmarks/scaling.py --write docs/benchmarks/scaling.md      # puts the tables between their marks
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import typer
from _common import emit, say
from _failures import best_interval, lost_share

from m3i_scale.checkpoint.stream import expected_bytes
from m3i_scale.config import load_run
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.plan.planning import (
    GIB,
    Choice,
    Estimate,
    Machine,
    Model,
    estimate,
    machine_of,
    read_vocabulary,
)
from m3i_scale.plan.search import EQUAL, choose
from m3i_scale.plan.timing import hardware, step_traffic
from m3i_scale.plan.traffic import Traffic

RUN, POLICY = "m3i_vit_g14", "none"
RANKS_PER_NODE, MICRO_BATCH = 8, 32
BATCH, SAMPLES = 32_768, 12_800_000_000
"""Of the runs: CLIP's batch size, and the samples of the paper's largest run."""
GPUS = (8, 32, 128, 512, 1024, 4096)
RUNS = (128, 512, 1024, 4096)
"""GPUs of whole runs: a GPU has 8 images or more of the batch."""
SAMPLE_KB = 25.0
STORAGE_GB_S, STALL_S, RESTART_S, DOLLARS = 20.0, 2.0, 300.0, 2.5
MTBF_HOURS = {"Llama 3": 54 * 24 * 2048 / 419, "RSC-1": 24 / 6.5e-3}


@dataclass(frozen=True)
class Fabric:
    """What a GPU has to its node, and to others; one direction."""

    intra_gb_s: float
    inter_gb_s: float
    latency_us: float | None = None
    """None: what NCCL's tuner takes."""


FABRICS = {
    "400 Gb/s a GPU": Fabric(450.0, 50.0),
    "200 Gb/s a GPU": Fabric(450.0, 25.0),
    "100 Gb/s a node": Fabric(450.0, 12.5 / RANKS_PER_NODE, 30.0),
}
"""NVLink within the node. The last is Ethernet, with a latency of TCP."""
HPZ = "zero3_bf16_hpz"
"""A DeepSpeed file that is not built in: `zero3_bf16` with second copies of the parameters in every node."""
ENGINES = {
    "ZeRO-1": "zero1_bf16",
    "ZeRO-2": "zero2_bf16",
    "ZeRO-3": "zero3_bf16",
    "ZeRO-3, all-reduces": "zero3_bf16_all_reduce",
    "ZeRO-3, hpZ 8": HPZ,
    "ZeRO++": HPZ,
}
Rows = list[list[str]]


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    gpus: list[int] = typer.Option([], help="Only the rows of these numbers of GPUs."),
    write: Path | None = typer.Option(None, help="A page whose tables are replaced."),
) -> None:
    """Print {tables: {name: {columns, rows}}, assumed}."""
    wanted = set(gpus) or {*GPUS, *RUNS}
    if unknown := wanted - {*GPUS, *RUNS}:
        say(f"error: no row of {min(unknown)} GPUs: {', '.join(map(str, GPUS))}")
        sys.exit(EXIT_USER_ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tables = make_tables(Path(folder), wanted)
    if write is not None:
        write.write_text(with_tables(write.read_text(encoding="utf-8"), tables), encoding="utf-8")
    assumed = {"mfu": hardware("h100").mfu, "sample_kb": SAMPLE_KB, "storage_gb_s": STORAGE_GB_S, "stall_s": STALL_S}
    assumed |= {"restart_s": RESTART_S, "dollars_per_gpu_hour": DOLLARS, "mtbf_hours_node": MTBF_HOURS}
    emit({"tables": {name: {"columns": t[0], "rows": t[1:]} for name, t in tables.items()}, "assumed": assumed})


def with_tables(page: str, tables: dict[str, Rows]) -> str:
    """The page with each table in place of the one between its marks."""
    for name, rows in tables.items():
        mark = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(page):
            say(f"error: the page has no '<!-- table: {name} -->' … '<!-- end -->'")
            sys.exit(EXIT_USER_ERROR)
        page = mark.sub(rf"\g<1>{markdown(rows)}\g<2>", page)
    return page


def markdown(rows: Rows) -> str:
    """A table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def make_tables(folder: Path, wanted: set[int]) -> dict[str, Rows]:
    """By name; the first row is the heading."""
    planned = Planned(folder)
    tables = {name: efficiencies(planned, fabric, wanted) for name, fabric in FABRICS.items()}
    tables["host"] = host(planned, wanted)
    tables["bytes"] = sent(planned, wanted)
    tables["calls"] = calls(planned, wanted)
    tables["memory"] = memory(planned, wanted)
    tables["runs"], tables["data"] = runs(planned, wanted)
    tables["storms"] = storms(planned, wanted)
    tables["failures"] = failures(planned, wanted)
    return tables


class Planned:
    """Estimates, each made once.

    Args:
        folder: for the DeepSpeed file that is not built in.
    """

    def __init__(self, folder: Path) -> None:
        raw = load_ds_config("zero3_bf16")
        raw["zero_optimization"]["zero_hpz_partition_size"] = RANKS_PER_NODE
        self._hpz = folder / f"{HPZ}.json"
        self._hpz.write_text(json.dumps(raw))
        self.model = cache(self._model)
        self.step = cache(self._step)

    def _model(self, gpus: int, batch: int) -> Model:
        sizes = [f"optim.batch_size={batch}", f"optim.micro_batch_size={min(MICRO_BATCH, batch // gpus)}"]
        run = load_run(RUN, [*sizes, f"backbone.activation_checkpointing={POLICY}"])
        return Model(run, read_vocabulary(run, parse_recipe(run.recipe), None, None), gpus, "bf16")

    def _step(self, engine: str, gpus: int, batch: int) -> Estimate:
        model = self.model(gpus, batch)
        file = str(self._hpz) if ENGINES[engine] == HPZ else ENGINES[engine]
        say(f"{gpus} GPUs, {engine}")
        choice = Choice(file, POLICY, model.run.optim.micro_batch_size)
        found = estimate(model, machine(gpus, FABRICS["400 Gb/s a GPU"]), choice)
        return replace(found, collectives=compressed(found.collectives)) if engine == "ZeRO++" else found

    def over(self, engine: str, gpus: int, fabric: Fabric, batch: int | None = None) -> Estimate:
        """A step over a fabric."""
        return replace(self.step(engine, gpus, batch or MICRO_BATCH * gpus), links=machine(gpus, fabric).links)


def compressed(traffic: Traffic) -> Traffic:
    """ZeRO++ (arXiv 2306.10209) beside hpZ: 8 of 16 bits in the gathers of the forward pass, 4 in the reductions. The
    scales of its blocks are left out."""
    factors = {"gather forward": 2, "reduce-scatter": 4}
    less = Traffic(pieces=traffic.pieces)
    for kind, sizes in traffic.sizes.items():
        for size, calls in sizes.items():
            less.add(kind, size * calls / factors.get(kind, 1), calls)
    return less


def machine(gpus: int, fabric: Fabric) -> Machine:
    """H100s, eight in a node."""
    return machine_of(
        "h100",
        nodes=gpus // RANKS_PER_NODE,
        ranks_per_node=RANKS_PER_NODE,
        memory_gib=80.0,
        intra_gb_s=fabric.intra_gb_s,
        inter_gb_s=fabric.inter_gb_s,
        latency_us=fabric.latency_us,
    )


def efficiencies(planned: Planned, fabric: Fabric, wanted: set[int]) -> Rows:
    """The share of a step that is arithmetic, with 32 images a GPU; bold where the step is equal to the fastest."""
    rows = [["GPUs", *ENGINES]]
    for gpus in (count for count in GPUS if count in wanted):
        steps = {engine: planned.over(engine, gpus, fabric) for engine in ENGINES}
        shares = {engine: found.compute_s / found.step_s for engine, found in steps.items()}
        least = max(shares.values()) / EQUAL
        cells = [f"**{share:.0%}**" if share >= least else f"{share:.0%}" for share in shares.values()]
        rows.append([f"{gpus:,}", *cells])
    return rows


def host(planned: Planned, wanted: set[int]) -> Rows:
    """What the host takes to ask for such a step, seconds; and the arithmetic."""
    rows = [["GPUs", *ENGINES, "arithmetic"]]
    for gpus in (count for count in GPUS if count in wanted):
        found = [planned.step(engine, gpus, MICRO_BATCH * gpus) for engine in ENGINES]
        rows.append([f"{gpus:,}", *(f"{each.host_s:.2f}" for each in found), f"{found[0].compute_s:.2f}"])
    return rows


def sent(planned: Planned, wanted: set[int]) -> Rows:
    """What a GPU sends in such a step, GiB: in the node, to others."""
    rows = [["GPUs", *ENGINES]]
    for gpus in (count for count in GPUS if count in wanted):
        found = [planned.over(engine, gpus, FABRICS["400 Gb/s a GPU"]).traffic for engine in ENGINES]
        rows.append([f"{gpus:,}", *(f"{t.intra_bytes / GIB:.2f} + {t.inter_bytes / GIB:.2f}" for t in found)])
    return rows


def calls(planned: Planned, wanted: set[int]) -> Rows:
    """Collectives of such a step, and what one of a ring of all GPUs takes at the least."""
    rows = [["GPUs", *ENGINES, "one gather, ms"]]
    for gpus in (count for count in GPUS if count in wanted):
        found = [planned.step(engine, gpus, MICRO_BATCH * gpus).collectives for engine in ENGINES]
        one = Traffic()
        one.add("update", 1)
        links = machine(gpus, FABRICS["400 Gb/s a GPU"]).links
        latency_s = step_traffic(one, links).time_s
        counts = [f"{sum(traffic.calls.values()):,}" for traffic in found]
        rows.append([f"{gpus:,}", *counts, f"{latency_s * 1e3:.2f}"])
    return rows


def memory(planned: Planned, wanted: set[int]) -> Rows:
    """GiB of a GPU at the peak, and what a save copies into the host memory of a node."""
    rows = [["GPUs", *ENGINES, "snapshot, a node"]]
    for gpus in (count for count in GPUS if count in wanted):
        found = [planned.step(engine, gpus, MICRO_BATCH * gpus) for engine in ENGINES]
        copied = found[2].host_parts["snapshot"] * RANKS_PER_NODE
        rows.append([f"{gpus:,}", *(f"{each.peak_bytes / GIB:.1f}" for each in found), f"{copied / GIB:.2f}"])
    return rows


def runs(planned: Planned, wanted: set[int]) -> tuple[Rows, Rows]:
    """The paper's samples at one batch size: time and money; and what storage has to give."""
    rows = [["GPUs", "network", "take", "step, s", "efficiency", "days", "GPU hours", "dollars"]]
    data = [["GPUs", "images/s", "a GPU", "GB/s", "MB/s a node"]]
    for gpus in (count for count in RUNS if count in wanted):
        for name, fabric in FABRICS.items():
            steps = {engine: planned.over(engine, gpus, fabric, BATCH) for engine in ENGINES if engine != "ZeRO++"}
            best = choose(list(steps.values()))
            take, step = next((engine, found) for engine, found in steps.items() if found is best)
            seconds = SAMPLES / BATCH * step.step_s
            hours = seconds / 3600 * gpus
            cells = [f"{step.step_s:.3f}", f"{step.compute_s / step.step_s:.0%}", f"{seconds / 86400:.1f}"]
            rows.append([f"{gpus:,}", name, take, *cells, f"{hours:,.0f}", f"{hours * DOLLARS:,.0f}"])
            if fabric is FABRICS["400 Gb/s a GPU"]:
                rate = BATCH / step.step_s
                bytes_s = rate * SAMPLE_KB * 1e3
                cells = [f"{rate:,.0f}", f"{rate / gpus:.0f}", f"{bytes_s / 1e9:.2f}"]
                data.append([f"{gpus:,}", *cells, f"{bytes_s / 1e6 / (gpus / RANKS_PER_NODE):.1f}"])
    return rows, data


def failures(planned: Planned, wanted: set[int]) -> Rows:
    """How often a job fails, how often to save, and what is lost."""
    heads = ["fails every, h", "save every, s", "steps", "lost", "lost at 1,000 steps"]
    rows = [["GPUs", "failures as in", *heads]]
    for gpus in (count for count in RUNS if count in wanted):
        step = planned.over("ZeRO-1", gpus, FABRICS["400 Gb/s a GPU"], BATCH)
        model = planned.model(gpus, BATCH)
        written_s = expected_bytes(model.objective, step.resolved.config) / (STORAGE_GB_S * 1e9)
        for name, hours in MTBF_HOURS.items():
            job_s = hours * 3600 / (gpus / RANKS_PER_NODE)
            best = max(1, round(best_interval(STALL_S, job_s, least_s=written_s) / step.step_s))
            lost = [
                lost_share(
                    steps * step.step_s,
                    stall_s=STALL_S + max(0.0, written_s - steps * step.step_s),  # a save waits for the one before it
                    between_failures_s=job_s,
                    restart_s=RESTART_S,
                    behind_s=written_s,
                )
                for steps in (best, model.run.checkpoint.every_steps)
            ]
            cells = [f"{job_s / 3600:.1f}", f"{best * step.step_s:,.0f}", f"{best:,}"]
            rows.append([f"{gpus:,}", name, *cells, *(f"{share:.2%}" for share in lost)])
    return rows


def storms(planned: Planned, wanted: set[int]) -> Rows:
    """What all ranks write at once."""
    speeds = (5, 20, 100)
    rows = [["GPUs", "GB a save", "MB a rank", "files", *(f"s at {speed} GB/s" for speed in speeds)]]
    for gpus in (count for count in RUNS if count in wanted):
        config = planned.step("ZeRO-1", gpus, BATCH).resolved.config
        size = expected_bytes(planned.model(gpus, BATCH).objective, config)
        # Of every rank: tensors, random states, position in the data; buffers, probe, index and four small ones.
        cells = [f"{size / 1e9:.1f}", f"{size / gpus / 1e6:.0f}", f"{3 * gpus + 7:,}"]
        rows.append([f"{gpus:,}", *cells, *(f"{size / speed / 1e9:.2f}" for speed in speeds)])
    return rows


if __name__ == "__main__":
    typer.run(main)
