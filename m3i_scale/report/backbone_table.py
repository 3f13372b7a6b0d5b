"""Backbones as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def backbone_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of `describe_backbone`."""
    table = Table("preset", "input", "patch", "tokens", "mask cell", "width", "layers", "parameters", "GMAC", box=None)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['image_size']} px",
            f"{row['patch_size']} px",
            str(row["tokens"]),
            f"{row['mask_cell']} px",
            str(row["width"]),
            str(row["layers"]),
            f"{row['parameters'] / 1e6:,.1f} M",
            f"{row['gmac']:.1f}",
        )
    return table
