"""Prepare attempts: find responding hosts, the largest world and rank 0's address; track the reliability of hosts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from m3i_scale.config import RunConfig
from m3i_scale.elastic.link import Inbox, Link, RemoteShell, connect, receive
from m3i_scale.elastic.supervise import AttemptResult, Log
from m3i_scale.elastic.wire import Message
from m3i_scale.elastic.worlds import ComparedSamples, World, largest_world
from m3i_scale.errors import UserError
from m3i_scale.launch.hosts import Host, is_here
from m3i_scale.text import listed

FAILS = "its ranks were the first to fail, twice running"
SPARE = "it answers, but with its ranks the run cannot be shared out (data.streams, optim.batch_size)"


class CannotStartError(UserError):
    """Too few hosts respond, or rank 0 has no port. At the start it ends the launch; later it may be temporary."""


@dataclass(frozen=True)
class Policy:
    """Conditions for another attempt."""

    max_restarts: int = 0
    """Maximum number of restarts after failed attempts. Attempts that end because a host recovered do not count."""
    min_hosts: int | None = None
    """Minimum number of hosts to continue with; None: all."""
    pause_s: float = 5.0
    """Before the first restart; doubled for each further one, up to 300 s."""
    probe_s: float = 30.0
    """Interval for probing lost hosts."""


@dataclass(frozen=True)
class Work:
    """The run to launch, and its hosts."""

    run: RunConfig
    command: tuple[str, ...]
    """Command of every rank: interpreter, module, `train`, config file, overrides."""
    hosts: tuple[Host, ...]
    site: RemoteShell
    master_address: str | None = None
    """Address of the first host; None: the address of `interface`, or its name."""
    interface: str | None = None
    master_port: int | None = None
    """None: a free port on that host."""


class HostHistory:
    """Reliability of the hosts over attempts: their order, and which are optional or left out."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._named = tuple(hosts)
        self.order = self._named
        """Hosts that have just worked first, unreliable ones last."""
        self.without_answer: set[str] = set()
        """Names of hosts that were lost, or did not respond last time."""
        self.failing: set[str] = set()
        """Names of hosts that were the root cause of two consecutive failures although they respond."""
        self._blamed: str | None = None

    def unresponsive(self, fewest: int) -> frozenset[str]:
        """Return the names of hosts that need not be waited for, if the others are enough."""
        return frozenset(self.without_answer) if len(self.order) - len(self.without_answer) >= fewest else frozenset()

    def ended(self, world: World, outcome: AttemptResult) -> None:
        """Record the result of an attempt."""
        self.without_answer |= set(outcome.lost)
        cause = outcome.cause if outcome.status == "failed" else None
        # A lost host is not blamed, because it may recover permanently.
        blamed = cause.host if cause is not None and cause.kind != "host" and not cause.is_consequence else None
        if blamed is not None and blamed == self._blamed:
            self.failing.add(blamed)
        self._blamed = blamed
        last = [host for host in self._named if host.name in self.failing or host.name in outcome.lost]
        rest = [host for host in self._named if host not in last]
        worked = [host for host in rest if host in world.hosts]
        self.order = (*worked, *[host for host in rest if host not in worked], *last)


class Rendezvous:
    """Rendezvous of a launch's hosts, for one attempt after the other."""

    def __init__(self, work: Work, policy: Policy, inbox: Inbox, log: Log) -> None:
        self.work, self.policy, self.log, self._inbox = work, policy, log, inbox
        self._fewest = policy.min_hosts or len(work.hosts)
        self.history = HostHistory(work.hosts)
        self.compared = ComparedSamples(work.run, work.hosts, self._fewest)

    def gather(self, *, first: bool) -> tuple[list[Link], dict[str, str], World]:
        """Return links to the hosts of the next attempt, the reasons why others are out, and the resulting world. With
        `first`, remaining processes of a previous launch are an error."""
        run, fewest, history = self.work.run, self._fewest, self.history
        hosts = history.order
        links, errors = connect(hosts, self.work.site, self._inbox, unresponsive=history.unresponsive(fewest))
        reasons = {name: error.what for name, error in errors.items()}
        history.without_answer = set(reasons)
        try:
            if len(links) < fewest:
                raise CannotStartError(
                    f"{len(reasons)} of {len(hosts)} hosts cannot be used",
                    where=_format_reasons(reasons),
                    why=f"the run needs {fewest} hosts or more" if self.policy.min_hosts else None,
                    fix="fix these hosts, or remove them from the hostfile",
                )
            if first:
                _check_left(links)
            world = self._without_failing(links, reasons) or largest_world(run, [link.host for link in links], fewest)
            if world is None:
                raise CannotStartError(
                    f"no number of hosts from {fewest} to {len(links)} fits the run",
                    where=", ".join(f"{link.host.name} slots={link.host.slots}" for link in links),
                    why=f"data.streams ({run.data.streams}) and optim.batch_size ({run.optim.batch_size}) must be "
                    "multiples of the number of ranks, and the streams per rank of data.num_workers",
                    fix="change one of these, or the number of hosts",
                )
            spare = [link.host.name for link in links if link.host not in world.hosts and link.host.name not in reasons]
            reasons |= dict.fromkeys(spare, SPARE)
            if reasons:
                self.log(f"without {_format_reasons(reasons)}")
            world, smaller = self.compared.keep(world)
            if smaller is not None:
                self.log(smaller)
        except UserError:
            for link in links:
                link.close()
            raise
        for link in links:
            if link.host not in world.hosts:
                link.close()
        chosen = {link.host: link for link in links if link.host in world.hosts}
        return [chosen[host] for host in world.hosts], reasons, world

    def learn(self, world: World, outcome: AttemptResult) -> bool:
        """Record an attempt; return whether it failed, except from a lack of memory for an increased micro-batch."""
        self.history.ended(world, outcome)
        return outcome.status == "failed" and not self.compared.note(outcome.cause)

    def _without_failing(self, links: list[Link], reasons: dict[str, str]) -> World | None:
        """Return the world without the failing hosts, if there are any and the others are enough."""
        failing = [link.host.name for link in links if link.host.name in self.history.failing]
        others = [link.host for link in links if link.host.name not in failing]
        if not failing or not others:
            return None
        world = largest_world(self.work.run, others, self._fewest)
        if world is not None:
            reasons |= dict.fromkeys(failing, FAILS)
        else:
            few = f"no number of the others from {self._fewest} (min_nodes) to {len(others)} fits the run"
            few = few if len(others) >= self._fewest else f"the run is to have {self._fewest} hosts (min_nodes)"
            self.log(f"host {', '.join(failing)}: {FAILS}; it stays, because {few}")
        return world

    def _await_port(self, head: Link, links: Sequence[Link]) -> Message | None:
        """Return the answer with rank 0's port; None if its agent is gone or silent. Put other messages back."""
        answer, put_back = None, []
        deadline = time.monotonic() + self.work.site.connect_s
        for link, message in receive(links, self._inbox, lambda: deadline - time.monotonic()):
            if link is head and message["kind"] == "port":
                answer = message
                break
            put_back.append((link, message))
            if link is head and message["kind"] == "gone":
                break
        for item in put_back:
            self._inbox.put(item)
        return answer

    def address(self, links: list[Link]) -> tuple[str, int]:
        """Return the address of rank 0, as reported by its host: only that host knows its free ports."""
        head = links[0]
        head.send("port", port=self.work.master_port, interface=self.work.interface)
        answer = self._await_port(head, links)
        error = "its agent does not answer" if answer is None else answer["error"]
        if answer is None or error is not None:
            for link in links:
                link.close()
            raise CannotStartError(
                f"rank 0 cannot wait for the others: {error}",
                where=f"host {head.host.name}",
                fix="choose another master_port, or leave it out"
                if self.work.master_port
                else "check the network of this host with `m3i-scale doctor`",
            )
        address = self.work.master_address if head.host == self.work.hosts[0] else None
        name = "127.0.0.1" if len(links) == 1 and is_here(head.host.name) else head.host.name
        return address or answer["address"] or name, int(answer["port"])


def _format_reasons(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _check_left(links: Sequence[Link]) -> None:
    processes = [
        f"host {link.host.name}: pid {process['pid']} ({process['command'][:80]})"
        for link in links
        for process in (link.hello or {}).get("left", [])
    ]
    if processes:
        raise UserError(
            "processes of a previous launch of this run are still running",
            where=listed(processes, 8, "; "),
            why="they and the new ones would write into the same output folder",
            fix="end the previous launch, or these processes by `kill -9`",
        )
