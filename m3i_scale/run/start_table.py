"""Report on pretrained weights at the start of a run: as a table, and in start.json."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.table import Table
from rich.text import Text

from m3i_scale.checkpoint.commit import explain
from m3i_scale.config import RunConfig
from m3i_scale.files import write_json
from m3i_scale.output import wide_console

FILE = "start.json"


def print_start(report: dict[str, Any], run: RunConfig) -> None:
    """Print the load result of every tensor of the pretrained weights, and save it in the run's folder."""
    console = wide_console(stderr=True, soft_wrap=True)
    console.print(start_table(report))
    try:
        write_json(run.output_dir / FILE, report)
    except OSError as error:
        raise explain(error, run.output_dir / "checkpoints") from None


def start_table(report: dict[str, Any]) -> Table:
    """Return the report of `plan_load` as a table; names that differ only by layer number share a line."""
    table = Table("start", "", box=None, show_header=False)
    for what, told in lines(report):
        table.add_row(Text(what, style="bold"), Text(told))
    return table


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (topic, text) rows of a report."""
    rows = [
        ("start from", f"{report['source']} ({report['kind']}, files: {len(report['files'])})"),
        ("loaded", f"{report['loaded']} tensors, {report['parameters']:,} parameters"),
    ]
    pairs = Counter(_by_layer(f"{old} → {', '.join(new)}") for old, new in report["renamed"].items())
    rows += [("renamed", f"{pair}{f'  × {count}' if count > 1 else ''}") for pair, count in pairs.items()]
    rows += [
        ("resized", f"{name}: {tuple(how['from'])} → {tuple(how['to'])}") for name, how in report["resized"].items()
    ]
    rows += [("nought", f"{len(names)} × {reason}") for reason, names in report["zeros"].items()]
    rows += [("left out", f"{len(names)} × {reason}, e.g. {names[0]}") for reason, names in report["left_out"].items()]
    rows += [("fresh", name) for name in report["fresh"]]
    rows += [("assumed", f"{name} = {why}") for name, why in report["assumed"].items()]
    return rows


def _by_layer(pair: str) -> str:
    """Replace the layer number in a name by N, so that the names of all layers are equal."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", pair)
