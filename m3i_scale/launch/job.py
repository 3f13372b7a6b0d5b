"""Resolve one launch: its hosts, ranks, commands and environment variables."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from m3i_scale.config import RunConfig, find_run_file, known_runs
from m3i_scale.errors import ConfigError
from m3i_scale.launch import PRIVATE, PUBLIC
from m3i_scale.launch.description import Cluster, Variable, hidden, travelling
from m3i_scale.launch.hosts import Host, is_here
from m3i_scale.text import redact, redact_text


@dataclass(frozen=True)
class Job:
    """Input of the renderers, which turn it into files and commands."""

    cluster: Cluster
    run: str
    """A built-in name, or an absolute path that is visible on all hosts."""
    overrides: tuple[str, ...]
    name: str
    output_dir: Path
    """Absolute."""
    workdir: Path
    """Absolute."""
    hosts: tuple[Host, ...]
    """The master node first; empty if only their number is given."""
    variables: tuple[Variable, ...]
    values: Mapping[str, Any]
    """The complete config file, with `extends` and overrides applied."""
    redacted: bool = False
    """Whether secrets have been removed."""

    @property
    def folder(self) -> Path:
        """Return the folder of launch files."""
        return self.output_dir / "launch"

    @property
    def host_names(self) -> list[str]:
        """Return the names of the hosts; only this machine's if none are named."""
        return [host.name for host in self.hosts] or ["localhost"]

    @property
    def nodes(self) -> int:
        """Return the number of hosts."""
        return len(self.hosts) or self.cluster.nodes or 1

    @property
    def ranks_per_node(self) -> int:
        """Return the ranks per node, if no hosts are named. Default: the accelerators of this machine, or 1."""
        return devices_here() if self.cluster.ranks_per_node is None else self.cluster.ranks_per_node

    @property
    def world_size(self) -> int:
        """Return the number of ranks on all nodes."""
        return sum(host.slots for host in self.hosts) or self.nodes * self.ranks_per_node

    @property
    def gpus_per_node(self) -> int:
        """Return the number of accelerators to reserve per node."""
        gpus = self.cluster.gpus_per_node
        return self.ranks_per_node if gpus is None else gpus

    @property
    def python(self) -> str:
        """Return the interpreter of all ranks."""
        return self.cluster.python or (sys.executable if self.cluster.container_image is None else "python3")

    @property
    def train(self) -> tuple[str, ...]:
        """Return the program of a rank, as arguments of `python -m`."""
        return ("m3i_scale", "train", self.run, *self.overrides)

    @property
    def rank_argv(self) -> tuple[str, ...]:
        """Return the command line of a rank."""
        return (self.python, "-u", "-m", *self.train)

    @property
    def plain(self) -> tuple[Variable, ...]:
        """Return the variables that are not secret."""
        return tuple(variable for variable in self.variables if not variable.secret)

    @property
    def secret(self) -> tuple[Variable, ...]:
        """Return the variables that are secret."""
        return tuple(variable for variable in self.variables if variable.secret)

    @property
    def mode(self) -> int:
        """Return the mode of files with the ranks' complete configuration: readable only by the owner if a variable is
        a secret, or a shard address contains a login or a signature."""
        values = dict(self.values)
        hides = any(redact_text(override) != override for override in self.overrides) or redact(values) != values
        return PRIVATE if self.secret or hides or self.redacted else PUBLIC

    def head_address(self) -> str:
        """Return the address of rank 0's rendezvous."""
        cluster = self.cluster
        if cluster.master_address is not None:
            return cluster.master_address
        if cluster.interface is not None:
            return _address_here(cluster.interface, self.hosts)
        return self.hosts[0].name if self.hosts else "127.0.0.1"

    def without_secrets(self) -> Job:
        """Return the same job with redacted secrets, including those in addresses."""
        overrides = tuple(map(redact_text, self.overrides))
        values, secret = redact(dict(self.values)), self.mode == PRIVATE
        return replace(self, variables=hidden(self.variables), overrides=overrides, values=values, redacted=secret)


@cache
def devices_here() -> int:
    """Return the number of accelerators that DeepSpeed finds on this machine; one if ranks compute on CPUs."""
    return max(1, gpus_here())


def gpus_here() -> int:
    """Return the number of accelerators that are visible to this process; 0 if ranks compute on CPUs."""
    from deepspeed.accelerator import get_accelerator  # takes seconds, needed only without a given number of ranks

    accelerator = get_accelerator()
    return 0 if accelerator.device_name() == "cpu" else int(accelerator.device_count())


def _address_here(interface: str, hosts: tuple[Host, ...]) -> str:
    if hosts and not is_here(hosts[0].name):
        raise ConfigError(
            f"the address of the interface '{interface}' is unknown: the master node {hosts[0].name} is another "
            "machine",
            where=f"interface: {interface}",
            fix=f"set --master-address to the address that `ssh {hosts[0].name} ip -4 address show {interface}` prints",
        )
    cards = psutil.net_if_addrs()
    addresses = [item.address for item in cards.get(interface, []) if item.family == socket.AF_INET]
    if not addresses:
        raise ConfigError(
            f"this machine has no interface '{interface}' with an IPv4 address",
            where=f"interface: {interface}",
            fix=f"use one of {', '.join(sorted(cards))}",
        )
    return addresses[0]


def name_on_hosts(run: str) -> str:
    """Return the name of a built-in config unchanged, and a path as an absolute path."""
    path = find_run_file(run)
    return run if known_runs().get(run) == path else str(path.absolute())


def make_job(
    config: RunConfig,
    run: str,
    overrides: tuple[str, ...],
    cluster: Cluster,
    values: Mapping[str, Any],
    here: Mapping[str, str],
) -> Job:
    """Combine a run (a config file, or the name of a built-in one) and a description. `values` is the config file with
    `extends` and overrides applied, and `here` the environment of the launching process."""
    hosts = cluster.named_hosts()
    names = [host.name for host in hosts]
    loop = next((name for name in names if name == "localhost" or name.startswith("127.")), None)
    if len(names) > 1 and loop is not None:
        raise ConfigError(
            f"'{loop}' is a different machine on every host",
            where=f"hosts: {', '.join(names)}",
            fix="use the name by which the other hosts reach this machine",
        )
    workdir = Path(cluster.workdir or Path.cwd())
    job = Job(
        cluster=cluster,
        run=name_on_hosts(run),
        overrides=overrides,
        name=config.name,
        output_dir=workdir / config.output_dir,
        workdir=workdir,
        hosts=hosts,
        variables=travelling(cluster.environment, here, interface=cluster.interface),
        values=values,
    )
    for what, text in (("output_dir", job.output_dir), ("working directory", workdir), ("config file", job.run)):
        if not str(text).isprintable():  # a line break would end a comment of a batch script, and start a command
            raise ConfigError(
                f"the {what} must have printable characters only",
                where=repr(str(text)),
                fix="remove the other characters",
            )
    for override in overrides:
        if re.search(r"[\0\n\r]", override):
            raise ConfigError("an override must be one line", where=repr(override), fix="remove the line break")
    return job
