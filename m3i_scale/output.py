"""Standard output reserved for the document of `--json`, and filters for irrelevant library messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from m3i_scale.files import json_text
from m3i_scale.text import printable

PIPED_COLUMNS = 4_000
"""Maximum width; tables use only as much as their cells need."""
_DOCUMENT: list[TextIO] = []
"""Standard output, while it is reserved."""


def reserve_stdout() -> None:
    """Reserve standard output for `print_json`; redirect all other output, also of C code, to standard error."""
    _DOCUMENT.append(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    sys.stdout.flush()
    os.dup2(2, 1)


def release_stdout() -> None:
    """Undo the reservation, for a process that is about to exec another program."""
    if _DOCUMENT:
        document = _DOCUMENT.pop()  # a reference until it is duplicated: an unreferenced file is closed
        os.dup2(document.fileno(), 1)


def print_json(value: Any) -> None:
    """Write the JSON document of `--json` to standard output."""
    stream = _DOCUMENT[-1] if _DOCUMENT else sys.stdout
    stream.write(json_text(value))
    stream.flush()


class PrintableConsole(Console):
    """Console for untrusted text: file names, keys and messages cannot control the terminal. Styles still work."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield segments with escape sequences in their text made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))


def print_line(text: str, *, stderr: bool = False) -> None:
    """Print text for people without styles, like a `PrintableConsole`."""
    line = printable(text, lines=True) + "\n"
    if stderr:
        write_stderr(line)
    else:
        sys.stdout.write(line)
        sys.stdout.flush()


def write_stderr(text: str) -> None:
    """Write to standard error. After the terminal is lost, drop further text, because the run still has to save."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # otherwise the interpreter fails at exit and changes the exit code
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def wide_console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console that wraps lines at the terminal width. Without a terminal it does not wrap, because a file or
    pipe has no 80 columns. COLUMNS overrides both."""
    made = PrintableConsole(stderr=stderr, **options)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_COLUMNS
    return made


def print_result(as_json: bool, document: Any, table: Callable[[], RenderableType]) -> None:
    """Print the result of a command: its JSON document, or a table for people."""
    if as_json:
        print_json(document)
    else:
        wide_console().print(table())


def leave_out_accelerator_warning() -> None:
    """Silence DeepSpeed's warning about a missing GPU, which its import prints. Call it before."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide warnings and progress bars of `transformers` while it loads a model, such as the report about the head that
    a classifier's backbone does not load. The caller checks missing and mismatched tensors."""
    from transformers.utils import logging as transformers_logging

    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
