"""Training in a separate process: in its own process, a notebook would keep the process group, signal handlers and
DeepSpeed's state of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from m3i_scale.errors import ERROR_FILE, EXIT_PREEMPTED, ConfigError, UserError, load_error
from m3i_scale.output import print_line
from m3i_scale.text import redact_text, yaml_string

DATASET = "main"
"""Name of the dataset for `data` if the config file defines none."""
_INTERRUPTED = (0, EXIT_PREEMPTED, 128 + signal.SIGINT, -signal.SIGINT)
"""Exit codes of an interrupted run; with others, it has failed."""


def train(
    run: str | Path,
    overrides: Sequence[str] | None = None,
    *,
    data: str | Path | None = None,
    output_dir: str | Path | None = None,
    gpus: int | None = None,
) -> Path:
    """Train a config in a separate process, or resume it from its latest valid checkpoint. Print its output.

    An interrupt (Ctrl-C, or "stop" in a notebook) stops the run gracefully: it finishes its step, saves, and the
    function raises KeyboardInterrupt. Call it again to resume. A second interrupt stops immediately.

    Examples:
        >>> run_dir = m3i_scale.train("m3i_mini", ["optim.steps=1000"], data="/data/shards/train",
        ...                           output_dir="/data/runs/first")

    Args:
        run: path of a config file, or name of a built-in config such as `m3i`.
        overrides: `section.key=value`, as on the command line.
        data: `path` of the dataset of the config, or of a new dataset `main` if the config has none.
        output_dir: output directory of the run.
        gpus: use only the first N visible GPUs; default: all.

    Returns:
        The output directory.

    Raises:
        ConfigError: the config is invalid.
        UserError: the run ended with an error that the message explains, or was stopped by another process.
        subprocess.CalledProcessError: the run failed in another way, which its output explains.
    """
    from m3i_scale.config import load_run

    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list, got '{overrides}'", where="train", fix=f'["{overrides}"]')
    settings = list(overrides or [])
    if data is not None:
        settings.append(f"data.datasets.{_dataset_name(str(run), settings)}.path={yaml_string(os.fspath(data))}")
    if output_dir is not None:
        settings.append(f"output_dir={yaml_string(os.fspath(output_dir))}")
    folder = load_run(str(run), settings).output_dir
    options = [] if gpus is None else ["--gpus", str(gpus)]
    command = [sys.executable, "-m", "m3i_scale", "train", *options, str(run), *settings]
    with tempfile.TemporaryDirectory(prefix="m3i-train-") as place:
        error_file = Path(place) / "error.json"
        code, interrupted = _run_and_print(command, error_file)
        error = load_error(error_file)
    if interrupted and code in _INTERRUPTED:
        raise KeyboardInterrupt
    if code == EXIT_PREEMPTED:
        raise UserError("the run was stopped after saving", where=str(folder), fix="call train again to resume")
    if code:
        raise error or subprocess.CalledProcessError(code, [*map(redact_text, command)])
    return folder


def _dataset_name(run: str, overrides: list[str]) -> str:
    from m3i_scale.config.files import run_values

    section = run_values(run, overrides).get("data")
    datasets = section.get("datasets") if isinstance(section, dict) else None
    names = list(datasets) if isinstance(datasets, dict) else []
    if len(names) > 1:
        raise ConfigError(
            f"the config has {len(names)} datasets, and `data` is the path of one",
            where=f"data.datasets: {', '.join(map(str, names))}",
            fix=f'overrides=["data.datasets.{names[0]}.path=/data/shards/train"]',
        )
    return str(names[0]) if names else DATASET


def _run_and_print(command: list[str], error_file: Path) -> tuple[int, bool]:
    """Run a command and print its output. Return its exit code, and whether it was interrupted.

    The command has a process group of its own, so that it gets every interrupt once: from here.
    """
    from m3i_scale.host.processes import PARENT, TIED

    interrupted = False
    process = subprocess.Popen(
        command,
        env={**os.environ, TIED: PARENT, ERROR_FILE: str(error_file)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    with process:
        while True:
            try:
                for line in process.stdout or ():
                    print_line(line.rstrip("\n"))
                return process.wait(), interrupted
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
            except BaseException:
                process.terminate()
                raise
