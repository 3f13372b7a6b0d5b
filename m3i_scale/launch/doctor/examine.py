"""Examine hosts: local checks on each, then a rendezvous of one rank per host that measures the links."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from m3i_scale.launch.doctor import checks, group_checks
from m3i_scale.launch.doctor.agents import Agents
from m3i_scale.launch.doctor.facts import local_addresses
from m3i_scale.launch.doctor.findings import Finding, finding
from m3i_scale.launch.doctor.machine import Needs
from m3i_scale.launch.transport import HostFault, RemoteShell

_GROUP_S, _GROUP_OF_A_HOST_S = 300.0, 20.0
"""Time limit of the measurement, and its increment per host, because links are measured in rounds."""

Answers = dict[str, dict[str, Any]]


@dataclass
class Examination:
    """An examination of hosts, for a given run or in general."""

    slots: Mapping[str, int]
    """Ranks by host, the master node first."""
    site: RemoteShell
    """Connection settings, and the environment of the agents."""
    port: int
    """Port of rank 0 on the master node."""
    interface: str | None = None
    master_address: str | None = None
    run: str | None = None
    overrides: tuple[str, ...] = ()
    needs: Mapping[str, Needs] | None = None
    """Needs by host, if there is a run."""
    connect_s: float = 10.0
    """Time limit for ssh."""
    look_s: float = 120.0
    """Mostly for imports from a slow file system."""
    join_s: float = 30.0
    """Time limit for connecting to the master node's port."""
    measure_s: float = 30.0
    """Time limit of one measurement."""
    tell: Callable[[str], None] = lambda text: None

    @property
    def hosts(self) -> list[str]:
        """Return the names of all hosts, the master node first."""
        return list(self.slots)

    @property
    def head(self) -> str:
        """Return the host of rank 0."""
        return self.hosts[0]

    def findings(self) -> list[Finding]:
        """Examine all hosts, and return all findings, grouped by check."""
        with Agents(self.hosts, self.site, self.connect_s) as agents:
            self.tell(f"reaching {len(self.slots)} hosts")
            reached = agents.connect()
            findings = [item for host in self.hosts for item in self._reached(host, reached, agents.errors)]
            self.tell("each host looks at itself")
            answers = agents.request("look", {host: self._request(host) for host in reached}, self.look_s)
            if answers:
                findings += checks.findings_of(answers)
                if len(answers) > 1:
                    findings += checks.clock_findings({host: reached[host]["clock"] for host in answers})
                findings += (Finding(**item) for answer in answers.values() for item in answer["findings"])
                self.tell("the hosts meet and measure their links")
                findings += self._measure(agents, answers)
            for host in reached:
                if host in agents.errors:
                    why, fix = "it did answer at first", "look at this host: load, memory, network"
                    findings.append(finding("probe", host, agents.errors[host].what, fault=why, fix=fix))
        order = {check: number for number, check in enumerate(dict.fromkeys(item.check for item in findings))}
        return sorted(findings, key=lambda item: order[item.check])

    def _reached(
        self, host: str, reached: Mapping[str, Mapping[str, Any]], errors: Mapping[str, HostFault]
    ) -> Iterator[Finding]:
        fault, site = errors.get(host), self.site
        if fault is not None and fault.kind == "reach":
            why = "launchers start ranks on it in the same way, without anybody to type a password"
            fix = f"until `ssh -o BatchMode=yes {host} true` works: key, known_hosts, address, sshd"
            if site.transport == "srun":
                fix = f"until `srun --overlap --nodelist={host} true` works: the state of the node (sinfo)"
            yield finding("ssh", host, fault.what, fault=why, fix=fix)
            return
        if site.ssh_to_all:
            took = f" in {reached[host]['reached_s']:.1f} s" if host in reached else ""
            yield finding("ssh", host, f"reached{took}")
        if fault is not None and fault.kind == "package":
            fix = f"the packages of {site.python} on this host"
            yield finding("packages", host, fault.what, fault="ranks there would not start", fix=fix)
        elif fault is not None:
            fix = f"{site.python}, which must import m3i_scale, and the folder {site.workdir} on this host, or "
            fix += "--python and --workdir"
            yield finding("python", host, fault.what, fault="ranks are started with the same interpreter", fix=fix)

    def _request(self, host: str) -> dict[str, Any]:
        needs = (self.needs or {}).get(host) or Needs(self.slots[host], sum(self.slots.values()))
        return {
            "host": host,
            "hosts": self.hosts if self.site.ssh_to_all else [],
            "interface": self.interface,
            "needs": asdict(needs),
            "run": self.run,
            "overrides": self.overrides,
        }

    def _measure(self, agents: Agents, looked: Answers) -> Iterator[Finding]:
        address = self._head_address(looked)
        answers: Answers = {}
        if self.head in looked:
            token = secrets.token_hex(4)
            requests = {
                host: {
                    "host": host,
                    "hosts": list(looked),
                    "address": address,
                    "port": self.port,
                    "join_s": self.join_s,
                    "measure_s": self.measure_s,
                    "folder": answer.get("output_dir"),
                    "token": token,
                }
                for host, answer in looked.items()
            }
            # Another listener on the master node's port could block the others forever.
            answers = agents.request(
                "measure",
                requests,
                _GROUP_S + _GROUP_OF_A_HOST_S * len(requests),
                lambda answers: "fault" in answers.get(self.head, {}).get("port", {}),
            )
        if self.head in answers:
            yield from group_checks.port_findings(answers, self.head, f"{address}:{self.port}")
            yield from group_checks.shared_findings(answers)
            yield from group_checks.broken_findings(answers)
        yield from self._links(answers)

    def _links(self, answers: Answers) -> Iterator[Finding]:
        members: list[str] = max((answer.get("members", []) for answer in answers.values()), key=len, default=[])
        if len(members) > 1:
            pairs: dict[group_checks.Pair, list[Mapping[str, Any]]] = {}
            for answer in answers.values():
                for link in answer.get("links", ()):
                    host, other = link["pair"]
                    pairs.setdefault((host, other), []).append(link)
            yield from group_checks.pair_findings({pair: group_checks.slowest(link, 2) for pair, link in pairs.items()})
        if len(members) > 2:
            whole = [answer["group"] for answer in answers.values() if "group" in answer]
            yield group_checks.group_finding(group_checks.slowest(whole, len(members)), len(members))
        elif len(self.slots) > 1 and len(members) < 2:
            why = "fewer than two hosts reach the port of the head"
            yield finding("group", "all", "not measured", warning=why, fix="mend what stands above first")

    def _head_address(self, answers: Answers) -> str:
        """Return the master node's address for launchers: the given one, the address of the interface, or its name."""
        if self.master_address is not None:
            return self.master_address
        if self.interface is not None and self.head in answers:
            addresses = local_addresses(answers[self.head]["interfaces"], self.interface)
            if addresses:
                return addresses[0]
        return self.head if self.site.ssh_to_all else "127.0.0.1"
