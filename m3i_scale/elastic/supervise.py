"""Monitor one attempt: ranks on all hosts, until every one of them has ended, for any reason."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

from m3i_scale.config import TimeoutsConfig
from m3i_scale.elastic.link import Inbox, Link, RemoteShell
from m3i_scale.elastic.wire import BEAT_S, Message
from m3i_scale.errors import EXIT_PREEMPTED
from m3i_scale.host.failures import Failure, root_cause
from m3i_scale.host.rank_record import PHASES
from m3i_scale.output import write_stderr

Log = Callable[[str], None]
Request = Literal["none", "stop", "stop once begun", "end"]
"""`stop` makes the ranks of an attempt save and exit, or ends them if training has not begun. `stop once begun` waits
until training has begun, so that the start is not wasted. `end` ends them."""
_TICK_S = 0.2
_GRACE_S, _LOST_GRACE_S = 10.0, 2.0
"""Time for the other ranks to end by themselves once a rank has failed, or a host is lost."""
_BYE_S = 20.0
_LEAVE_S = 300.0
"""Limit between the first rank that ends normally and the last."""
_SLACK_S = 30.0
"""The process group's timeout fires first, because it leaves a trace on every rank."""


@dataclass
class AttemptResult:
    """The result of an attempt."""

    status: Literal["finished", "preempted", "failed"]
    cause: Failure | None = None
    others: list[Failure] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Hosts that were disconnected or went down."""
    first_step: int | None = None
    last_step: int | None = None
    left: dict[str, list[int]] = field(default_factory=dict)
    """By host, processes that could not be ended."""


class Logs:
    """Log files OUTPUT/logs/<attempt>/<host>-rank<k>.log. Lines of rank 0 are also written to standard error."""

    def __init__(self, output_dir: Path) -> None:
        root = output_dir / "logs"
        root.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
        self.folder = root / f"{max(taken, default=0) + 1:03d}"
        self.folder.mkdir()
        self.error: str | None = None
        """The reason for lost lines, if there are any."""
        self._files: dict[int, IO[str]] = {}

    def add(self, host: str, rank: int, text: str) -> None:
        """Append lines, or parts of them, of a rank."""
        if rank == 0:
            write_stderr(text)
        try:
            if rank not in self._files:
                self._files[rank] = (self.folder / f"{host}-rank{rank}.log").open("a", encoding="utf-8")
            self._files[rank].write(text)
            self._files[rank].flush()
        except OSError as error:
            self.error = f"logs are incomplete: {error}"

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:
                self.error = f"logs are incomplete: {error}"


class Progress:
    """The last known states of the ranks."""

    def __init__(self, timeouts: TimeoutsConfig) -> None:
        self.first_step: int | None = None
        self.last_step: int | None = None
        self._timeouts = timeouts
        self._beats: dict[int, Message] = {}
        self._ahead_s: dict[str, float] = {}
        self._began = time.time()

    def beat(self, host: str, message: Message, running: Collection[int]) -> None:
        """Process a host's heartbeat: its clock, and the states of its running ranks."""
        ahead_s = time.time() - message["time"]
        self._ahead_s[host] = min(ahead_s, self._ahead_s.get(host, ahead_s))
        for rank, beat in message["beats"].items():
            if int(rank) in running:
                self._beats[int(rank)] = beat | {"age_s": message["time"] - beat["changed"]}
                self.count(beat)

    def ahead_s(self, host: str) -> float:
        """Return the seconds by which the clock of this machine is ahead of a host's."""
        return self._ahead_s.get(host, 0.0)

    def count(self, beat: Message) -> None:
        """Update the first and last step with the state of a rank."""
        if beat["began"] >= 0:
            self.first_step = beat["began"]
            self.last_step = max(self.last_step or 0, beat["step"])

    def last_seen(self, ranks: Iterable[int]) -> Message:
        """Return the beat of the rank with the fewest steps among these; {} if there is none."""
        seen = [self._beats[rank] for rank in ranks if rank in self._beats]
        return min(seen, key=lambda beat: int(beat["step"]), default={})

    def beat_of(self, rank: int) -> Message:
        """Return the last beat of a rank, or a starting state if there is none yet."""
        unseen = {
            "step": -1,
            "phase": "start",
            "changed": self._began,
            "timeout_s": 0.0,
            "age_s": time.time() - self._began,
        }
        return self._beats.get(rank, unseen)

    def hangs(self, rank: int) -> bool:
        """Return whether a rank has not changed for longer than the collective timeout of its phase."""
        beat = self.beat_of(rank)
        return bool(beat["age_s"] > (beat["timeout_s"] or self._timeouts.startup_s) + _SLACK_S)

    def furthest_behind(self, ranks: Iterable[int]) -> int:
        """Return the rank with the fewest completed steps among these."""

        def order(rank: int) -> tuple[int, int, float]:
            beat = self.beat_of(rank)
            phase = beat["phase"]
            return beat["step"], PHASES.index(phase) if phase in PHASES else len(PHASES), beat["changed"]

        return min(ranks, key=order)


class Attempt:
    """The ranks of one world, started and monitored. `links` are in rank order. `address` is the address and port of
    rank 0. The process group's timeouts fire first."""

    def __init__(
        self,
        links: Sequence[Link],
        inbox: Inbox,
        command: Sequence[str],
        site: RemoteShell,
        timeouts: TimeoutsConfig,
        address: tuple[str, int],
        logs: Logs,
        log: Log,
    ) -> None:
        self._links, self._inbox, self._site, self._timeouts = list(links), inbox, site, timeouts
        self._command, self._address, self._logs, self._log = list(command), address, logs, log
        self._running: dict[int, Link] = {}
        self._failures: list[Failure] = []
        self._codes: dict[int, int] = {}
        self._gone: set[str] = set()
        self._over = False
        self._outcome = AttemptResult("failed")
        self._world = sum(link.host.slots for link in links)
        self._progress = Progress(timeouts)
        self._deadline: float | None = None
        self._stop_requested: float | None = None
        self._beat = 0.0

    def run(self, requested: Callable[[], Request]) -> AttemptResult:
        """Start the ranks, and monitor them until they have ended on every host. `requested` is polled repeatedly."""
        self._start()
        while self._running:
            self._receive()
            self._beat_hosts()
            self._poll()
            request = requested()
            if request == "end":
                break
            if request != "none" and not self._request_stop() and request == "stop":
                break
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._report_hang()
                break
        self._clean()
        return self._conclude()

    def _start(self) -> None:
        first, address = 0, self._address
        shared = {"WORLD_SIZE": str(self._world), "MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
        for link in self._links:
            slots = link.host.slots
            of_host = shared | {"LOCAL_WORLD_SIZE": str(slots)}
            ranks = [of_host | {"RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(slots)]
            environment = dict(self._site.environment)
            link.last_message = time.monotonic()
            link.send("start", ranks=ranks, command=self._command, cwd=self._site.workdir, environment=environment)
            self._running |= {first + local: link for local in range(slots)}
            first += slots

    def _receive(self) -> None:
        deadline = time.monotonic() + _TICK_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                link, message = self._inbox.get(timeout=left)
            except queue.Empty:
                return
            if link in self._links:
                self._handle(link, message)

    def _handle(self, link: Link, message: Message) -> None:
        name, kind = link.host.name, message["kind"]
        if kind == "log":
            self._logs.add(name, message["rank"], message["text"])
        elif kind == "beat":
            self._progress.beat(name, message, self._running)
        elif kind == "exit":
            self._handle_exit(name, message)
        elif kind == "bye":
            if message["left"]:
                self._outcome.left[name] = message["left"]
            self._gone.add(name)
        elif kind == "gone":
            # An agent that sent `bye` without a request has failed, or has received nothing from here for too long.
            expected = self._over and name in self._gone
            self._gone.add(name)
            if not expected and link in self._running.values():
                self._lose(link, f"the connection to the host ended: {link.error()}")

    def _handle_exit(self, name: str, message: Message) -> None:
        rank, code = message["rank"], message["code"]
        self._running.pop(rank, None)
        self._codes[rank] = code
        if message["beat"] is not None:
            self._progress.count(message["beat"])
        if message["failure"] is not None:
            failure = Failure(**message["failure"])
            self._fail(replace(failure, time=failure.time + self._progress.ahead_s(name)), _GRACE_S)
        elif self._deadline is None:
            self._deadline = time.monotonic() + _LEAVE_S

    def _fail(self, failure: Failure, grace_s: float) -> None:
        first = not self._failures
        self._failures.append(failure)
        if first:
            self._log(f"{failure.where()}: {failure.message.splitlines()[0] if failure.message else failure.kind}")
        until = time.monotonic() + grace_s
        self._deadline = until if first or self._deadline is None else min(self._deadline, until)

    def _lose(self, link: Link, why: str) -> None:
        name = link.host.name
        ranks = [rank for rank, other in self._running.items() if other is link]
        beat = self._progress.last_seen(ranks)
        for rank in ranks:
            del self._running[rank]
        self._gone.add(name)
        self._outcome.lost.append(name)
        last_message = time.time() - (time.monotonic() - link.last_message)
        failure = Failure(last_message, name, None, beat.get("step"), beat.get("phase"), "host", why)
        self._fail(failure, _LOST_GRACE_S)

    def _beat_hosts(self) -> None:
        now = time.monotonic()
        if now - self._beat > BEAT_S:
            self._beat = now
            for link in self._links:
                link.send("beat")

    def _poll(self) -> None:
        """Find hosts without heartbeats, and ranks that hang."""
        now = time.monotonic()
        for link in self._links:
            if link in self._running.values() and now - link.last_message > self._site.silence_s:
                self._lose(link, f"no message from the host for {self._site.silence_s:g} s: it is down or disconnected")
        # All ranks must hang: while one saves alone, the others only wait for it. Without ranks, nothing is reported.
        hang = all(map(self._progress.hangs, self._running))
        late = self._stop_requested is not None and now - self._stop_requested > self._timeouts.startup_s
        if not self._failures and (hang or late):
            self._report_hang()

    def _report_hang(self) -> None:
        """If no other cause is known, blame the rank with the fewest steps, because it neither progresses nor ends."""
        cause = root_cause(self._failures)
        if not self._running or (cause is not None and not cause.is_consequence):
            return
        rank = self._progress.furthest_behind(self._running)
        beat, link = self._progress.beat_of(rank), self._running[rank]
        message = f"the rank made no progress for {beat['age_s']:.0f} s"
        at = beat["changed"] + self._progress.ahead_s(link.host.name)
        self._fail(Failure(at, link.host.name, rank, beat["step"], beat["phase"], "hang", message), 0.0)

    def _request_stop(self) -> bool:
        """Ask all ranks once to save and exit. Return False before training begins: the signal would only kill them."""
        begun = [self._progress.beat_of(rank)["step"] >= 0 for rank in self._running]
        if self._stop_requested is None and all(begun):
            self._stop_requested = time.monotonic()
            for link in self._links:
                link.send("signal", number=int(signal.SIGUSR2))
        return any(begun) or self._stop_requested is not None

    def _clean(self) -> None:
        """End all processes: agents end their ranks and report it, unreachable agents do so without a request."""
        self._over = True
        for link in self._links:
            link.send("end")
        deadline = time.monotonic() + _BYE_S
        while time.monotonic() < deadline and any(link.host.name not in self._gone for link in self._links):
            self._receive()
        for link in self._links:
            link.drop() if link.host.name in self._outcome.lost else link.close()
        self._logs.close()

    def _conclude(self) -> AttemptResult:
        outcome, progress = self._outcome, self._progress
        outcome.first_step, outcome.last_step = progress.first_step, progress.last_step
        cause = root_cause(self._failures)
        if cause is not None:
            outcome.status, outcome.cause = "failed", cause
            outcome.others = [other for other in self._failures if other is not cause]
        elif self._codes and all(code == 0 for code in self._codes.values()) and len(self._codes) == self._world:
            outcome.status = "finished"
        elif len(self._codes) == self._world and all(code in (0, EXIT_PREEMPTED) for code in self._codes.values()):
            outcome.status = "preempted"  # all exited by themselves, after saving
        if self._logs.error is not None:
            self._log(self._logs.error)
        return outcome
