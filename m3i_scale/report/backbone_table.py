"""Table of backbones for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def backbone_table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of rows from `describe_backbone`."""
    table = Table(
        *("preset", "input", "token", "mask", "tokens", "width", "layers", "parameters", "GMAC"),
        box=None,
        caption="input, token and mask cell: side in pixels; parameters: millions",
    )
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "preset" else "right"
    for row in rows:
        sides = [str(row[key]) for key in ("image_size", "patch_size", "mask_cell", "tokens", "width", "layers")]
        table.add_row(row["name"], *sides, f"{row['parameters'] / 1e6:,.1f}", f"{row['gmac']:.1f}")
    return table
