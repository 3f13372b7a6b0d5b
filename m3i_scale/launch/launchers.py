"""Find launchers by name. To add one, create a module with `HONOURS` and `render`, and add its name here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from m3i_scale.errors import ConfigError, did_you_mean

if TYPE_CHECKING:  # not imported at runtime, to keep --help fast
    from m3i_scale.launch.job import Job
    from m3i_scale.launch.plan import LaunchPlan

_NAME_THEM = "name the machines: --hostfile FILE, with a line `name slots=N` for every one"
_ALLOCATED = "leave it out: the machines are those of the allocation, of which --include takes some"
LAUNCHERS = ("local", "deepspeed", "slurm", "torchrun", "kubeflow", "elastic")
READY_FILES = {"mpirun": "launchers/mpirun.sh", "accelerate": "launchers/accelerate.sh, with accelerate.yaml"}
"""Launchers that users start themselves, with a file from a checkout."""


class Launcher(Protocol):
    """Interface of a launcher's module."""

    HONOURS: frozenset[str]
    """The fields of `Cluster` that it supports."""

    def render(self, job: Job) -> LaunchPlan:
        """Return files and commands."""


def find_launcher(name: str) -> Launcher:
    """Return the module of a launcher."""
    if name in READY_FILES:
        raise ConfigError(
            f"`launch` does not start {name}",
            where="--with",
            fix=f"edit and start {READY_FILES[name]} (docs/launching.md), or launch with deepspeed or torchrun",
        )
    if name not in LAUNCHERS:
        raise ConfigError(f"no launcher '{name}'", where="--with", fix=did_you_mean(name, LAUNCHERS))
    return cast(Launcher, import_module(f"m3i_scale.launch.{name}"))


def render(name: str, job: Job) -> LaunchPlan:
    """Return the files and commands of one launcher."""
    launcher = find_launcher(name)
    for field in sorted(job.cluster.model_fields_set - launcher.HONOURS):
        others = [other for other in LAUNCHERS if field in find_launcher(other).HONOURS]
        fix = f"leave it out, or launch with {' or '.join(others)}"
        if field == "nodes":
            fix = _ALLOCATED if job.cluster.transport == "srun" else _NAME_THEM
        raise ConfigError(
            f"`{field}` has no effect with {name}", where=f"{field}: {getattr(job.cluster, field)}", fix=fix
        )
    return launcher.render(job)
