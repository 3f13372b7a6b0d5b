"""Standard output belongs to the one JSON document of `--json`; whatever libraries print goes to standard error."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

_document: TextIO | None = None


def reserve_stdout() -> None:
    """From now on only `print_json` reaches standard output, C code included."""
    global _document  # noqa: PLW0603 - the process has one standard output
    _document = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)


def print_json(value: Any) -> None:
    """Write the document."""
    stream = _document or sys.stdout
    stream.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    stream.flush()
