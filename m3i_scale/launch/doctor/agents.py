"""Send requests to all hosts in parallel: an agent on each starts a process that answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from m3i_scale.launch.doctor.host import MARK, MODULE, REQUEST
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.link import Inbox, Link, receive
from m3i_scale.launch.transport import FaultKind, HostFault, RemoteShell
from m3i_scale.launch.wire import Message

_SHOWN_CHARACTERS = 300


class Agents:
    """Agents on all hosts: `with Agents(hosts, site, connect_s) as agents`. They leave no process running.

    Args:
        hosts: their names, the master node first.
        site: connection settings; its `connect_s` is the startup limit of an agent.
        connect_s: ssh's connect timeout.
    """

    def __init__(self, hosts: Sequence[str], site: RemoteShell, connect_s: float) -> None:
        self.errors: dict[str, HostFault] = {}
        """Errors of hosts that do not respond, or no longer do."""
        self._site, self._inbox, self._began = site, Inbox(), time.monotonic()
        self._links: dict[str, Link] = {}
        self._asked = 0
        for host in hosts:
            try:
                self._links[host] = Link(Host(host, 1), site, self._inbox, connect_s)
            except OSError as error:
                self.errors[host] = HostFault(f"{error.filename}: {error.strerror}", "reach")

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links.values():
            link.send("end")
        for link in self._links.values():
            link.close()

    def connect(self) -> dict[str, dict[str, Any]]:
        """Return, for every responding host, the seconds until its response (`reached_s`), and by how much its clock is
        ahead, with the uncertainty (`clock`)."""
        answers: dict[str, dict[str, Any]] = {}
        asked: dict[str, float] = {}
        waiting = set(self._links)
        for host, message in self._hear(waiting, self._site.connect_s):
            if message["kind"] == "hello" and message["fault"] is not None:
                self.errors[host] = HostFault(message["fault"], "agent")
                waiting.discard(host)
            elif message["kind"] == "hello":
                answers[host] = {"reached_s": time.monotonic() - self._began}
                asked[host] = time.time()
                self._links[host].send("clock")
            elif message["kind"] == "clock":
                half = (time.time() - asked[host]) / 2
                answers[host]["clock"] = (message["time"] - asked[host] - half, half)
                waiting.discard(host)
        return {host: answers[host] for host in self._links if host not in self.errors}

    def request(
        self,
        verb: str,
        requests: Mapping[str, Mapping[str, Any]],
        within_s: float,
        over: Callable[[Mapping[str, Mapping[str, Any]]], bool] = lambda answers: False,
    ) -> dict[str, dict[str, Any]]:
        """Return the answers of the hosts that respond, in the order of the requests.

        Args:
            verb: a verb of `host.py`.
            requests: requests by host.
            within_s: time limit of an answer.
            over: whether these answers are enough, so that the others need not be awaited.
        """
        site, texts = self._site, dict.fromkeys(requests, "")
        answers: dict[str, dict[str, Any]] = {}
        waiting = requests.keys() - self.errors.keys()
        for host in waiting:
            variables = {**site.environment, REQUEST: json.dumps(requests[host])}
            command = [site.python, "-u", "-m", MODULE, verb]
            ranks = [{"RANK": str(self._asked)}]  # a number not yet used by this agent
            self._links[host].send("start", ranks=ranks, command=command, cwd=site.workdir, environment=variables)
        self._asked += 1
        for host, message in self._hear(waiting, within_s):
            if message["kind"] == "log":
                texts[host] += message["text"]
            elif message["kind"] == "exit":
                waiting.discard(host)
                answer = _answer(texts[host], message["code"])
                if "error" in answer:
                    self.errors[host] = HostFault(answer["error"], "agent")
                else:
                    answers[host] = answer
                if over(answers):
                    waiting.clear()
        return {host: answers[host] for host in requests if host in answers}

    def _hear(self, waiting: set[str], within_s: float) -> Iterator[tuple[str, Message]]:
        """Yield messages of agents while an answer is missing; drop hosts that have not answered in time."""
        until = time.monotonic() + within_s

        def left_s() -> float:
            return until - time.monotonic() if waiting else 0.0

        for link, message in receive(self._links.values(), self._inbox, left_s):
            host = link.host.name
            if message["kind"] == "gone":
                waiting.discard(host)
                self.errors.setdefault(host, link.fault())
            else:
                yield host, message
        for host in waiting:
            link = self._links.pop(host)
            kind: FaultKind = "reach" if link.hello is None else "agent"
            self.errors[host] = HostFault(f"no answer after {within_s:.0f} s", kind)
            link.drop()


def _answer(text: str, code: int) -> dict[str, Any]:
    """Return the answer of an ended process; `error` if it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return answer
    return {"error": [f"it ended with exit code {code}", *lines][-1][-_SHOWN_CHARACTERS:]}
