"""Choose the environment variables of the ranks: only named ones, so that secrets are never passed by accident."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from m3i_scale.errors import ConfigError
from m3i_scale.rank_variables import NAMES as RANK_VARIABLES
from m3i_scale.text import HIDDEN, is_secret

LAUNCHERS = (*RANK_VARIABLES, "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by launchers, with a different value on every rank."""
SLURM_EXPORTS = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER")
"""Variables that Slurm passes from the calling environment, in addition to the named ones."""
INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The network interface of Gloo and of NCCL."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Variable:
    """An environment variable that is passed to the ranks."""

    name: str
    value: str
    secret: bool = False
    """Its value must appear neither on a command line nor in a log."""


def check_variable(entry: str) -> str:
    """Return the name in `NAME` or `NAME=value`. Raise ValueError for an invalid name, one that launchers set, or the
    value of a secret."""
    name, equals, _ = entry.partition("=")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if name in LAUNCHERS:
        raise ValueError(f"{name} is set by the launcher")
    if name in INTERFACE:
        raise ValueError(f"{name} is set by `interface`")
    if equals and is_secret(name):
        raise ValueError(f"the value of {name} is a secret; write the name alone, and set it where you launch")
    return name


def travelling(entries: Sequence[str], here: Mapping[str, str], *, interface: str | None) -> tuple[Variable, ...]:
    """Return the variables of the ranks, sorted by name. An entry `NAME` takes its value from `here`."""
    variables = [Variable(name, interface) for name in INTERFACE] if interface is not None else []
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals and name not in here:
            raise ConfigError(
                f"{name} is to travel to the ranks, and is not set here",
                where=f"environment: {name}",
                fix="set it, or take it off the list" + ("" if is_secret(name) else f", or write {name}=value"),
            )
        variables.append(Variable(name, value if equals else here[name], is_secret(name)))
    return tuple(sorted(variables, key=lambda variable: variable.name))


def hidden(variables: Sequence[Variable]) -> tuple[Variable, ...]:
    """Return the same variables with redacted secret values, safe to print."""
    return tuple(replace(item, value=HIDDEN) if item.secret else item for item in variables)


def without_secret_variables(here: Mapping[str, str], allowed: Sequence[Variable]) -> dict[str, str]:
    """Return the environment for a launcher's process, without secrets that are not named. Launchers pass parts of
    their environment on by default (DeepSpeed all MLFLOW*, sbatch everything)."""
    names = {variable.name for variable in allowed}
    return {name: value for name, value in here.items() if name in names or not is_secret(name)}
