"""Connect to the agents of hosts, and exchange messages with them."""

from __future__ import annotations

import queue
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import IO, Any

from m3i_scale import __version__
from m3i_scale.errors import UserError
from m3i_scale.launch.doctor.checks import other_files
from m3i_scale.launch.doctor.facts import code
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.job import Job
from m3i_scale.launch.transport import HostFault, RemoteShell, agent_command, explain_end, local_environment
from m3i_scale.launch.wire import BEAT_S, Message, decode, encode

Inbox = queue.SimpleQueue[tuple["Link", Message]]

_CLOSE_S = 5.0
UNRESPONSIVE_S = 5.0
"""Connect timeout for a host that did not respond before, so that it does not delay every restart."""


class Link:
    """Connection to one host's agent. Messages arrive in `inbox`; the end of the connection is a message of kind
    `gone`.

    Args:
        host: name and slots.
        site: connection settings.
        inbox: shared by all links.
        patience_s: ssh's connect timeout. Default: half of `site.connect_s`.
    """

    def __init__(self, host: Host, site: RemoteShell, inbox: Inbox, patience_s: float | None = None) -> None:
        self.host, self.site, self._inbox = host, site, inbox
        self.heard = time.monotonic()
        self.hello: Message | None = None
        self._said: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            agent_command(host.name, site, patience_s),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the supervisor, which handles it
            bufsize=0,
            env=local_environment(),
        )
        self._errors = threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True)
        self._errors.start()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        self.send("hello", host=host.name, launch=site.launch, output_dir=site.output_dir, silence_s=site.silence_s)

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message to the agent. If the agent is gone, a message of kind `gone` reports it."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(encode(kind, **fields))
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """Close the connection; a running agent then ends its ranks."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def drop(self) -> None:
        """Kill the connection to a host that does not respond."""
        self._process.kill()
        self._process.wait()

    def fault(self) -> HostFault:
        """Return the reason why the agent is gone."""
        try:
            code: int | None = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.join(1.0)
        return explain_end(code, list(self._said), self.site)

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            message = decode(line)
            self.heard = time.monotonic()
            if message is not None:
                self.hello = message if message["kind"] == "hello" else self.hello
                self._inbox.put((self, message))
        self._inbox.put((self, {"kind": "gone"}))

    def _read_errors(self, errors: IO[bytes]) -> None:
        for line in errors:
            self._said.append(line.decode(errors="replace").rstrip())


def receive(links: Iterable[Link], inbox: Inbox, left_s: Callable[[], float]) -> Iterator[tuple[Link, Message]]:
    """Yield the messages of agents.

    Args:
        links: each gets a beat every second: an agent without messages considers the launch dead.
        inbox: the inbox of the links.
        left_s: returns the remaining seconds to wait; called before every message.
    """
    while (seconds := left_s()) > 0:
        for link in links:
            link.send("beat")
        try:
            yield inbox.get(timeout=min(seconds, BEAT_S))
        except queue.Empty:
            continue


def connect(
    hosts: Iterable[Host],
    site: RemoteShell,
    inbox: Inbox,
    *,
    unresponsive: Collection[str] = (),
    over: Callable[[], bool] = lambda: False,
) -> tuple[list[Link], dict[str, str]]:
    """Connect to all hosts in parallel.

    Args:
        hosts: the hosts, in their order.
        site: connection settings.
        inbox: inbox of the links.
        unresponsive: names of hosts that did not respond last time and are optional: their limit is `UNRESPONSIVE_S`.
        over: whether the result is no longer needed.

    Returns:
        Links to the usable hosts, and the reason for each of the others, both in order.
    """
    links: list[Link] = []
    reasons: dict[str, str] = {}
    for host in hosts:
        try:
            links.append(Link(host, site, inbox, UNRESPONSIVE_S if host.name in unresponsive else None))
        except OSError as error:  # ssh is missing, or no process can be started
            reasons[host.name] = f"{error.filename or 'a process'} cannot be started here: {error.strerror}"
    own_code = code()
    waiting = {link.host.name: UNRESPONSIVE_S if link.host.name in unresponsive else site.connect_s for link in links}
    started = time.monotonic()

    def left_s() -> float:
        return started + max(waiting.values()) - time.monotonic() if waiting and not over() else 0.0

    for link, message in receive(links, inbox, left_s):
        name = link.host.name
        if link not in links or name in reasons:  # a `gone` message from a link of an earlier attempt
            continue
        if message["kind"] == "hello":
            fault = _unfit(message, own_code)
            waiting.pop(name, None)
            if fault is not None:
                reasons[name] = fault
        elif message["kind"] == "gone":
            waiting.pop(name, None)  # it may have answered and ended while others were awaited
            reasons[name] = str(link.fault())
    for name, patience_s in waiting.items():
        reasons[name] = f"no answer in {patience_s:g} s"
    for link in links:
        if link.host.name in reasons:
            link.drop()
    in_order = {host.name: reasons[host.name] for host in hosts if host.name in reasons}
    return [link for link in links if link.host.name not in reasons], in_order


def _unfit(hello: Message, own_code: Mapping[str, Any]) -> str | None:
    """Return why a responding agent cannot be used; None if it can."""
    if hello["fault"] is not None:
        return str(hello["fault"])
    if hello["version"] != __version__:
        return f"m3i_scale is {hello['version']} there and {__version__} here"
    there = hello.get("code")
    if there is None:  # the package version does not change with every commit
        return f"the code there is older than here (commit {own_code['commit'] or 'unknown'})"
    if there["sha256"] != own_code["sha256"]:
        commits = f"commit {there['commit'] or 'unknown'} there and {own_code['commit'] or 'unknown'} here"
        return f"the code in {there['path']} is another one than here ({commits}): {other_files(there, own_code)}"
    return None


def check_hosts(job: Job) -> None:
    """Check the connection to all hosts of a launch, before a launcher starts ranks on only some of them."""
    site = RemoteShell(
        python=job.python,
        workdir=str(job.workdir),
        output_dir=str(job.output_dir),
        launch=secrets.token_hex(8),
        ssh=job.cluster.ssh,
        python_path=next((item.value for item in job.plain if item.name == "PYTHONPATH"), ""),
    )
    links, reasons = connect(job.hosts, site, Inbox())
    for link in links:
        link.send("end")
    for link in links:
        link.close()
    if reasons:
        raise UserError(
            f"{len(reasons)} of {len(job.hosts)} hosts cannot be used",
            where="; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
            why="ranks on the others would wait for theirs",
            fix="mend them or take them out of the hostfile",
        )
