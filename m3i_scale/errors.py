"""Errors that explain: what is wrong, where, why it matters and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2
"""The input, the configuration or the machine is at fault; the message says how to mend it."""

EXIT_PREEMPTED = 75
"""The run was asked to stop (SIGTERM, SIGUSR2), saved a checkpoint and can be started again (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake that the user can mend. The command line prints it without a traceback and exits with code 2.

    Args:
        what: the fault, in one sentence.
        where: file, key or value at fault.
        why: the consequence, where the fault alone does not tell it.
        fix: what to do next.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for name, text in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if text:
                lines.append(f"  {name}: {text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip out of a data-loader worker, keyword arguments included."""
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(kind: type[UserError], what: str, where: str | None, why: str | None, fix: str | None) -> UserError:
    return kind(what, where=where, why=why, fix=fix)


class ConfigError(UserError):
    """A run file, a recipe or a DeepSpeed JSON that does not hold together."""


class DataError(UserError):
    """Shards, samples or labels that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, changed or made by another run."""


class ExportError(UserError):
    """An export that would not load, or would load as something else."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint for a misspelt name: the nearest known names, or the whole (short) list."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    if len(names) <= 24:
        return "known: " + ", ".join(names)
    return "known: " + ", ".join(names[:24]) + ", …"
