"""Texts of shell scripts, in which no value can become code."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from m3i_scale.launch.environment import Variable

_WIDTH = 110


def export_lines(variables: Iterable[Variable]) -> list[str]:
    """`export NAME=value`, one each."""
    return [f"export {variable.name}={shlex.quote(variable.value)}" for variable in variables]


def wrapped(words: Sequence[str], *, indent: str = "  ") -> str:
    """Words of a command, each quoted already, over as many lines as they need."""
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) + 1 > _WIDTH:
            lines.append(line + " \\")
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def quoted(words: Iterable[str]) -> list[str]:
    """Words that a shell takes as they are."""
    return [shlex.quote(word) for word in words]
