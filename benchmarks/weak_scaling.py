"""Weak scaling over links that are known: what `m3i-scale plan` says a link costs, beside what it costs.

1, 2 and 4 ranks train the same model with the same batch a rank, each in a network namespace of its own (`_links.py`).
The links between them are left alone, or have 1 Gbit/s, 10 Gbit/s, or a millisecond of delay, in turn, while the same
processes go on. Ranks share the cores of this machine, so that more ranks compute more slowly: arithmetic is not
predicted, but measured, over links that are left alone, in the same rounds. Predicted is what the link adds:

    step(link) − step(link left alone)  against  model(link) − model(link left alone)

where the model is the plan's, with the rate and the delay that were set, and with the latency and the bandwidth of
the links left alone as a probe finds them. Nothing is fitted. `probed_added_s` is the same with what the probe finds of
the shaped link too: over TCP a delay takes bandwidth as well.

    python benchmarks/weak_scaling.py --json
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from _common import emit, machine, say
from _links import Hosts, check_links, has_netem, hosts
from _weak_rank import CLASSES
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.config import RunConfig, load_run
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import UserError
from m3i_scale.plan.planning import Choice, Estimate, Model, Vocabulary, estimate, machine_of
from m3i_scale.run.setup import run_yaml

ENGINES = ("zero1_cpu_fp32", "zero3_cpu_fp32")
RATES = {"1 Gbit/s": {"gbit_s": 1.0}, "10 Gbit/s": {"gbit_s": 10.0}}
DELAYS = {"1 ms": {"delay_ms": 1.0}}
FREE = "left alone"


class Ranks:
    """Processes of one job, one on each host."""

    def __init__(self, at: Hosts, run_file: Path, engines: tuple[str, ...]) -> None:
        self.count = len(at.names)
        receive, give = os.pipe()
        take, answer = os.pipe()
        self.processes = []
        port = get_free_port()
        for rank in range(self.count):
            pipes = [receive, answer] if rank == 0 else [0, 0]
            own = [sys.executable, str(Path(__file__).with_name("_weak_rank.py")), str(run_file), *map(str, pipes)]
            with run_file.with_name(f"rank-{self.count}-{rank}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        at.command(rank, [*own, *engines]),
                        env=self._environment(rank, at.address(0), port),
                        pass_fds=[receive, answer] if rank == 0 else [],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        os.close(receive)
        os.close(answer)
        self.orders, self.answers = os.fdopen(give, "w"), os.fdopen(take, "r")
        self.log = run_file.with_name(f"rank-{self.count}-0.log")
        self._answered()

    def _environment(self, rank: int, address: str, port: int) -> dict[str, str]:
        world = str(self.count)
        ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "1"}
        meet = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "eth0"}
        return os.environ | ranks | meet | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def ask(self, **order: Any) -> dict[str, float]:
        """What rank 0 answers to an order."""
        self.orders.write(json.dumps(order) + "\n")
        self.orders.flush()
        return self._answered()

    def _answered(self) -> dict[str, float]:
        line = self.answers.readline()
        if not line:
            raise UserError("a rank has ended", where=self.log.read_text()[-3000:])
        found: dict[str, float] = json.loads(line)
        return found

    def end(self) -> None:
        """Ask them to, and see to it."""
        with contextlib.suppress(BrokenPipeError):
            self.orders.write("{}\n")
            self.orders.close()
        self.answers.close()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    ranks: list[int] = typer.Option([1, 2, 4], help="Numbers of ranks."),
    rounds: int = 5,
    steps: int = typer.Option(2, help="Steps under every link in a round."),
    width: int = 384,
    depth: int = 6,
    batch: int = typer.Option(8, help="Images a rank."),
    delays: bool = typer.Option(True, help="Also with a delay."),
) -> None:
    """Print {cases: [{ranks, engine, link, step_s, free_s, added_s, predicted_s, error, …}], worst_error, …}."""
    # The end that `timeout` and schedulers ask for must leave no namespaces either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        check_links()
        with tempfile.TemporaryDirectory() as folder:
            run_file = _run_file(Path(folder), width, depth, batch)
            cases, netem = _measure(run_file, ranks, rounds, steps, delays)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    shaped = [case for case in cases if case["link"] != FREE and case["ranks"] > 1]
    emit(
        {
            "cases": cases,
            "median_step_error": statistics.median(abs(case["step_error"]) for case in shaped) if shaped else None,
            "worst_step_error": max((abs(case["step_error"]) for case in shaped), default=None),
            "delayed_by": "netem" if netem else "a process between taps",
            "sizes": {"width": width, "depth": depth, "batch": batch, "rounds": rounds, "steps": steps},
            "load": os.getloadavg()[0],
            "machine": machine(),
        }
    )


def _measure(
    run_file: Path, ranks: list[int], rounds: int, steps: int, delays: bool
) -> tuple[list[dict[str, Any]], bool]:
    netem, cases = has_netem(), []
    for count in ranks:
        both = {**RATES, **DELAYS} if netem and delays else RATES
        with _started(count, run_file, taps=False) as (at, job):
            cases += _compared(at, job, run_file, both, rounds, steps)
        if delays and not netem and count > 1:
            with _started(count, run_file, taps=True) as (at, job):
                cases += _compared(at, job, run_file, DELAYS, rounds, steps)
    return cases, netem


@contextlib.contextmanager
def _started(count: int, run_file: Path, *, taps: bool) -> Iterator[tuple[Hosts, Ranks]]:
    with hosts(count, taps=taps) as at:
        job = Ranks(at, run_file, ENGINES)
        try:
            yield at, job
        finally:
            job.end()


def _compared(
    at: Hosts, job: Ranks, run_file: Path, links: dict[str, dict[str, float]], rounds: int, steps: int
) -> list[dict[str, Any]]:
    every = {FREE: dict[str, float](), **links}
    probes: dict[str, dict[str, float]] = {}
    for name, shape in every.items():
        at.shape(**shape)
        probes[name] = job.ask(probe=True)
    times: dict[tuple[str, str], list[dict[str, float]]] = {(name, e): [] for name in every for e in ENGINES}
    for number in range(rounds):
        for name in every if number % 2 == 0 else reversed(every):
            at.shape(**every[name])
            for engine in ENGINES:
                times[name, engine].append(job.ask(engine=engine, steps=steps))
        say(f"{job.count} ranks, round {number + 1} of {rounds}")
    return [
        _case(run_file, job.count, engine, name, every[name], probes, times) for engine in ENGINES for name in every
    ]


def _case(
    run_file: Path,
    ranks: int,
    engine: str,
    link: str,
    shape: dict[str, float],
    probes: dict[str, dict[str, float]],
    times: dict[tuple[str, str], list[dict[str, float]]],
) -> dict[str, Any]:
    """One link: the median over the rounds of what it adds within a round, and what the plan says of it."""
    own, free = times[link, engine], times[FREE, engine]
    added = statistics.median(a["step_s"] - b["step_s"] for a, b in zip(own, free, strict=True))
    free_s = statistics.median(entry["step_s"] for entry in free)
    sent = statistics.median(entry["sent_bytes"] for entry in own)
    alone = probes[FREE]
    # The links left alone as they were found; a rate takes the place of what is slower, a delay comes on top.
    bytes_s = min(alone["bytes_s"], shape.get("gbit_s", float("inf")) * 1e9 / 8)
    latency_s = alone["latency_s"] + shape.get("delay_ms", 0.0) / 1e3
    before = planned(run_file, ranks, engine, alone["bytes_s"], alone["latency_s"])
    after = planned(run_file, ranks, engine, bytes_s, latency_s)
    predicted = after.traffic.time_s - before.traffic.time_s
    found = probes[link]
    as_found = planned(run_file, ranks, engine, found["bytes_s"], found["latency_s"])
    return {
        "ranks": ranks,
        "engine": engine,
        "link": link,
        "free_s": free_s,
        "added_s": added,
        "predicted_added_s": predicted,
        "step_s": free_s + added,
        "predicted_step_s": free_s + predicted,
        "probed_added_s": as_found.traffic.time_s - before.traffic.time_s,
        "step_error": (free_s + predicted) / (free_s + added) - 1,
        "sent_bytes": sent,
        "predicted_bytes": sum(after.traffic.rank_bytes.values()),
        "probe": {"latency_us": probes[link]["latency_s"] * 1e6, "gb_s": probes[link]["bytes_s"] / 1e9},
        "efficiency": free_s / (free_s + added),
        "predicted_efficiency": free_s / (free_s + predicted),
    }


def planned(run_file: Path, ranks: int, engine: str, bytes_s: float, latency_s: float) -> Estimate:
    """The plan of the same run over such links, each rank a node."""
    run = load_run(str(run_file), [f"deepspeed={engine}"])
    run = run.model_copy(
        update={"optim": run.optim.model_copy(update={"batch_size": run.optim.micro_batch_size * ranks})}
    )
    where = machine_of("cpu", nodes=ranks, ranks_per_node=1, memory_gib=1e3, mfu=1.0, workspace_gib=0.0)
    links = replace(where.links, inter_gb_s=bytes_s / 1e9, latency_us=latency_s * 1e6)
    vocabulary = Vocabulary({"classes": [str(number) for number in range(CLASSES)]}, 50, ())
    model = Model(run, vocabulary, ranks, precision(load_ds_config(engine)))
    choice = Choice(engine, "none", run.optim.micro_batch_size)
    return estimate(model, replace(where, links=links), choice)


def _run_file(folder: Path, width: int, depth: int, batch: int) -> Path:
    shape = f"hidden_size: {width}, num_attention_heads: {max(width // 64, 1)}, intermediate_size: {4 * width}"
    overrides = [
        "backbone.preset=null",
        f"backbone.config={{{shape}, num_hidden_layers: {depth}, image_size: 64, patch_size: 16}}",
        f"optim.micro_batch_size={batch}",
        f"optim.batch_size={batch}",
        f"output_dir={folder / 'run'}",
    ]
    run: RunConfig = load_run("supervised", overrides)
    path = folder / "run.yaml"
    path.write_text(run_yaml(run))
    return path


if __name__ == "__main__":
    typer.run(main)
