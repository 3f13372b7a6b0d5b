"""What a run that does not start from scratch tells of its start."""

from __future__ import annotations

from typing import Any

from m3i_scale.config import RunConfig
from m3i_scale.files import write_json
from m3i_scale.output import wide_console
from m3i_scale.report.start_table import start_table
from m3i_scale.scale.checkpoint.commit import explain

FILE = "start.json"


def tell_start(report: dict[str, Any], run: RunConfig) -> None:
    """Print what became of every tensor of the source, and keep it in the run's folder.

    Raises:
        UserError: the folder takes no file.
    """
    console = wide_console(stderr=True, soft_wrap=True)
    console.print(start_table(report))
    seen = {key: list(getattr(run.data.augment, key)) for key in ("mean", "std")}
    there = report["normalisation"]
    if there and there != seen:
        console.print(
            f"[yellow]the weights were trained on images with mean {there['mean']} and std {there['std']}, and this run"
            f" takes {seen['mean']} and {seen['std']}: data.augment.mean, data.augment.std[/]"
        )
    try:
        write_json(run.output_dir / FILE, report)
    except OSError as error:
        raise explain(error, run.output_dir / "checkpoints") from None
