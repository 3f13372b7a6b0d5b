"""Send requests to all hosts in parallel: an agent on each starts a process that answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from m3i_scale.elastic.doctor.host import MARK, MODULE, REQUEST
from m3i_scale.elastic.link import HostError, Inbox, RemoteShell, connect, receive
from m3i_scale.elastic.wire import Message
from m3i_scale.launch.hosts import Host

_MAX_CHARACTERS = 300


class Agents:
    """Agents on all hosts: `with Agents(hosts, site, connect_s) as agents`. They leave no process running. The master
    node is the first host. `connect_s` is ssh's connect timeout, `site.connect_s` the startup limit of an agent."""

    def __init__(self, hosts: Sequence[str], site: RemoteShell, connect_s: float) -> None:
        self._site, self._inbox = site, Inbox()
        links, self.errors = connect(
            [Host(host, 1) for host in hosts], site, self._inbox, ssh_timeout_s=connect_s, same_code=False
        )
        """Errors of hosts that do not respond, or no longer do."""
        self._links = {link.host.name: link for link in links}
        self._requests = 0

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links.values():
            link.send("end")
        for link in self._links.values():
            link.close()

    @property
    def hosts(self) -> list[str]:
        """Return the hosts with an agent that responds."""
        return [host for host in self._links if host not in self.errors]

    def request(
        self,
        verb: str,
        requests: Mapping[str, Mapping[str, Any]],
        timeout_s: float,
        enough: Callable[[Mapping[str, Mapping[str, Any]]], bool] = lambda answers: False,
    ) -> dict[str, dict[str, Any]]:
        """Return the answers of the hosts that respond, in the order of the requests. `verb` is a verb of `host.py`.
        `enough` returns whether these answers suffice, so that the others need not be awaited."""
        site, texts = self._site, dict.fromkeys(requests, "")
        answers: dict[str, dict[str, Any]] = {}
        waiting = requests.keys() - self.errors.keys()
        for host in waiting:
            variables = {**site.environment, REQUEST: json.dumps(requests[host])}
            command = [site.python, "-u", "-m", MODULE, verb]
            ranks = [{"RANK": str(self._requests)}]  # a number not yet used by this agent
            self._links[host].send("start", ranks=ranks, command=command, cwd=site.workdir, environment=variables)
        self._requests += 1
        for host, message in self._receive(waiting, timeout_s):
            if message["kind"] == "log":
                texts[host] += message["text"]
            elif message["kind"] == "exit":
                waiting.discard(host)
                answer = _answer(texts[host], message["code"])
                if "error" in answer:
                    self.errors[host] = HostError(answer["error"], "agent")
                else:
                    answers[host] = answer
                if enough(answers):
                    waiting.clear()
        return {host: answers[host] for host in requests if host in answers}

    def _receive(self, waiting: set[str], timeout_s: float) -> Iterator[tuple[str, Message]]:
        """Yield messages of agents while an answer is missing; drop hosts that have not answered in time."""
        until = time.monotonic() + timeout_s

        def left_s() -> float:
            return until - time.monotonic() if waiting else 0.0

        for link, message in receive(self._links.values(), self._inbox, left_s):
            host = link.host.name
            if message["kind"] == "gone":
                waiting.discard(host)
                self.errors.setdefault(host, link.error())
            else:
                yield host, message
        for host in waiting:
            self.errors[host] = HostError(f"no answer after {timeout_s:.0f} s", "agent")
            self._links.pop(host).drop()


def _answer(text: str, code: int) -> dict[str, Any]:
    """Return the answer of an ended process; `error` if it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return answer
    return {"error": [f"it ended with exit code {code}", *lines][-1][-_MAX_CHARACTERS:]}
