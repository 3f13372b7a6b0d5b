"""Connect to the agents of hosts over ssh, locally or with srun, and explain why one is missing or has ended."""

from __future__ import annotations

import os
import queue
import secrets
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from m3i_scale import __version__
from m3i_scale.elastic.wire import BEAT_S, Message, decode, encode
from m3i_scale.errors import UserError
from m3i_scale.launch.description import LAUNCHER_VARIABLES, SLURM_EXPORTS
from m3i_scale.launch.hosts import Host, is_here
from m3i_scale.launch.job import Job
from m3i_scale.run.software import code, other_files
from m3i_scale.text import is_secret

Inbox = queue.SimpleQueue[tuple["Link", Message]]

_CLOSE_S = 5.0
UNRESPONSIVE_S = 5.0
"""Connect timeout for a host that did not respond before, so that it does not delay every restart."""
_AGENT = ("-u", "-m", "m3i_scale.elastic.agent")
_SSH = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_SRUN = (
    "--overlap",  # shares resources with the launching step, if there is one
    "--nodes=1",
    "--ntasks=1",
    "--ntasks-per-node=1",
    "--cpu-bind=none",  # the ranks divide the job's cores on the host
    "--mem=0",
    "--unbuffered",
    f"--export={','.join(SLURM_EXPORTS)}",
)
_MAX_CHARACTERS = 300


@dataclass(frozen=True)
class RemoteShell:
    """Connection settings, the same for all hosts, and the environment of agents and ranks."""

    python: str
    workdir: str
    output_dir: str
    """Folder of the run, which identifies processes of a previous launch."""
    launch: str = field(default_factory=lambda: secrets.token_hex(8))
    """A unique name for this launch."""
    ssh: tuple[str, ...] = ()
    """Additional arguments of ssh."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are passed to the ranks; agents get PYTHONPATH only."""
    connect_s: float = 60.0
    """Limit for the response of a host."""
    silence_s: float = 30.0
    """Heartbeat timeout, after which a host is lost."""
    transport: Literal["ssh", "srun"] = "ssh"
    """Connection to a host: ssh, or srun within a Slurm allocation."""
    ssh_to_all: bool = False
    """Use ssh for this machine, too, instead of a child process."""


def agent_command(name: str, site: RemoteShell, ssh_timeout_s: float | None = None) -> list[str]:
    """Return the command that starts the agent of a host. ssh's default connect timeout is half of `site.connect_s`."""
    if site.transport == "srun":
        return ["srun", *_SRUN, f"--nodelist={name}", "bash", "-c", _agent_line(site)]
    if is_here(name) and not site.ssh_to_all:
        return ["bash", "-c", _agent_line(site)]
    until_s = max(1, int(site.connect_s / 2 if ssh_timeout_s is None else ssh_timeout_s))
    return ["ssh", *_SSH, "-o", f"ConnectTimeout={until_s}", *site.ssh, name, _agent_line(site)]


def _agent_line(site: RemoteShell) -> str:
    variables = [f"PYTHONPATH={site.environment['PYTHONPATH']}"] if "PYTHONPATH" in site.environment else []
    start = shlex.join(["exec", "env", *variables, site.python, *_AGENT])
    folder = os.path.dirname(site.python)  # for the tools of ranks that build an extension
    path = f'export PATH={shlex.quote(folder)}:"$PATH" && ' if folder else ""
    return f"cd {shlex.quote(site.workdir)} && {path}{start}"


@dataclass(frozen=True)
class HostError:
    """The reason why a host cannot be used."""

    what: str
    kind: Literal["connect", "start", "agent"]
    """The connection by ssh or srun failed; the interpreter, the folder or a package is missing; the agent failed, or
    reports that it cannot serve."""

    def __str__(self) -> str:
        return self.what


def explain_end(code: int | None, stderr_lines: Sequence[str], site: RemoteShell) -> HostError:
    """Return why the agent of a host has ended, given the exit code of ssh, srun or the agent (None: it does not end)
    and its last lines of standard error."""
    text = [line.strip() for line in stderr_lines if line.strip()]
    last = text[-1][-_MAX_CHARACTERS:] if text else ""
    missing = next((line for line in reversed(text[-3:]) if "No module named" in line), None)
    if code in (126, 127):
        return HostError(f"the interpreter {site.python} cannot be started there: {last}", "start")
    if missing is not None:
        return HostError(f"{site.python} there lacks a package: {missing[-_MAX_CHARACTERS:]}", "start")
    if any(line.startswith("bash:") and "cd:" in line for line in text):
        return HostError(f"the working directory cannot be entered: {last}", "start")
    if code == 255 or last.startswith("srun: error"):
        what = last or "the connection ended"
        return HostError(what if what.startswith(f"{site.transport}: ") else f"{site.transport}: {what}", "connect")
    if code is None:
        return HostError("the connection does not end", "agent")
    return HostError(f"the agent ended with exit code {code}" + (f": {last}" if last else ""), "agent")


class Link:
    """Connection to one host's agent. Messages arrive in `inbox`, shared by all links; the last kind is `gone`.
    ssh's default connect timeout is half of `site.connect_s`."""

    def __init__(self, host: Host, site: RemoteShell, inbox: Inbox, ssh_timeout_s: float | None = None) -> None:
        self.host, self.site, self._inbox = host, site, inbox
        self.last_message = time.monotonic()
        self.hello: Message | None = None
        self._stderr_lines: deque[str] = deque(maxlen=20)
        # Without rank variables and secrets: messages carry named secrets.
        variables = {
            name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES and not is_secret(name)
        }
        self._process = subprocess.Popen(
            agent_command(host.name, site, ssh_timeout_s),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the supervisor, which handles it
            bufsize=0,
            env=variables,
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

    def error(self) -> HostError:
        """Return the reason why the agent is gone."""
        try:
            code: int | None = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.join(_CLOSE_S)
        return explain_end(code, list(self._stderr_lines), self.site)

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            message = decode(line)
            self.last_message = time.monotonic()
            if message is not None:
                self.hello = message if message["kind"] == "hello" else self.hello
                self._inbox.put((self, message))
        self._inbox.put((self, {"kind": "gone"}))

    def _read_errors(self, errors: IO[bytes]) -> None:
        for line in errors:
            self._stderr_lines.append(line.decode(errors="replace").rstrip())


def receive(links: Iterable[Link], inbox: Inbox, left_s: Callable[[], float]) -> Iterator[tuple[Link, Message]]:
    """Yield the messages of agents while `left_s()`, called before every message, is positive. Send every link a beat
    each second, because an agent without messages considers the launch dead."""
    beat = -BEAT_S
    while (seconds := left_s()) > 0:
        if (now := time.monotonic()) - beat >= BEAT_S:  # a host that hangs at login reads none, and its pipe is finite
            beat = now
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
    ssh_timeout_s: float | None = None,
    same_code: bool = True,
) -> tuple[list[Link], dict[str, HostError]]:
    """Connect to all hosts in parallel; return links to the usable ones and the error of each other one, both in order.

    Args:
        unresponsive: names of hosts that did not respond last time and are optional: their limit is `UNRESPONSIVE_S`.
        over: whether the result is no longer needed.
        ssh_timeout_s: ssh's connect timeout. Default: half of `site.connect_s`.
        same_code: whether a host with other code is unusable.
    """
    links: list[Link] = []
    errors: dict[str, HostError] = {}
    for host in hosts:
        try:
            limit_s = UNRESPONSIVE_S if host.name in unresponsive else ssh_timeout_s
            links.append(Link(host, site, inbox, limit_s))
        except OSError as error:  # ssh is missing, or no process can be started
            what = f"{error.filename or 'a process'} cannot be started here: {error.strerror}"
            errors[host.name] = HostError(what, "connect")
    local_code = code() if same_code else None
    waiting = {link.host.name: UNRESPONSIVE_S if link.host.name in unresponsive else site.connect_s for link in links}
    started = time.monotonic()

    def left_s() -> float:
        return started + max(waiting.values()) - time.monotonic() if waiting and not over() else 0.0

    for link, message in receive(links, inbox, left_s):
        name = link.host.name
        if link not in links or name in errors:  # a `gone` message from a link of an earlier attempt
            continue
        if message["kind"] == "hello":
            waiting.pop(name, None)
            reason = message.get("error") or (_code_error(message, local_code) if local_code is not None else None)
            if reason is not None:
                errors[name] = HostError(reason, "agent")
        elif message["kind"] == "gone":
            waiting.pop(name, None)  # it may have answered and ended while others were awaited
            errors[name] = link.error()
    for name, timeout_s in waiting.items():
        errors[name] = HostError(f"no answer in {timeout_s:g} s", "connect")
    for link in links:
        if link.host.name in errors:
            link.drop()
    in_order = {host.name: errors[host.name] for host in hosts if host.name in errors}
    return [link for link in links if link.host.name not in errors], in_order


def _code_error(hello: Message, local: Mapping[str, Any]) -> str | None:
    """Return how the code of a host differs from the code here; None if it is the same."""
    if hello["version"] != __version__:
        return f"m3i_scale is {hello['version']} there and {__version__} here"
    there = hello.get("code")
    if there is None:  # from before agents sent it
        return f"the code there is older than here (commit {local['commit'] or 'unknown'})"
    if there["sha256"] != local["sha256"]:  # the package version does not change with every commit
        commits = f"commit {there['commit'] or 'unknown'} there and {local['commit'] or 'unknown'} here"
        return f"the code in {there['path']} is another one than here ({commits}): {other_files(there, local)}"
    return None


def check_hosts(job: Job) -> None:
    """Check the connection to all hosts of a launch, before a launcher starts ranks on only some of them."""
    site = RemoteShell(
        python=job.python,
        workdir=str(job.workdir),
        output_dir=str(job.output_dir),
        ssh=job.cluster.ssh,
        environment={item.name: item.value for item in job.plain},
    )
    links, errors = connect(job.hosts, site, Inbox())
    for link in links:
        link.send("end")
    for link in links:
        link.close()
    if errors:
        raise UserError(
            f"{len(errors)} of {len(job.hosts)} hosts cannot be used",
            where="; ".join(f"{name}: {error}" for name, error in errors.items()),
            why="ranks on the others would wait for theirs",
            fix="fix these hosts, or remove them from the hostfile",
        )
