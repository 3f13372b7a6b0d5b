"""The launcher's own loop: attempt after attempt over the hosts that answer, each from the last commit."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from m3i_scale.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from m3i_scale.files import write_json
from m3i_scale.launch.execute import signals_to_note
from m3i_scale.launch.failures import FAILURE, failure_text, write_failure
from m3i_scale.launch.job import is_here
from m3i_scale.launch.link import Inbox, Link
from m3i_scale.launch.logs import Logs
from m3i_scale.launch.rendezvous import CannotStartError, Policy, Rendezvous, Work
from m3i_scale.launch.supervise import Attempt, Limits, Outcome, Tell, Wish
from m3i_scale.launch.watch import Watch
from m3i_scale.launch.worlds import World
from m3i_scale.scale.checkpoint.layout import stopped_words

EXIT_INTERRUPTED = 130
"""Interrupted twice, or before the first step: nothing was saved."""
ATTEMPTS = "attempts.json"
_LONGEST_PAUSE_S = 300.0


class Launch:
    """All attempts of one launch.

    Args:
        work: what, and where.
        policy: when to go on.
        tell: a line for a person.
    """

    def __init__(self, work: Work, policy: Policy, tell: Tell) -> None:
        self.work, self.policy, self.tell = work, policy, tell
        self.attempts: list[dict[str, Any]] = []
        self._signals = 0
        self._inbox: Inbox = Inbox()
        self._rendezvous = Rendezvous(work, policy, self._inbox, tell, lambda: self._signals > 0)

    def run(self) -> int:
        """Launch, and launch again as long as the policy has it. The caller holds the output folder.

        Returns:
            The exit code: 0, 75 (asked to stop, and saved), 130 (interrupted, nothing saved), 2 (a mistake that the log
            explains) or 1.

        Raises:
            UserError: too few hosts answer at the start, processes of a former launch are left, the port is taken.
        """
        if any(is_here(host.name) for host in self.work.hosts) and len(self.work.hosts) > 1:
            self._refuse_loopback()
        with _Signals(self._note):
            return self._loop()

    def _refuse_loopback(self) -> None:
        loop = next((host.name for host in self.work.hosts if host.name in ("localhost", "127.0.0.1")), None)
        if loop is not None:
            raise UserError(
                f"'{loop}' is another machine on every host",
                where="hosts",
                fix="name this machine as the others reach it",
            )

    def _loop(self) -> int:
        restarts = 0
        while True:
            try:
                links, reasons, world = self._rendezvous.gather(first=not self.attempts)
                address, logs = self._rendezvous.address(links), self._logs(links)
            except CannotStartError as error:
                if not self.attempts:
                    raise
                self.tell(str(error))
                code, failed = EXIT_FAILED if self._signals else None, True
            else:
                outcome, back = self._attempt(links, world, reasons, address, logs)
                self._rendezvous.learn(world, outcome)
                code, failed = self._code_after(outcome, back), outcome.status == "failed"
            if code is None and failed and restarts == self.policy.max_restarts:
                code = EXIT_FAILED
            if code is not None:
                return self._end(code)
            if failed:
                restarts += 1
                self._pause(restarts)

    def _code_after(self, outcome: Outcome, back: Sequence[str]) -> int | None:
        """What an attempt ends the launch with; None where it may go on."""
        code = None
        if self._signals > 1:
            code = EXIT_INTERRUPTED
        elif outcome.status == "finished":
            code = 0
        elif outcome.status == "preempted":
            # Without a host that is back, somebody else has asked the ranks: a scheduler, on their hosts.
            code = EXIT_PREEMPTED if self._signals or not back else None
        elif outcome.cause is not None and outcome.cause.user_error:
            code = EXIT_USER_ERROR
        elif self._signals:
            code = EXIT_INTERRUPTED if outcome.cause is None else EXIT_FAILED
        return code

    def _pause(self, restarts: int) -> None:
        doubled = 2.0 ** min(restarts - 1, 32)  # of ten thousand restarts, no number could hold the last
        pause_s = min(self.policy.pause_s * doubled, _LONGEST_PAUSE_S)
        self.tell(f"restart {restarts} of {self.policy.max_restarts} in {pause_s:g} s")
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline and not self._signals:
            time.sleep(0.1)

    def _attempt(
        self, links: list[Link], world: World, reasons: dict[str, str], address: tuple[str, int], logs: Logs
    ) -> tuple[Outcome, tuple[str, ...]]:
        """How it ended, and which hosts were back by then."""
        work, number = self.work, len(self.attempts) + 1
        command = [*work.command]
        if world.micro_batch_size != work.run.optim.micro_batch_size:
            command.append(f"optim.micro_batch_size={world.micro_batch_size}")
        self.tell(
            f"attempt {number}: {world.ranks} ranks on {', '.join(world.names)}, {world.micro_batch_size} samples "
            f"per rank and forward pass; logs in {logs.folder}"
        )
        failing = self._rendezvous.history.failing
        out = [host for host in work.hosts if host not in world.hosts and host.name not in failing]
        watch = Watch(work.run, world, out, work.site, self.policy.probe_s)
        limits = Limits(work.run.timeouts.start_s, work.run.timeouts.step_s)
        attempt = Attempt(links, self._inbox, command, work.site, limits, address, logs, self.tell)
        started = time.time()
        with watch:
            outcome = attempt.run(lambda: self._wanted(watch))
        self._note_attempt(number, world, outcome, started, logs, reasons, watch.back)
        return outcome, watch.back

    def _wanted(self, watch: Watch) -> Wish:
        if self._signals:
            return "stop" if self._signals == 1 else "end"
        if watch.back:
            watch.tell_once(self.tell)
            return "stop later"
        return "go on"

    def _logs(self, links: list[Link]) -> Logs:
        try:
            return Logs(self.work.run.output_dir)
        except OSError as error:
            for link in links:
                link.close()
            raise CannotStartError(
                f"no folder for what ranks print: {error.strerror}", where=str(error.filename), fix="free some space"
            ) from None

    def _note_attempt(
        self,
        number: int,
        world: World,
        outcome: Outcome,
        started: float,
        logs: Logs,
        reasons: dict[str, str],
        back: Sequence[str],
    ) -> None:
        cause = outcome.cause
        output_dir = self.work.run.output_dir
        self.attempts.append(
            {
                "attempt": number,
                "hosts": list(world.names),
                "ranks": world.ranks,
                "micro_batch_size": world.micro_batch_size,
                "without": reasons,
                "status": outcome.status,
                "first_step": outcome.first_step,
                "last_step": outcome.last_step,
                "started": started,
                "ended": time.time(),
                "logs": str(logs.folder),
                "lost": outcome.lost,
                "came_back": list(back),
                "slow": outcome.slow,
                "left": outcome.left,
                "cause": None if cause is None else {**asdict(cause), "where": cause.where()},
            }
        )
        try:
            write_json(output_dir / ATTEMPTS, self.attempts)
            if cause is not None:
                write_failure(output_dir, cause, outcome.others, attempt=number, logs=str(logs.folder))
        except OSError as error:
            self.tell(f"{output_dir / FAILURE} could not be written: {error.strerror}")
        self._last = outcome

    def _end(self, code: int) -> int:
        """Say how it went, the first cause last of all."""
        if len(self.attempts) > 1:
            for line in summary(self.attempts):
                self.tell(line)
        last = self._last
        for host, pids in last.left.items():
            self.tell(f"host {host}: processes that could not be ended: {', '.join(map(str, pids))}")
        if code in (EXIT_FAILED, EXIT_USER_ERROR) and last.cause is not None:
            self.tell(failure_text(last.cause, last.others))
        elif code == EXIT_PREEMPTED:
            self.tell(stopped_words(self.work.run.output_dir / "checkpoints"))
        elif code == EXIT_INTERRUPTED:
            self.tell("interrupted: the ranks were ended, and nothing was saved")
        elif code == 0:
            (self.work.run.output_dir / FAILURE).unlink(missing_ok=True)
        return code

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1 if number == signal.SIGINT or not self._signals else 0


def summary(attempts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every attempt."""
    lines = []
    for item in attempts:
        first, last = item["first_step"], item["last_step"]
        steps = "no step" if last is None else f"steps {first} to {last}"
        end = item["status"]
        if item["cause"] is not None:
            told = item["cause"]["message"].splitlines()[0] if item["cause"]["message"] else item["cause"]["kind"]
            end += f": {item['cause']['where']}: {told}"
        elif end == "preempted" and item["came_back"]:
            end = f"saved to go on with {', '.join(item['came_back'])}"
        lines.append(f"attempt {item['attempt']}: {', '.join(item['hosts'])} ({item['ranks']} ranks), {steps}, {end}")
    return lines


class _Signals:
    """SIGINT, SIGTERM, SIGUSR2 and the loss of the terminal are noted while this is entered."""

    def __init__(self, note: Callable[[int, FrameType | None], None]) -> None:
        self._note = note

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._note) for number in signals_to_note()}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def new_launch() -> str:
    """A name for a launch."""
    return secrets.token_hex(8)
