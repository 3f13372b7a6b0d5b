"""Errors that explain: what is wrong, where, why it matters and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from typing_extensions import Self

EXIT_USER_ERROR = 2
"""The input, the configuration or the machine is at fault; the message says how to mend it."""

EXIT_FAILED = 1
"""Anything else went wrong. Whoever supervises may start the run again from its last checkpoint."""

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
    everywhere = False
    """Whether all ranks raise it; then one of them tells it."""

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for name, text in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if text:
                lines.append(f"  {name}: {text}")
        return "\n".join(lines)

    def on_rank(self, rank: int) -> UserError:
        """The same fault for all ranks to raise, with the rank that met it."""
        where = f"rank {rank}" if self.where is None else f"rank {rank}: {self.where}"
        return type(self)(self.what, where=where, why=self.why, fix=self.fix)

    def raised_everywhere(self) -> Self:
        """The same, known to be raised on all ranks."""
        self.everywhere = True
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip out of a data-loader worker, keyword arguments included."""
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(kind: type[UserError], what: str, where: str | None, why: str | None, fix: str | None) -> UserError:
    return kind(what, where=where, why=why, fix=fix)


@contextmanager
def named(whose: str) -> Iterator[None]:
    """Say of what is raised inside whose it is: comes before its `where`."""
    try:
        yield
    except UserError as error:
        error.where = whose if error.where is None else f"{whose}: {error.where}"
        raise


class ConfigError(UserError):
    """A run file, a recipe or a DeepSpeed JSON that does not hold together."""


class DataError(UserError):
    """Shards, samples or labels that cannot be used."""


class LostWorkerError(DataError):
    """A loader process that something else has ended. Nothing has to be mended before the run goes on."""

    exit_code = EXIT_FAILED


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, changed or made by another run."""


class ExportError(UserError):
    """An export that would not load, or would load as something else."""


_LISTED = 32  # the built-in recipes are fewer


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint for a misspelt name: the nearest known names, or the whole (short) list."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    if len(names) <= _LISTED:
        return "known: " + ", ".join(names)
    return "known: " + ", ".join(names[:_LISTED]) + ", …"
