"""The quickstart after installation: make shards, train, kill, resume, export, evaluate, reload, report.

quickstart.sh starts it in the checkout. A stage is skipped if its inputs have not changed: the settings, the code and
the previous stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from _evaluation import PICTURES, evaluate, results_table, tool
from _training import Training, TrainingPlan
from rich.console import Console
from rich.table import Table

from m3i_scale.config import RunConfig, load_run
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.errors import EXIT_USER_ERROR, DataError, UserError

RUN_FILE = "launchers/quickstart.yaml"
EMOJI = "examples/emoji.py"
CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
TRAINING_PACKAGES = ("backbones", "checkpoint", "config", "data", "engine", "objective", "run")
TRAINING_CODE = (*(f"m3i_scale/{name}" for name in TRAINING_PACKAGES), "launchers/_training.py")
EXPORT_CODE = ("m3i_scale/exports", "launchers/_quickstart.py")
EVALUATION_CODE = ("m3i_scale/evaluation", "launchers/_evaluation.py")
RELOAD_CODE = ("launchers/_reload.py",)
REPORT_CODE = ("m3i_scale/report", "launchers/_quickstart.py")
LIBRARIES = ("torch", "deepspeed", "transformers", "scikit-learn")


@dataclass
class Row:
    """A line of the table of stages."""

    stage: str
    ran: str
    seconds: float
    where: str
    figures: list[str] = field(default_factory=list)
    again: bool = False


class Stages:
    """Stages in order. Completed stages are recorded in FOLDER/NAME.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = ""
        self.rows: list[Row] = []

    def key(self, inputs: dict[str, Any], code: tuple[str, ...]) -> str:
        """Return a hash of the inputs of a stage. `code` are files and folders of this checkout."""
        digest = hashlib.sha256(json.dumps([self.before, inputs], sort_keys=True).encode())
        for path in map(Path, code):
            if not path.exists():
                raise FileNotFoundError(path)
            for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def done(self, name: str, key: str) -> Row | None:
        """Return the row of a stage that was completed with the same inputs."""
        stamp = self.folder / f"{name}.json"
        if not stamp.is_file():
            return None
        saved = json.loads(stamp.read_text(encoding="utf-8"))
        return Row(**saved["row"]) if saved["key"] == key else None

    def run(
        self, name: str, ran: str, where: Path, work: Callable[[], list[str]], key: str, *, present: bool = True
    ) -> None:
        """Run the stage, unless it is completed and its result is `present`."""
        row = self.done(name, key) if present else None
        if row is not None:
            row.again = True
            CONSOLE.print(f"[bold]{name}[/]: already completed in {row.seconds:.0f} s")
        else:
            CONSOLE.rule(f"[bold]{name}[/]", align="left")
            started = time.monotonic()
            figures = work()
            row = Row(name, ran, time.monotonic() - started, str(where), figures)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.json").write_text(json.dumps({"key": key, "row": vars(row)}), encoding="utf-8")
        self.before = key
        self.rows.append(row)


def make_shards(output: Path) -> list[str]:
    """Make the emoji shards, unless the folder exists."""
    if output.exists():
        if not (output / "train" / "manifest.json").is_file():
            raise DataError("the folder exists, but has no shards", where=str(output), fix="remove the folder")
    else:
        font = os.environ.get("M3I_NOTO_FONT")
        command = [sys.executable, EMOJI, "--output", str(output), *(["--noto-font", font] if font else [])]
        if subprocess.run(command, check=False).returncode:
            raise UserError("the emoji shards could not be made", where=f"{EMOJI} --output {output}", why="see above")
    splits = ("train", "val", "style")
    counts = {split: json.loads((output / split / "sizes.json").read_text(encoding="utf-8")) for split in splits}
    return [f"{split}: {sum(sizes.values())} samples in {len(sizes)} shards" for split, sizes in counts.items()]


def plan_training(folder: Path, overrides: list[str]) -> tuple[TrainingPlan, RunConfig]:
    """Choose ranks, DeepSpeed config and overrides: all GPUs, or two CPU ranks if there is no GPU."""
    run = load_run(RUN_FILE, overrides)
    batch, streams, gpus = run.optim.batch_size, run.data.streams, torch.cuda.device_count()
    even = [count for count in range(1, (gpus or 2) + 1) if streams % count == 0 and batch % count == 0]
    ranks = max(even)  # streams and batch must be divisible by it
    deepspeed = "zero3_cpu_fp32"  # many CPUs have no bf16 instructions
    if gpus:
        deepspeed = "zero3_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "zero3_fp16"
    chosen = [
        f"data.datasets.emoji.path={folder / 'train'}",
        f"data.validation.emoji.path={folder / 'val'}",
        f"deepspeed={deepspeed}",
    ]
    chosen += [f"optim.micro_batch_size={batch // ranks}", *overrides]
    run = load_run(RUN_FILE, chosen)
    return TrainingPlan(RUN_FILE, chosen, run, ranks), run


def export(run: RunConfig, to: Path) -> list[str]:
    """Export the student weights. The model card shows the evaluation, if there is one."""
    facts = tool("export", str(run.output_dir), "--output", str(to), "--weights", "student", "--overwrite")
    largest = max(facts["verified"]["largest_output_difference"].values())
    return [
        f"step {facts['step']}, {facts['parameters'] / 1e6:.2f}M parameters",
        f"verified in a new process: outputs differ from the checkpoint by at most {largest:.1g}",
    ]


def reload(model: Path, folder: Path) -> list[str]:
    """Load the export with stock transformers, in an isolated process without this package."""
    command = [sys.executable, "-I", "launchers/_reload.py", str(model), str(folder / "style")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise UserError("stock transformers cannot load the export", where=str(model), why="see above")
    return done.stdout.strip().splitlines()


def report(run: RunConfig, to: Path) -> list[str]:
    """Write the report of the run with the pictures of the evaluation."""
    made = tool("report", str(run.output_dir), "--output", str(to), "--pictures", str(run.output_dir / PICTURES))
    return [f"{len(made['charts'])} charts, {made['bytes'] / 1e6:.1f} MB; open it in a browser"]


def set_aside(run: RunConfig) -> None:
    """Rename the folder of an earlier run with other settings or code."""
    if run.output_dir.exists():
        other = run.output_dir.with_name(f"{run.output_dir.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        shutil.move(run.output_dir, other)
        CONSOLE.print(f"settings or code have changed: the earlier run is now in {other}")


def stage_table(rows: list[Row]) -> Table:
    """Return a row per stage."""
    table = Table("stage", "seconds", "result", "where", title="quickstart: stages", show_lines=True)
    table.columns[1].justify = "right"
    table.columns[2].overflow = table.columns[3].overflow = "fold"
    for row in rows:
        seconds = f"{row.seconds:.0f}" + ("\n(earlier)" if row.again else "")
        table.add_row(f"[bold]{row.stage}[/]\n{row.ran}", seconds, "\n".join(row.figures), row.where)
    table.add_section()
    table.add_row("total", f"{sum(row.seconds for row in rows):.0f}", "", "")
    return table


def main(overrides: list[str]) -> None:
    """See the module."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise, DeepSpeed warns about it in every process
    folder = Path(os.environ["M3I_EMOJI_FOLDER"])
    plan, run = plan_training(folder, overrides)
    done, model, page = Stages(run.output_dir / "quickstart"), run.output_dir / "export", run.output_dir / "report.html"
    shards = Stages(folder / ".quickstart")  # outlives the run
    shards.run("shards", EMOJI, folder, lambda: make_shards(folder), shards.key({}, ()))
    done.before = hashlib.sha256((folder / "train" / "manifest.json").read_bytes()).hexdigest()
    done.rows = shards.rows

    settings = {"run": run.model_dump(mode="json"), "ranks": plan.ranks}
    settings |= {"deepspeed": load_ds_config(run.deepspeed), "versions": {name: version(name) for name in LIBRARIES}}
    key = done.key(settings, TRAINING_CODE)
    fingerprint = run.output_dir / "quickstart.key"
    if not fingerprint.is_file() or fingerprint.read_text(encoding="utf-8") != key:
        set_aside(run)
        run.output_dir.mkdir(parents=True)
        fingerprint.write_text(key, encoding="utf-8")
    training = Training(plan)
    ran = f"deepspeed, {plan.ranks} ranks, {run.deepspeed}; SIGKILL half-way"
    done.run("train", ran, run.output_dir, training.until_killed, key)
    metrics = run.output_dir / "metrics.jsonl"
    done.run("resume", "the same command again", metrics, training.to_the_end, done.key({}, TRAINING_CODE))
    exported, evaluated = partial(export, run, model), partial(evaluate, run, model, folder)
    steps: list[tuple[str, str, Path, Callable[[], list[str]], tuple[str, ...]]] = [
        ("export", "m3i-scale export", model, exported, EXPORT_CODE),
        ("evaluate", "m3i-scale evaluate, compare", run.output_dir / "evaluation.json", evaluated, EVALUATION_CODE),
        ("card", "m3i-scale export, with results", model / "README.md", exported, EXPORT_CODE),
        ("reload", "stock transformers", model, partial(reload, model, folder), RELOAD_CODE),
        ("report", "m3i-scale report", page, partial(report, run, page), REPORT_CODE),
    ]
    for name, ran, where, work, needs in steps:
        done.run(name, ran, where, work, done.key({}, needs), present=where.exists())
    CONSOLE.print(stage_table(done.rows))
    CONSOLE.print(results_table(run.output_dir))


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # runs `finally`, which kills the ranks


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(sys.argv[1:])
    except UserError as fault:
        CONSOLE.print("[bold red]error:[/] ", end="")
        CONSOLE.print(str(fault), markup=False, highlight=False)
        sys.exit(EXIT_USER_ERROR)
