"""Measure seconds, bytes and memory of `m3i-scale report` on a long run, and seconds until Chromium has drawn the page.

The run is written for this: logged steps with the figures of a real record, with spikes of the loss, evaluations,
warnings, and a resume in the middle.

    python benchmarks/report.py --json
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import typer
import yaml
from _common import emit, machine, need, say

from m3i_scale.config import load_run
from m3i_scale.files import json_line

GROUPS = ("intra", "inter", "text", "category")
GROUP_FIGURES = ("loss", "loss_samples", "loss_weight", "grad_norm", "mi")
PHASES = ("data", "forward", "teacher", "heads", "backward", "reduce", "optimizer", "ema", "other")
FIGURES = (
    *("lr", "samples", "quarantined", "skipped_nonfinite", "information", "memory_gib"),
    *("grad_norm", "ema_decay", "time/step", "time/data_wait", "time/data_wait_share", "throughput/samples_per_s"),
    *("throughput/tokens_per_s", "perf/flops_per_s", "perf/mfu", *(f"time/{phase}" for phase in PHASES)),
    *(f"dataset/main/{figure}" for figure in ("share", "asked", "recent_share", "recent_asked", "epoch")),
    *(f"{figure}/{group}" for group in GROUPS for figure in GROUP_FIGURES),
    *(f"health/{figure}" for figure in ("dense_std", "dense_rank", "pooled_std", "pooled_rank", "text_scale")),
    *(f"health/target_view1_{figure}" for figure in ("std", "rank")),
    *(f"health/{group}_spread" for group in ("intra", "inter", "text")),
)
"""Beside the loss, of one record."""
VARIETY = 1_000
"""Different sets of these figures, which take turns: the loss is each step's own."""
EVENT_STEPS = 1_000
SPIKE_STEPS = 90_001
START = datetime(2030, 1, 1, tzinfo=timezone.utc)
DRAWN_MS = 120_000


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    steps: int = typer.Option(1_000_000, min=10, help="Logged steps of the run."),
    folder: Path = typer.Option(None, help="Keeps the run and the report; default: a temporary folder."),
) -> None:
    """Print {steps, run_bytes, seconds, bytes, peak_mib, drawn_s, machine}."""
    need("playwright")
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        run, page = place / "run", place / "report.html"
        say(f"writing {steps:,} logged steps into {run}")
        write_run(run, steps)
        say("making the report")
        seconds, peak_mib = make_report(run, page)
        emit(
            {
                "steps": steps,
                "run_bytes": (run / "metrics.jsonl").stat().st_size,
                "seconds": seconds,
                "bytes": page.stat().st_size,
                "peak_mib": peak_mib,
                "drawn_s": drawn_s(page),
                "machine": machine(),
            }
        )


def write_run(folder: Path, steps: int) -> None:
    """Write the folder of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = load_run("m3i", [f"output_dir={folder}", "data.datasets.main.path=/data/shards", f"optim.steps={steps}"])
    (folder / "run.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(lines(steps))


def lines(steps: int) -> Iterator[str]:
    """Yield the lines of its metrics."""

    def line(kind: str, step: int, **fields: Any) -> str:
        return json_line({"kind": kind, "step": step, "time": at(step), **fields})

    draw = random.Random(0)
    start = {"name": "long", "total_steps": steps, "world_size": 8, "device": "cpu", "micro_batch_size": 64}
    endings = [json.dumps({name: draw.random() for name in FIGURES})[1:] for _ in range(VARIETY)]
    yield line("run", 0, **start)
    for step in range(1, steps + 1):
        loss = 4 + 5 * (1 - step / steps) + draw.gauss(0, 0.1) + (90 if step % SPIKE_STEPS == 0 else 0)
        head = f'{{"kind": "train", "step": {step}, "time": "{at(step)}", "loss": {loss}, '
        yield f"{head}{endings[step % VARIETY]}\n"
        if step % EVENT_STEPS == 0:
            yield line("evaluation", step, **{f"evaluation/{group}/loss": draw.random() for group in GROUPS})
        if step % SPIKE_STEPS == 0:
            words = {"what": "the loss has spiked", "why": f"{loss:.4g}", "fix": "lower the learning rate"}
            yield line("warning", step, group="guard", **words)
        if step == steps // 2:
            yield line("run", step, **start)
    yield line("end", steps, status="finished")


def at(step: int) -> str:
    """Return when a step was logged."""
    return (START + timedelta(seconds=step)).isoformat(timespec="milliseconds")


def make_report(run: Path, page: Path) -> tuple[float, float]:
    """Return the seconds that the command takes, and its largest resident memory in MiB."""
    began = time.perf_counter()
    command = subprocess.Popen(
        [sys.executable, "-m", "m3i_scale", "report", str(run), "--output", str(page)], stdout=sys.stderr
    )
    _, status, used = os.wait4(command.pid, 0)
    command.returncode = os.waitstatus_to_exitcode(status)
    if command.returncode:
        sys.exit(command.returncode)
    return time.perf_counter() - began, used.ru_maxrss / 1024


def drawn_s(page: Path) -> float | None:
    """Return the seconds from opening the page until Chromium has drawn its first tab; None without Chromium."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        say("no chromium on PATH: not drawn")
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        began = time.perf_counter()
        tab.goto(page.absolute().as_uri())
        tab.wait_for_selector("body[data-drawn=true]", timeout=DRAWN_MS)
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


if __name__ == "__main__":
    typer.run(main)
