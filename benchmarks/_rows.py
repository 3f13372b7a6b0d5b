"""Keep the rows of a section of gpu.py on the disk, each as soon as it is known: what must hold, and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3i_scale.files import write_json


class Rows:
    """Collects the rows of one section."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._must: dict[str, list[Any]] = {}
        self._figures: dict[str, Any] = {}

    def must(self, row: str, wanted: Any, found: Any, *, ok: bool) -> None:
        """Tell what has to hold, as a reader would compare it."""
        self._must[row] = [wanted, found, bool(ok)]
        self._write()

    def at_most(self, row: str, bound: float, found: float) -> None:
        """Tell a figure that has a bound; NaN is beyond any."""
        self.must(row, f"<= {bound:g}", found, ok=found <= bound)

    def figure(self, row: str, value: Any) -> None:
        """Tell a figure that has no bound."""
        self._figures[row] = value
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"must": self._must, "figures": self._figures}, durable=False)
