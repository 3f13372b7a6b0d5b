"""`m3i-scale doctor`: check the environment for a config file and a cluster description."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_scale.elastic.doctor import checks
from m3i_scale.elastic.doctor.host import Agents
from m3i_scale.elastic.link import HostError, RemoteShell
from m3i_scale.errors import ConfigError
from m3i_scale.host.findings import Answers, Finding, compare_hosts, finding
from m3i_scale.host.machine import Needs
from m3i_scale.launch.description import Cluster, travelling
from m3i_scale.launch.job import name_on_hosts

_GROUP_S = 300.0
"""Time limit of the measurements of the group."""


def examine(
    run: str | None,
    overrides: list[str],
    cluster: Cluster,
    *,
    connect_s: float = 10.0,
    log: Callable[[str], None] = lambda text: None,
) -> list[Finding]:
    """Check the nodes of a cluster description, or this machine if it names none.

    Args:
        run: config file, or the name of a built-in one. None: check the nodes only.
        connect_s: ssh connection timeout in seconds.
        log: called with progress messages.
    """
    if overrides and run is None:
        raise ConfigError(
            "overrides have no effect without a config file",
            where=" ".join(overrides),
            fix="add a config file, or leave out the overrides",
        )
    named = cluster.named_hosts()
    if not named and (cluster.nodes or 1) > 1:
        raise ConfigError(
            f"the {cluster.nodes} machines must be listed",
            where=f"nodes: {cluster.nodes}",
            fix="use --hostfile FILE with a line `name slots=N` for each",
        )
    slots = {host.name: host.slots for host in named} or {socket.gethostname(): cluster.ranks_per_node or 1}
    variables = {
        item.name: item.value for item in travelling(cluster.environment, os.environ, interface=cluster.interface)
    }
    site = RemoteShell(
        python=cluster.python or sys.executable,
        workdir=cluster.workdir or str(Path.cwd()),
        output_dir="",
        ssh=cluster.ssh,
        environment=variables,
        transport=cluster.transport,
        ssh_to_all=bool(named),
    )
    examination = Examination(
        slots=slots,
        site=site,
        cluster=cluster,
        run=None if run is None else name_on_hosts(run),
        overrides=tuple(overrides),
        needs=None if run is None else _needs(run, overrides, slots),
        connect_s=connect_s,
        log=log,
    )
    return examination.findings()


def _needs(run: str, overrides: list[str], slots: dict[str, int]) -> dict[str, Needs]:
    from m3i_scale.objective.recipe import load_run_and_recipe
    from m3i_scale.plan.planning import read_vocabulary
    from m3i_scale.run.preflight import needs_of

    (config, recipe), world = load_run_and_recipe(run, overrides), sum(slots.values())
    known = read_vocabulary(config, recipe, None, None)
    by_slots = {
        count: needs_of(config, known.label_sets, known.tokens, world_size=world, ranks_here=count)
        for count in set(slots.values())
    }
    return {host: by_slots[count] for host, count in slots.items()}


@dataclass
class Examination:
    """An examination of hosts: local checks on each, then measurements of a group with one rank per host."""

    slots: Mapping[str, int]
    """Ranks by host, the master node first."""
    site: RemoteShell
    cluster: Cluster
    run: str | None = None
    overrides: tuple[str, ...] = ()
    needs: Mapping[str, Needs] | None = None
    connect_s: float = 10.0
    """Time limit for ssh."""
    report_s: float = 120.0
    """Time limit of local checks, mostly for imports from a slow file system."""
    join_s: float = 30.0
    """Time limit for connecting to the master node's port."""
    measure_s: float = 30.0
    """Time limit of one operation of the group."""
    log: Callable[[str], None] = lambda text: None

    @property
    def hosts(self) -> list[str]:
        """Return the names of all hosts, the master node first."""
        return list(self.slots)

    def findings(self) -> list[Finding]:
        """Examine all hosts, and return all findings, grouped by check."""
        self.log(f"connecting to {len(self.slots)} hosts")
        with Agents(self.hosts, self.site, self.connect_s) as agents:
            connected = agents.hosts
            findings = [item for host in self.hosts for item in self._connection(host, agents.errors.get(host))]
            self.log("running local checks")
            answers = agents.request("report", {host: self._request(host) for host in agents.hosts}, self.report_s)
            if answers:
                findings += compare_hosts(answers, checks.CHECKS)
                findings += (Finding(**item) for answer in answers.values() for item in answer["findings"])
                self.log("testing the network")
                findings += self._measure(agents, answers)
            for host in connected:
                if host in agents.errors:
                    why, fix = "it did answer at first", "check load, memory and network of this host"
                    findings.append(finding("probe", host, agents.errors[host].what, error=why, fix=fix))
        order = {check: number for number, check in enumerate(dict.fromkeys(item.check for item in findings))}
        return sorted(findings, key=lambda item: order[item.check])

    def _connection(self, host: str, error: HostError | None) -> Iterator[Finding]:
        site = self.site
        if error is not None and error.kind == "connect":
            why = "launchers start ranks on it in the same way, without anybody to type a password"
            fix = f"check key, known_hosts, address and sshd until `ssh -o BatchMode=yes {host} true` works"
            if site.transport == "srun":
                fix = f"check the state of the node (sinfo) until `srun --overlap --nodelist={host} true` works"
            yield finding("ssh", host, error.what, error=why, fix=fix)
            return
        if site.ssh_to_all:
            yield finding("ssh", host, "connected")
        if error is not None:
            fix = f"install {site.python} with m3i_scale, and create {site.workdir} on this host, or set "
            fix += "--python and --workdir"
            yield finding("python", host, error.what, error="ranks are started with the same interpreter", fix=fix)

    def _request(self, host: str) -> dict[str, Any]:
        needs = (self.needs or {}).get(host) or Needs(self.slots[host], sum(self.slots.values()))
        return {
            "host": host,
            "interface": self.cluster.interface,
            "needs": asdict(needs),
            "run": self.run,
            "overrides": self.overrides,
        }

    def _measure(self, agents: Agents, reports: Answers) -> Iterator[Finding]:
        head, address = self.hosts[0], self._head_address(reports)
        answers: Answers = {}
        if head in reports:
            token = secrets.token_hex(4)
            requests = {
                host: {
                    "host": host,
                    "hosts": list(reports),
                    "address": address,
                    "port": self.cluster.master_port,
                    "join_s": self.join_s,
                    "measure_s": self.measure_s,
                    "folder": report.get("output_dir"),
                    "token": token,
                }
                for host, report in reports.items()
            }
            # Another listener on the master node's port could block the others forever.
            answers = agents.request(
                "measure", requests, _GROUP_S, lambda answers: "error" in answers.get(head, {}).get("port", {})
            )
        if head in answers:
            yield from checks.port_findings(answers, head, f"{address}:{self.cluster.master_port}")
            yield from checks.shared_findings(answers)
        members = max((len(answer.get("members", [])) for answer in answers.values()), default=0)
        if members > 1 or any("group_error" in answer for answer in answers.values()):
            yield from checks.group_findings(answers, members or len(answers))
        elif len(self.slots) > 1:
            why = "fewer than two hosts reach the port of the master node"
            yield finding("group", "all", "not measured", warning=why, fix="fix the errors above first")

    def _head_address(self, reports: Answers) -> str:
        """Return the master node's address for launchers: the given one, the address of the interface, or its name."""
        cluster, head = self.cluster, self.hosts[0]
        if cluster.master_address is not None:
            return cluster.master_address
        if cluster.interface is not None and head in reports:
            addresses = checks.local_addresses(reports[head]["interfaces"], cluster.interface)
            if addresses:
                return addresses[0]
        return head if self.site.ssh_to_all else "127.0.0.1"
