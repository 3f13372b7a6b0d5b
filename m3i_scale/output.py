"""Keep standard output for the one JSON document of `--json`, and leave out messages of libraries that say nothing."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from m3i_scale.files import json_text
from m3i_scale.text import printable

PIPED_COLUMNS = 4_000
"""Tables take what their cells need of it."""
_DOCUMENT: list[TextIO] = []
"""Standard output, while it is reserved."""


def reserve_stdout() -> None:
    """Let only `print_json` reach standard output from now on; C code is kept from it too."""
    _DOCUMENT.append(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    sys.stdout.flush()
    os.dup2(2, 1)


def release_stdout() -> None:
    """Take the reservation back, for a process that is about to become another program."""
    if _DOCUMENT:
        document = _DOCUMENT.pop()  # kept until it is copied: a file that nobody holds is closed
        os.dup2(document.fileno(), 1)


def print_json(value: Any) -> None:
    """Write the one JSON document of `--json` to standard output."""
    stream = _DOCUMENT[-1] if _DOCUMENT else sys.stdout
    stream.write(json_text(value))
    stream.flush()


class PrintableConsole(Console):
    """A console for text of others: file names, keys and messages cannot steer the terminal. Styles are rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable, without escapes in their texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))


def print_line(text: str, *, stderr: bool = False) -> None:
    """Print text for people without styles, as a `PrintableConsole` does."""
    print(printable(text, lines=True), file=sys.stderr if stderr else sys.stdout, flush=True)


def wide_console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console that breaks lines at the width of a terminal. It breaks none where there is no terminal: a file
    or a program has not 80 columns. COLUMNS overrides both.
    """
    made = PrintableConsole(stderr=stderr, **options)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_COLUMNS
    return made


def leave_out_accelerator_warning() -> None:
    """Silence the warning that no GPU was found, in commands that only read and write files. To be called before
    DeepSpeed is imported, which looks for one then.
    """
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


_OF_LOADING = ("transformers.modeling_utils", "transformers.models.auto.image_processing_auto")
_MISMATCHES = ("MISSING", "MISMATCH", "CONVERSION")


@contextmanager
def quiet_loading(folder: Path) -> Iterator[None]:
    """Leave out messages of `transformers` about a folder that we exported: progress bars, the report that the backbone
    of a classifier does not read the head, and the choice of an image processor. Reports of tensors that are missing or
    do not fit stay, and so do all messages about folders from elsewhere.
    """
    if not (folder / "export.json").is_file():
        yield
        return
    from transformers.utils import logging as transformers_logging

    def matters(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" in text:
            return any(status in text for status in _MISMATCHES)
        return "backend is not available" not in text

    loggers = [logging.getLogger(name) for name in _OF_LOADING]
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.addFilter(matters)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(matters)
        if shown:
            transformers_logging.enable_progress_bar()
