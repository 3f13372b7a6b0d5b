"""Errors with an explanation: the problem, its location, its consequence and a fix."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from typing_extensions import ParamSpec, Self

EXIT_USER_ERROR = 2
"""The cause is the input, the configuration or the machine; the message contains the fix."""

EXIT_FAILED = 1
"""Any other failure. A supervisor may restart the run from its latest checkpoint."""

EXIT_PREEMPTED = 75
"""The run received a stop request (SIGTERM, SIGUSR2), saved a checkpoint and can be restarted (EX_TEMPFAIL)."""


P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """Error that the user can fix. The command line prints it without a traceback and exits with code 2.

    Args:
        what: the problem, in one sentence.
        where: the file, key or value that causes it.
        why: the consequence, if it is not obvious.
        fix: the next step for the user.
    """

    exit_code = EXIT_USER_ERROR
    everywhere = False
    """Whether all ranks raise it; then only one of them prints it."""

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
        """Return the error as `where, message, fix`."""
        message = self.what if self.why is None else f"{self.what}; {self.why}"
        return {"where": self.where, "message": message, "fix": self.fix}

    def on_rank(self, rank: int) -> UserError:
        """Return the same error for all ranks to raise, with the rank where it occurred."""
        where = f"rank {rank}" if self.where is None else f"rank {rank}: {self.where}"
        return type(self)(self.what, where=where, why=self.why, fix=self.fix)

    def raised_everywhere(self) -> Self:
        """Mark the error as raised on all ranks, and return it."""
        self.everywhere = True
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Preserve keyword arguments when the error is pickled, as on its way out of a data-loader worker."""
        return (partial(type(self), where=self.where, why=self.why, fix=self.fix), (self.what,))


@contextmanager
def error_prefix(whose: str) -> Iterator[None]:
    """Prefix the `where` of every error raised inside the block with `whose`."""
    try:
        yield
    except UserError as error:
        error.where = whose if error.where is None else f"{whose}: {error.where}"
        raise


class ConfigError(UserError):
    """Invalid or inconsistent config file, recipe or DeepSpeed JSON."""


class AggregateError(ConfigError):
    """Several errors, reported at once.

    Args:
        errors: the errors, each as it would be raised alone.
    """

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = tuple(errors)
        places = dict.fromkeys(error.where for error in errors if error.where)
        what = f"{len(errors)} errors: " + "; ".join(error.what for error in errors)
        super().__init__(what, where="; ".join(places) or None)

    def __str__(self) -> str:
        parts = [f"{number}. " + str(error).replace("\n", "\n   ") for number, error in enumerate(self.errors, 1)]
        return "\n".join([f"{len(self.errors)} errors", *parts])

    def on_rank(self, rank: int) -> AggregateError:
        """Return the same errors for all ranks to raise, with the rank where they occurred."""
        return AggregateError([error.on_rank(rank) for error in self.errors])

    def __reduce__(self) -> tuple[object, ...]:
        return (AggregateError, (self.errors,))


class ErrorCollector:
    """Collector of errors from several checks, which reports all of them at once."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def collect(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call `check` and return its result. If it raises a `UserError`, store it and return None."""
        try:
            return check(*args, **kwargs)
        except AggregateError as error:
            self.errors += error.errors
        except UserError as error:
            self.errors.append(error)
        return None

    def raise_any(self) -> None:
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise AggregateError(self.errors)


class DataError(UserError):
    """Shards, samples or labels that cannot be used."""


class LostWorkerError(DataError):
    """Data-loader process that was killed externally. The run can resume without a fix."""

    exit_code = EXIT_FAILED


class MissingRanksError(UserError):
    """Some ranks did not join the rendezvous. The run can be restarted without a change on this host."""

    exit_code = EXIT_FAILED


class CheckpointError(UserError):
    """Checkpoint that is missing, corrupt, modified or from a different run."""


class ExportError(UserError):
    """Export that would not load, or would load as a different model."""


ERROR_FILE = "M3I_SCALE_ERROR_FILE"
"""Environment variable: file in which a command describes its error to the process that has started it."""
_KINDS = (UserError, ConfigError, DataError, LostWorkerError, MissingRanksError, CheckpointError, ExportError)


def save_error(error: UserError, path: Path) -> None:
    """Write an error for `load_error`. If another rank has written one, it stays."""
    parts = error.errors if isinstance(error, AggregateError) else [error]
    document = []
    for one in parts:
        kind = next(kind for kind in type(one).__mro__ if kind in _KINDS)
        document.append([kind.__name__, one.what, {"where": one.where, "why": one.why, "fix": one.fix}])
    with suppress(FileExistsError), path.open("x", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(document, file)


def load_error(path: Path) -> UserError | None:
    """Read the error of a command, with its class; None if it has written none."""
    if not path.exists():
        return None
    kinds = {kind.__name__: kind for kind in _KINDS}
    document = json.loads(path.read_text(encoding="utf-8"))
    errors = [kinds[kind](what, **facts) for kind, what, facts in document]
    return errors[0] if len(errors) == 1 else AggregateError(errors)


_LISTED = 80  # there are fewer built-in configs than this


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None, *, parent: str = "") -> str:
    """Return the hint for a misspelled name: the closest known names, after `parent`. If none is close, return
    `otherwise`, or the first known names."""
    names = sorted(known)
    same = [name for name in names if _letters(name) == _letters(word)]  # equal except for case and punctuation
    near = same or difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"'{parent}{name}'" for name in near) + "?"
    if otherwise is not None:
        return otherwise
    return "use one of: " + ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _letters(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.casefold())
