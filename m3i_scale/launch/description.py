"""Describe the hosts, ranks and environment of a run; one description serves all launchers.

Only named environment variables are passed to the ranks, so that secrets are never passed by accident.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from m3i_scale.config import parse_section, read_yaml
from m3i_scale.config.sections import Section
from m3i_scale.errors import ConfigError
from m3i_scale.launch.hosts import Host, allocated_hosts, is_host_name, parse_hosts, read_hostfile, select
from m3i_scale.options import Command, Parts, expanded, field_options
from m3i_scale.rank_variables import NAMES as RANK_VARIABLES
from m3i_scale.text import HIDDEN, is_secret

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _checked(is_valid: Callable[[str], object], message: str) -> AfterValidator:
    """Return a validator of texts; its error is the text and `message`."""

    def check(text: str) -> str:
        if not is_valid(text):
            raise ValueError(f"{text!r}{message}")
        return text

    return AfterValidator(check)


def _matches(pattern: str, message: str) -> AfterValidator:
    return _checked(re.compile(pattern).fullmatch, message)


Line = Annotated[
    str, _checked(lambda text: text.strip() and text.isprintable(), " is not one line of printable characters")
]
AbsolutePath = Annotated[Line, _matches("/.*", " means another place on every host; give it from the root on")]
HostName = Annotated[str, _checked(is_host_name, " is no host name")]
Word = Annotated[str, _matches("[A-Za-z0-9][A-Za-z0-9._,-]*", ": letters, digits, '.', '_', ',' and '-' only")]
TimeLimit = Annotated[
    str,
    _matches(
        r"(?=.*[1-9])(?:\d{1,3}-)?\d{1,3}:[0-5]\d:[0-5]\d",
        " is no time limit; write [days-]hours:minutes:seconds, e.g. 24:00:00",
    ),
]
Image = Annotated[
    str,
    _matches(r"[A-Za-z0-9/.][A-Za-z0-9._/:@#+-]*", " is no image, e.g. registry.example.org/m3i:1 or /data/m3i.sif"),
]

LAUNCHER_VARIABLES = (*RANK_VARIABLES, "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by launchers, with a different value on every rank."""
SLURM_EXPORTS = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER")
"""Variables that Slurm passes from the calling environment, in addition to the named ones."""
INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The network interface of Gloo and of NCCL."""
OPTION_NAMES = {"environment": "--env"}
"""Command-line options with a name other than their field's."""


class Cluster(Section):
    """Where and how a run is started. A field that the chosen launcher does not support is an error.

    Every field is also a command-line option, with its docstring as help.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    nodes: int | None = Field(default=None, ge=1, le=100_000)
    """Number of nodes, if no hosts are named. Default: 1."""
    ranks_per_node: int | None = Field(default=None, ge=1, le=1024)
    """Processes per node, if no hosts are named. Default: one for each accelerator of this machine, or 1."""
    hostfile: Path | None = None
    """File with a line `name slots=N` per node; the first one is the master node."""
    hosts: tuple[str, ...] = ()
    """A host as `name slots=N`, instead of a hostfile; repeat for several."""
    include: tuple[HostName, ...] = ()
    """Use only this host; repeat for several."""
    exclude: tuple[HostName, ...] = ()
    """Leave out this host; repeat for several."""
    interface: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")
    """Network interface for Gloo and NCCL, with the same name on all nodes."""
    master_address: HostName | None = None
    """Address of the master node, reachable from all nodes. Default: the interface's address if this machine is the
    master node, else its host name."""
    master_port: int = Field(default=29500, ge=1024, le=65535)
    """Port of rank 0 for the rendezvous. Default: 29500."""
    environment: tuple[str, ...] = ()
    """Environment variable for the ranks, `NAME` (with its current value) or `NAME=value`; repeat for several. No other
    is passed."""
    python: AbsolutePath | None = None
    """Python interpreter on all nodes. Default: the current one."""
    workdir: AbsolutePath | None = None
    """Working directory of all ranks. Default: the current one."""
    ssh: tuple[Line, ...] = ()
    """Additional argument of ssh; repeat for several: --ssh=-i --ssh=/home/me/.ssh/cluster."""
    transport: Literal["ssh", "srun"] = "ssh"
    """elastic and doctor: connection to the hosts. srun: those of the current Slurm allocation. Default: ssh."""
    max_restarts: int = Field(default=0, ge=0, le=10_000)
    """elastic: maximum number of restarts after failures. Default: 0."""
    min_nodes: int | None = Field(default=None, ge=1)
    """elastic: minimum number of nodes to continue with while others are lost. Default: all."""
    restart_pause_s: float = Field(default=5.0, ge=0, le=3600)
    """elastic: seconds to wait before the first restart, doubled for each further one, at most 300 s. Default: 5."""
    probe_s: float = Field(default=30.0, gt=0, le=3600)
    """elastic: interval in seconds for probing lost hosts. Default: 30."""
    silence_s: float = Field(default=30.0, ge=5, le=3600)
    """elastic: heartbeat timeout in seconds, after which a host is considered lost. Default: 30."""
    gpus_per_node: int | None = Field(default=None, ge=0, le=1024)
    """Accelerators to reserve per node; 0 if ranks compute on CPUs. Default: one per rank."""
    cpus_per_rank: int | None = Field(default=None, ge=1, le=1024)
    """CPU cores to reserve per rank."""
    partition: Word | None = None
    """Slurm: the partition."""
    account: Word | None = None
    """Slurm: the account."""
    time_limit: TimeLimit | None = None
    """Slurm: the time limit, e.g. 24:00:00, or 2-00:00:00 for two days."""
    requeue: bool = True
    """Slurm: requeue a job that was preempted, lost a node, or reached its time limit and saved. Default: yes."""
    sbatch: tuple[Line, ...] = ()
    """Slurm: additional option of sbatch; repeat for several: --sbatch=--qos=high."""
    container_image: Image | None = None
    """Slurm and Kubernetes: the container image of the ranks."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Slurm: the container runtime. Default: pyxis."""
    container_mounts: tuple[AbsolutePath, ...] = ()
    """Slurm: host folder to mount at the same path; repeat for several. Working and output directories are always
    mounted."""
    namespace: str | None = Field(default=None, pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Kubernetes: the namespace. Default: the namespace of the current context."""
    storage_gib: int = Field(default=200, ge=1)
    """Kubernetes: size in GiB of the volume for output_dir. Default: 200."""
    data_claim: str | None = Field(default=None, pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
    """Kubernetes: an existing volume claim with the shards, mounted read-only at /data."""

    @field_validator("environment", mode="before")
    @classmethod
    def _is_a_list(cls, entries: object) -> object:
        # A mapping may contain secrets, which must not appear in a message.
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError("a list of NAME (as it is here) or NAME=value, e.g. [HF_TOKEN, OMP_NUM_THREADS=8]")
        return entries

    @field_validator("environment")
    @classmethod
    def _names_are_names(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        names = [check_variable(entry) for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is named twice")
        return entries

    @model_validator(mode="after")
    def _hosts_are_named_once(self) -> Self:
        fields = self.model_fields_set
        for field in ("hostfile", "hosts"):
            if field in fields and not getattr(self, field):
                raise ValueError(f"`{field}` names no host; leave it out for a run on this machine alone")
        if self.hostfile is not None and self.hosts:
            raise ValueError("`hostfile` and `hosts` both name the hosts; give one of them")
        idle: tuple[str, ...]
        if self.transport == "srun":
            idle, why = ("hostfile", "hosts", "ssh"), "with srun, which has the hosts of its allocation"
        elif self.hostfile is not None or self.hosts:
            idle, why = ("nodes", "ranks_per_node"), "where hosts are named; `include` chooses among them"
        else:
            idle, why = ("include", "exclude", "ssh"), "where no hosts are named (hostfile, hosts)"
        for field in idle:
            if field in fields:
                raise ValueError(f"`{field}` has no effect {why}")
        if "container_runtime" in fields and self.container_image is None:
            raise ValueError("`container_runtime` has no effect without `container_image`")
        return self

    def named_hosts(self) -> tuple[Host, ...]:
        """Return the hosts to run on, the master node first; () if only their number is given."""
        if self.hostfile is not None:
            hosts = read_hostfile(self.hostfile)
        elif self.hosts:
            hosts = parse_hosts(self.hosts, where="hosts")
        elif self.transport == "srun":
            hosts = allocated_hosts(os.environ, self.ranks_per_node)
        else:
            return ()
        return select(hosts, include=self.include, exclude=self.exclude)


def read_cluster(path: Path | None, options: dict[str, Any]) -> Cluster:
    """Read a description from a YAML file; `options` override its values, except None and empty ones. A relative
    `hostfile` in it is relative to its folder."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = read_yaml(path)
        except ConfigError as error:
            what = error.what.replace("config file", "cluster file")
            raise ConfigError(what, where=error.where, fix="correct it, as in docs/guides/multi-gpu.md") from None
        if isinstance(values.get("hostfile"), str):
            values["hostfile"] = path.parent / values["hostfile"]
    options = {key: value for key, value in options.items() if value not in (None, [], ())}
    # Hosts from the command line replace those of the file, whichever field each of them uses.
    if options.keys() & {"hostfile", "hosts"}:
        values = {key: value for key, value in values.items() if key not in ("hostfile", "hosts")}
    names = " ".join(OPTION_NAMES.get(key, "--" + key.replace("_", "-")) for key in options)
    where = " and ".join(part for part in (str(path) if path else "", names) if part)
    return parse_section(Cluster, values | options, where=where or "the command line")


def _panel_of(text: str) -> str | None:
    """Return the launchers that a help text begins with."""
    match = re.match(r"((?:elastic|Slurm|Kubernetes)(?: and \w+)?): ", text)
    return f"Options of {match[1]}" if match else None


def takes_cluster(fields: Iterable[str]) -> Callable[[Command], Command]:
    """Add `--cluster FILE` and an option for each of these fields to a command, replacing its parameter `cluster`."""
    file = typer.Option("--cluster", help="YAML file with these options; the command line overrides it.")
    parts: Parts = {
        "cluster_file": (Annotated[Path | None, file], None),
        **field_options(Cluster, fields, OPTION_NAMES, _panel_of),
    }
    return lambda command: expanded(
        command, "cluster", parts, lambda cluster_file, **options: read_cluster(cluster_file, options)
    )


# ------------------------------------------------------------------ environment variables


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
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if name in LAUNCHER_VARIABLES:
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
                f"the environment variable {name} is to be passed to the ranks, but is not set",
                where=f"environment: {name}",
                fix="set it, or remove it from the list" + ("" if is_secret(name) else f", or write {name}=value"),
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
