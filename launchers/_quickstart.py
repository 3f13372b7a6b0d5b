"""The quickstart after installation: shards, a killed and resumed training, export, evaluation, reload, report, table.

Started by quickstart.sh in the checkout. A stage whose inputs have not changed since it was done is not done again; its
inputs are the settings, the code it runs and the stage before it.
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
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from _training import Training, TrainingPlan
from rich.console import Console
from rich.table import Table

from m3i_scale.config import RunConfig, load_run
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.errors import EXIT_USER_ERROR, DataError, UserError

RUN_FILE = "launchers/quickstart.yaml"
EMOJI = "examples/emoji.py"
CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
COMMAND = [sys.executable, "-m", "m3i_scale"]
TRAINING_CODE = tuple(f"m3i_scale/{name}" for name in ("config", "data", "backbones", "objective", "scale", "run"))
EXPORT_CODE = ("m3i_scale/exports", "launchers/_quickstart.py")
EVALUATION_CODE = ("m3i_scale/evaluation", "launchers/_quickstart.py")
REPORT_CODE = ("m3i_scale/report", "launchers/_quickstart.py")
LIBRARIES = ("torch", "deepspeed", "transformers", "scikit-learn")


@dataclass
class Row:
    """One line of the closing table."""

    stage: str
    ran: str
    seconds: float
    where: str
    figures: list[str] = field(default_factory=list)
    again: bool = False


class Stages:
    """Runs stages in order and remembers what is done in FOLDER/NAME.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = ""
        self.rows: list[Row] = []

    def key(self, inputs: dict[str, Any], code: tuple[str, ...]) -> str:
        """What the result of a stage depends on, as a hash; `code` are files and folders of this checkout."""
        digest = hashlib.sha256(json.dumps([self.before, inputs], sort_keys=True).encode())
        for path in map(Path, code):
            if not path.exists():
                raise FileNotFoundError(path)
            for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def done(self, name: str, key: str) -> Row | None:
        """The row of a stage that was done with the same inputs."""
        stamp = self.folder / f"{name}.json"
        if not stamp.is_file():
            return None
        saved = json.loads(stamp.read_text(encoding="utf-8"))
        return Row(**saved["row"]) if saved["key"] == key else None

    def run(
        self, name: str, ran: str, where: Path, work: Callable[[], list[str]], key: str, *, present: bool = True
    ) -> None:
        """Do the stage, unless it is done and its result is `present`."""
        row = self.done(name, key) if present else None
        if row is not None:
            row.again = True
            CONSOLE.print(f"[bold]{name}[/]: done before, in {row.seconds:.0f} s")
        else:
            CONSOLE.rule(f"[bold]{name}[/]", align="left")
            started = time.monotonic()
            figures = work()
            row = Row(name, ran, time.monotonic() - started, str(where), figures)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.json").write_text(json.dumps({"key": key, "row": vars(row)}), encoding="utf-8")
        self.before = key
        self.rows.append(row)


def tool(*arguments: str) -> dict[str, Any]:
    """One `m3i-scale … --json` in a process of its own; its document.

    Raises:
        UserError: it failed; it has said why.
    """
    done = subprocess.run([*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"`m3i-scale {' '.join(arguments[:2])}` ended with exit code {done.returncode}",
            why="see above",
            fix="fix the cause and run the same command again; finished stages are kept",
        )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def make_shards(output: Path) -> list[str]:
    """The emoji set, unless a folder of that name holds it already."""
    if output.exists():
        if not (output / "train" / "manifest.json").is_file():
            raise DataError("the folder of the shards is there, and holds none", where=str(output), fix="remove it")
    else:
        font = os.environ.get("M3I_NOTO_FONT")
        command = [sys.executable, EMOJI, "--output", str(output), *(["--noto-font", font] if font else [])]
        if subprocess.run(command, check=False).returncode:
            raise UserError("the emoji shards could not be made", where=f"{EMOJI} --output {output}", why="see above")
    splits = ("train", "val", "style")
    counts = {split: json.loads((output / split / "sizes.json").read_text(encoding="utf-8")) for split in splits}
    return [f"{split}: {sum(sizes.values())} samples in {len(sizes)} shards" for split, sizes in counts.items()]


def plan_training(folder: Path, overrides: list[str]) -> tuple[TrainingPlan, RunConfig]:
    """Ranks, DeepSpeed file and overrides for this machine: GPUs where there are some, else two ranks on the CPU."""
    run = load_run(RUN_FILE, overrides)
    batch, streams, gpus = run.optim.batch_size, run.data.streams, torch.cuda.device_count()
    even = [count for count in range(1, (gpus or 2) + 1) if streams % count == 0 and batch % count == 0]
    ranks = max(even)  # streams and batch are shared out evenly
    deepspeed = "zero3_cpu"
    if gpus:
        deepspeed = "zero3_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "zero3_fp16"
    chosen = [
        f"data.datasets.emoji.path={folder / 'train'}",
        f"data.validation.emoji.path={folder / 'val'}",
        f"deepspeed={deepspeed}",
    ]
    if deepspeed == "zero3_cpu":
        chosen.append("backbone.attention_kernel=eager")  # bf16 on a CPU: docs/benchmarks/performance.md
    chosen += [f"optim.micro_batch_size={batch // ranks}", *overrides]
    run = load_run(RUN_FILE, chosen)
    return TrainingPlan(RUN_FILE, chosen, run, ranks), run


def export(run: RunConfig, to: Path) -> list[str]:
    """The student, with what is known about it by now in its model card."""
    facts = tool("export", str(run.output_dir), "--output", str(to), "--weights", "student", "--overwrite")
    largest = max(facts["verified"]["largest_output_difference"].values())
    return [
        f"step {facts['step']}, {facts['parameters'] / 1e6:.2f}M parameters",
        f"fresh process against checkpoint: outputs differ by at most {largest:.1g}",
    ]


def evaluate(run: RunConfig, model: Path, folder: Path) -> list[str]:
    """Held-out families by linear probe, seen concepts in the held-out style by retrieval."""
    probe = tool(
        *("evaluate", str(model), "--data", str(folder / "val"), "--train-data", str(folder / "train")),
        *("--measure", "linear", "--measure", "knn", "--baseline", "pixels", "--exclude-group", "flags"),
        *("--pool", "both"),  # mean of the patches beside the class token, as DINOv2 probes
    )
    style = tool("evaluate", str(model), "--data", str(folder / "style"), "--measure", "retrieval")
    pixels = probe["baseline"]["measures"]
    # The model card shows one evaluation: that of the held-out families, with the other measures beside, by name.
    beside = {"raw pixels": pixels, f"{style['data']['samples']} pictures in the held-out style": style["measures"]}
    document = probe | {"measures": probe["measures"] | beside}
    (run.output_dir / "evaluation.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    linear, found = probe["measures"]["linear"], style["measures"]["retrieval"]["image_to_text"]["R@10"]
    raw = pixels["linear"]["accuracy"]
    gain = probe["baseline"]["advantage_of_model"]["linear"]["accuracy"]
    return [
        f"linear probe, held-out families: {_interval(linear['accuracy'])}",
        f"the same on raw pixels: {_interval(raw)}; majority {linear['majority']:.3f}",
        f"difference on the same pictures: {_interval(gain)}",
        f"image → text R@10, held-out style: {_interval(found)}, {found['ratio']:.0f} × chance",
    ]


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} … {figure['high']:.3f})"


def reload(model: Path, folder: Path) -> list[str]:
    """Stock transformers in an isolated process that never sees this package."""
    command = [sys.executable, "-I", "launchers/_reload.py", str(model), str(folder / "style")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError("stock transformers cannot load the export", where=str(model), why="see above")
    return done.stdout.strip().splitlines()


def report(run: RunConfig, to: Path) -> list[str]:
    """Write a page that shows the run, for a browser."""
    made = tool("report", str(run.output_dir), "--output", str(to))
    return [f"{len(made['charts'])} charts, {made['bytes'] / 1e6:.1f} MB; open it in a browser"]


def set_aside(run: RunConfig) -> None:
    """A run with other settings or other code keeps its results under another name."""
    if run.output_dir.exists():
        other = run.output_dir.with_name(f"{run.output_dir.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        shutil.move(run.output_dir, other)
        CONSOLE.print(f"settings or code have changed: training anew; the earlier run lies in {other}")


def closing_table(rows: list[Row]) -> Table:
    """What ran, figures, seconds, where each result lies."""
    table = Table("what ran", "figures", "seconds", "where", title="quickstart", show_lines=True)
    table.columns[2].justify, table.columns[3].overflow = "right", "fold"
    for row in rows:
        seconds = f"{row.seconds:.0f}" + ("\n(before)" if row.again else "")
        table.add_row(f"[bold]{row.stage}[/]\n{row.ran}", "\n".join(row.figures), seconds, row.where)
    table.add_section()
    table.add_row("all", "", f"{sum(row.seconds for row in rows):.0f}", "")
    return table


def main(overrides: list[str]) -> None:
    """See the module."""
    folder = Path(os.environ["M3I_EMOJI_FOLDER"])
    plan, run = plan_training(folder, overrides)
    state = run.output_dir / "quickstart"
    done, model, page = Stages(state), run.output_dir / "export", run.output_dir / "report.html"
    shards = Stages(folder / ".quickstart")  # outlives the run
    ran = EMOJI
    shards.run("shards", ran, folder, lambda: make_shards(folder), shards.key({}, ()))
    done.before = hashlib.sha256((folder / "train" / "manifest.json").read_bytes()).hexdigest()
    done.rows = shards.rows

    settings = {"run": run.model_dump(mode="json"), "ranks": plan.ranks}
    settings |= {"deepspeed": load_ds_config(run.deepspeed), "versions": {name: version(name) for name in LIBRARIES}}
    rooms = (*TRAINING_CODE, "launchers/_training.py")
    key = done.key(settings, rooms)
    fingerprint = run.output_dir / "quickstart.key"
    if not fingerprint.is_file() or fingerprint.read_text(encoding="utf-8") != key:
        set_aside(run)
        run.output_dir.mkdir(parents=True)
        fingerprint.write_text(key, encoding="utf-8")
    training = Training(plan)
    ran = f"deepspeed, {plan.ranks} ranks, {run.deepspeed}"
    done.run("train", f"{ran}; killed with -9 half-way", run.output_dir, training.until_killed, key)
    ran = "the same command again"
    done.run("resume", ran, run.output_dir / "metrics.jsonl", training.to_the_end, done.key({}, rooms))
    steps: list[tuple[str, str, Path, Callable[[], list[str]], tuple[str, ...]]] = [
        (
            "export",
            "m3i-scale export",
            model,
            lambda: export(run, model),
            EXPORT_CODE,
        ),
        (
            "evaluate",
            "m3i-scale evaluate",
            run.output_dir / "evaluation.json",
            lambda: evaluate(run, model, folder),
            EVALUATION_CODE,
        ),
        (
            "card",
            "m3i-scale export, with the figures",
            model / "README.md",
            lambda: export(run, model),
            EXPORT_CODE,
        ),
        ("reload", "stock transformers, alone", model, lambda: reload(model, folder), ("launchers/_reload.py",)),
        ("report", "m3i-scale report", page, lambda: report(run, page), REPORT_CODE),
    ]
    for name, ran, where, work, needs in steps:
        done.run(name, ran, where, work, done.key({}, needs), present=where.exists())
    CONSOLE.print(closing_table(done.rows))


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # through `finally`, so that no rank is left behind


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(sys.argv[1:])
    except UserError as fault:
        CONSOLE.print("[bold red]error:[/] ", end="")
        CONSOLE.print(str(fault), markup=False, highlight=False)
        sys.exit(EXIT_USER_ERROR)
