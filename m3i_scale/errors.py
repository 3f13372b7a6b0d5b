"""Errors that explain: they say what is wrong, where, why it matters and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from typing_extensions import ParamSpec, Self

EXIT_USER_ERROR = 2
"""The input, the configuration or the machine is at fault; the message says how to mend it."""

EXIT_FAILED = 1
"""Anything else went wrong. Whoever supervises may start the run again from its last checkpoint."""

EXIT_PREEMPTED = 75
"""The run was asked to stop (SIGTERM, SIGUSR2), saved a checkpoint and can be started again (EX_TEMPFAIL)."""


Given = ParamSpec("Given")
Looked = TypeVar("Looked")


class UserError(Exception):
    """Reports a mistake that the user can mend. The command line prints it without a traceback and exits with code 2.

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

    def to_json(self) -> dict[str, str | None]:
        """Return `where, message, fix`."""
        message = self.what if self.why is None else f"{self.what}; {self.why}"
        return {"where": self.where, "message": message, "fix": self.fix}

    def on_rank(self, rank: int) -> UserError:
        """Return the same fault for all ranks to raise, with the rank that met it."""
        where = f"rank {rank}" if self.where is None else f"rank {rank}: {self.where}"
        return type(self)(self.what, where=where, why=self.why, fix=self.fix)

    def raised_everywhere(self) -> Self:
        """Mark the error as known to be raised on all ranks, and return it."""
        self.everywhere = True
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the error is pickled, as it is on its way out of a data-loader worker."""
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(kind: type[UserError], what: str, where: str | None, why: str | None, fix: str | None) -> UserError:
    return kind(what, where=where, why=why, fix=fix)


@contextmanager
def error_prefix(whose: str) -> Iterator[None]:
    """Put `whose` before the `where` of every error that is raised inside."""
    try:
        yield
    except UserError as error:
        error.where = whose if error.where is None else f"{whose}: {error.where}"
        raise


class ConfigError(UserError):
    """Reports a run file, a recipe or a DeepSpeed JSON that does not hold together."""


class FaultsError(ConfigError):
    """Reports several faults at once.

    Args:
        faults: each as it would have been raised alone.
    """

    def __init__(self, faults: Sequence[UserError]) -> None:
        self.faults = tuple(faults)
        places = dict.fromkeys(fault.where for fault in faults if fault.where)
        what = f"{len(faults)} faults: " + "; ".join(fault.what for fault in faults)
        super().__init__(what, where="; ".join(places) or None)

    def __str__(self) -> str:
        parts = [f"{number}. " + str(fault).replace("\n", "\n   ") for number, fault in enumerate(self.faults, 1)]
        return "\n".join([f"{len(self.faults)} faults", *parts])

    def on_rank(self, rank: int) -> FaultsError:
        """Return the same faults for all ranks to raise, with the rank that met them."""
        return FaultsError([fault.on_rank(rank) for fault in self.faults])

    def __reduce__(self) -> tuple[object, ...]:
        return (FaultsError, (self.faults,))


class Faults:
    """Collects the faults of several checks, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.found: list[UserError] = []

    def note(self, look: Callable[Given, Looked], *given: Given.args, **named: Given.kwargs) -> Looked | None:
        """Return what `look` gives for what it is given; None where it raises a UserError, which is kept."""
        try:
            return look(*given, **named)
        except FaultsError as error:
            self.found += error.faults
        except UserError as error:
            self.found.append(error)
        return None

    def end(self) -> None:
        """Raise what was found."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise FaultsError(self.found)


class DataError(UserError):
    """Reports shards, samples or labels that cannot be used."""


class LostWorkerError(DataError):
    """Reports a loader process that something else has ended. Nothing has to be mended before the run goes on."""

    exit_code = EXIT_FAILED


class CheckpointError(UserError):
    """Reports a checkpoint that is missing, torn, changed or made by another run."""


class ExportError(UserError):
    """Reports an export that would not load, or would load as something else."""


_LISTED = 80  # the built-in run files are fewer


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the hint for a misspelt name: the nearest known names, or the whole (short) list."""
    names = sorted(known)
    same = [name for name in names if _letters(name) == _letters(word)]  # but for case and punctuation
    near = same or difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if not near:
        folded = difflib.get_close_matches(word.casefold(), [name.casefold() for name in names], n=3, cutoff=0.6)
        near = [name for name in names if name.casefold() in folded]
    if near:
        return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    if len(names) <= _LISTED:
        return "known: " + ", ".join(names)
    return "known: " + ", ".join(names[:_LISTED]) + ", …"


def _letters(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.casefold())
