"""Write the output of ranks to files, and the output of rank 0 also to the screen."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO


class Logs:
    """Log files OUTPUT/logs/<attempt>/<host>-rank<k>.log.

    Args:
        output_dir: output directory of the run.
        shown: the rank with lines that are also written to standard error.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, output_dir: Path, shown: int = 0) -> None:
        root = output_dir / "logs"
        root.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
        self.folder = root / f"{max(taken, default=0) + 1:03d}"
        self.folder.mkdir()
        self.fault: str | None = None
        """The reason for lost lines, if there are any."""
        self._shown = shown
        self._files: dict[int, IO[str]] = {}

    def add(self, host: str, rank: int, text: str) -> None:
        """Append lines, or parts of them, of a rank."""
        if rank == self._shown:
            show(text)
        try:
            if rank not in self._files:
                self._files[rank] = (self.folder / f"{host}-rank{rank}.log").open("a", encoding="utf-8")
            self._files[rank].write(text)
            self._files[rank].flush()
        except OSError as error:
            self.fault = f"logs are incomplete: {error}"

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:
                self.fault = f"logs are incomplete: {error}"


def show(text: str) -> None:
    """Write to the screen. After the terminal is lost, further text is dropped, because the run still has to save."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # otherwise the interpreter fails at exit and changes the exit code
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
