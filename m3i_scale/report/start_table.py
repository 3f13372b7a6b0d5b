"""What a backbone started from, as a table."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.table import Table
from rich.text import Text


def start_table(report: dict[str, Any]) -> Table:
    """The report of `plan_load`; names that differ by the number of their layer share a line."""
    table = Table("start", "", box=None, show_header=False)
    for what, told in lines(report):
        table.add_row(Text(what, style="bold"), Text(told))
    return table


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What, and how much of it."""
    found = [
        ("start from", f"{report['source']} ({report['kind']}, files: {len(report['files'])})"),
        ("loaded", f"{report['loaded']} tensors, {report['parameters']:,} parameters"),
    ]
    pairs = Counter(_by_layer(f"{old} → {', '.join(new)}") for old, new in report["renamed"].items())
    found += [("renamed", f"{pair}{f'  × {count}' if count > 1 else ''}") for pair, count in pairs.items()]
    found += [
        ("resized", f"{name}: {tuple(how['from'])} → {tuple(how['to'])}") for name, how in report["resized"].items()
    ]
    found += [("nought", f"{len(names)} × {reason}") for reason, names in report["zeros"].items()]
    found += [("left out", f"{len(names)} × {reason}, e.g. {names[0]}") for reason, names in report["left_out"].items()]
    found += [("fresh", name) for name in report["fresh"]]
    found += [("assumed", f"{name} = {why}") for name, why in report["assumed"].items()]
    return found


def _by_layer(pair: str) -> str:
    """The number of the layer as N, so that all layers say the same."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", pair)
