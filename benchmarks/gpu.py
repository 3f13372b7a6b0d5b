"""Prove this package on one GPU: what has to hold, and what it costs.

Every section is a process of its own with a time limit: one that crashes, hangs or runs out of memory costs its own
rows only. `--output` is written again after every row, so it is valid whenever the machine is taken away. Without a
GPU, `--device cpu` runs what needs none, at small sizes, and `--fake` counts what a CUDA device would see.

    python benchmarks/gpu.py --json [--output gpu.json] [--only parity --only train] [--device cpu | --fake]
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from _common import emit, machine, say

from m3i_scale.errors import EXIT_USER_ERROR, did_you_mean
from m3i_scale.files import read_json, write_json

BENCHMARKS = Path(__file__).resolve().parent
MODES = ("cuda", "cpu", "fake")


@dataclass(frozen=True)
class Section:
    """Describes a process, `gpu_sections/NAME.py`."""

    name: str
    expected_s: float
    """An H100 takes about so long; it is ended after twice the time. Without a GPU all times are ten times as long."""
    modes: tuple[str, ...]
    without_nvcc: bool = False


SECTIONS = (
    Section("facts", 10, ("cuda", "cpu")),
    Section("parity", 50, ("cuda", "cpu")),
    Section("compile", 60, ("cuda", "cpu")),
    Section("train", 90, ("cuda", "cpu")),
    Section("start", 45, MODES, without_nvcc=True),
    Section("order", 15, ("cuda",)),
    Section("waits", 25, ("cuda", "fake")),
    Section("memory", 55, ("cuda", "cpu")),
    Section("mfu", 110, ("cuda", "cpu")),
    Section("ranks", 25, ("cuda", "cpu")),
    Section("loader", 30, ("cuda", "cpu")),
    Section("recipes", 35, ("cuda", "cpu")),
    Section("save", 30, ("cuda", "cpu")),
)
"""They run in this order: what has to hold comes first."""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    output: Path = typer.Option(None, help="Keep the document here too, valid at any moment."),
    only: list[str] = typer.Option([], help="Only these sections."),
    skip: list[str] = typer.Option([], help="Not these sections."),
    device: str = typer.Option("cuda", help="cuda, or cpu for what needs no card."),
    fake: bool = typer.Option(False, help="Trace as on a CUDA device, without one."),
    budget_s: float = typer.Option(580.0, help="For all sections; ten times as long without a GPU."),
) -> None:
    """Print {machine, commit, sections: {name: {ok, must: {row: [wanted, found, ok]}, figures, seconds, error}}}.

    The exit code is 0 where every row holds and every section has come to its end.
    """
    if fake and device != "cuda":
        _refuse("--fake is a CUDA device that is not there: leave --device out")
    mode = "fake" if fake else device
    sections = _chosen(mode, only, skip)
    if output is not None and not output.parent.is_dir():
        _refuse(f"no folder {output.parent}: --output")
    document: dict[str, Any] = {"mode": mode, "machine": machine(), "commit": _commit(), "sections": {}}
    slower = 1 if mode == "cuda" else 10
    deadline = time.monotonic() + budget_s * slower
    for section in sections:
        left_s = deadline - time.monotonic()
        if left_s < section.expected_s * slower:
            result = _result({}, 0.0, "no time was left for it")
        else:
            say(f"== {section.name}")
            result = run_section(section, mode, min(2 * section.expected_s * slower, left_s), document, output)
        document["sections"][section.name] = result
        _keep(document, output)
        say(f"{section.name}: {'holds' if result['ok'] else 'does not hold'}, {result['seconds']:.0f} s")
    emit(document)
    raise typer.Exit(0 if all(result["ok"] for result in document["sections"].values()) else 1)


def _chosen(mode: str, only: list[str], skip: list[str]) -> list[Section]:
    if mode not in MODES:
        _refuse(f"no device '{mode}': cuda or cpu")
    if mode == "cuda" and machine()["gpu"] is None:
        _refuse("torch sees no CUDA device here: --device cpu or --fake")
    by_name = {section.name: section for section in SECTIONS}
    for name in (*only, *skip):
        if name not in by_name:
            _refuse(f"no section '{name}': {did_you_mean(name, by_name)}")
        if name in only and mode not in by_name[name].modes:
            _refuse(f"section '{name}' runs on {' and '.join(by_name[name].modes)}, not on {mode}")
    return [
        section
        for section in SECTIONS
        if mode in section.modes and (not only or section.name in only) and section.name not in skip
    ]


def _refuse(message: str) -> None:
    say(f"error: {message}")
    sys.exit(EXIT_USER_ERROR)


def run_section(
    section: Section, mode: str, limit_s: float, document: dict[str, Any], output: Path | None
) -> dict[str, Any]:
    """Run a section to its end or its limit; its rows so far are kept either way."""
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.json"
        known = None
        command = [sys.executable, str(BENCHMARKS / "gpu_sections" / "_run.py"), section.name, mode, str(rows)]
        started = time.monotonic()
        process = subprocess.Popen(command, env=_environment(section, mode), stdout=sys.stderr, start_new_session=True)
        error = None
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - started > limit_s:
                    error = f"it took longer than {limit_s:.0f} s"
                    break
                if _read(rows) != known:
                    known = _read(rows)
                    document["sections"][section.name] = _result(known, time.monotonic() - started, "not at its end")
                    _keep(document, output)
        finally:
            _end(process)
        if error is None and process.returncode:
            error = f"exit code {process.returncode}"
        return _result(_read(rows), time.monotonic() - started, error)


def _environment(section: Section, mode: str) -> dict[str, str]:
    root = BENCHMARKS.parent
    tests = [root / "tests", root / "tests" / "distributed", root / "tests" / "fake_cuda"]
    folders = [BENCHMARKS, *tests, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if folder)}
    if section.without_nvcc:
        environment["CUDA_HOME"] = "/nonexistent"  # torch looks nowhere else then
    if mode != "cuda":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the section and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(rows: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(rows) if rows.exists() else {}
    return found


def _result(rows: dict[str, Any], seconds: float, error: str | None) -> dict[str, Any]:
    must = rows.get("must", {})
    holds = error is None and all(ok for _, _, ok in must.values())
    return {"ok": holds, "must": must, "figures": rows.get("figures", {}), "seconds": seconds, "error": error}


def _keep(document: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        write_json(output, document, durable=False)


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    typer.run(main)
