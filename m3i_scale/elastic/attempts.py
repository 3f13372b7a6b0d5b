"""Run the loop of the elastic launcher: attempts over the responding hosts, each resuming from the last checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

from m3i_scale.checkpoint.layout import stopped_words
from m3i_scale.config import RunConfig
from m3i_scale.elastic.link import Inbox, Link, RemoteShell, connect
from m3i_scale.elastic.rendezvous import CannotStartError, Policy, Rendezvous, Work
from m3i_scale.elastic.supervise import Attempt, AttemptResult, Log, Logs, Request
from m3i_scale.elastic.worlds import World, largest_world
from m3i_scale.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from m3i_scale.host.failures import AttemptRecord, failure_text, write_attempts, write_failure
from m3i_scale.host.output_dir import FAILURE
from m3i_scale.host.processes import noted_signals
from m3i_scale.launch.hosts import Host

EXIT_INTERRUPTED = 130
"""Interrupted twice, or before the first step: nothing was saved."""
_LONGEST_PAUSE_S = 300.0


class Launch:
    """All attempts of one launch."""

    def __init__(self, work: Work, policy: Policy, log: Log) -> None:
        self.work, self.policy, self.log = work, policy, log
        self.attempts: list[AttemptRecord] = []
        self._signals = 0
        self._inbox: Inbox = Inbox()
        self._rendezvous = Rendezvous(work, policy, self._inbox, log)

    def run(self) -> int:
        """Launch, restart as long as the policy allows, and return the exit code: 0, 75 (stopped on request, and
        saved), 130 (interrupted, nothing saved), 2 (a user error that the log explains) or 1. The caller holds the lock
        of the output folder."""
        with noted_signals(self._note):
            return self._loop()

    def _loop(self) -> int:
        restarts = 0
        while True:
            try:
                links, reasons, world = self._rendezvous.gather(first=not self.attempts)
                address, logs = self._rendezvous.address(links), self._logs(links)
            except CannotStartError as error:
                if not self.attempts:
                    raise
                self.log(str(error))
                code, failed = EXIT_FAILED if self._signals else None, True
            else:
                outcome, back = self._attempt(links, world, reasons, address, logs)
                failed = self._rendezvous.learn(world, outcome)
                code = self._code_after(outcome, back)
            if code is None and failed and restarts == self.policy.max_restarts:
                code = EXIT_FAILED
            if code is not None:
                return self._end(code)
            if failed:
                restarts += 1
                self._pause(restarts)

    def _code_after(self, outcome: AttemptResult, back: Sequence[str]) -> int | None:
        """Return the exit code if the attempt ends the launch; None if it may continue."""
        code = None
        if self._signals > 1:
            code = EXIT_INTERRUPTED
        elif outcome.status == "finished":
            code = 0
        elif outcome.status == "preempted":
            # Without a recovered host, another party stopped the ranks: a scheduler, on their hosts.
            code = EXIT_PREEMPTED if self._signals or not back else None
        elif outcome.cause is not None and outcome.cause.user_error:
            code = EXIT_USER_ERROR
        elif self._signals:
            code = EXIT_INTERRUPTED if outcome.cause is None else EXIT_FAILED
        return code

    def _pause(self, restarts: int) -> None:
        doubled = 2.0 ** min(restarts - 1, 32)  # otherwise it overflows after thousands of restarts
        pause_s = min(self.policy.pause_s * doubled, _LONGEST_PAUSE_S)
        self.log(f"restart {restarts} of {self.policy.max_restarts} in {pause_s:g} s")
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline and not self._signals:
            time.sleep(0.1)

    def _attempt(
        self, links: list[Link], world: World, reasons: dict[str, str], address: tuple[str, int], logs: Logs
    ) -> tuple[AttemptResult, tuple[str, ...]]:
        """Run one attempt; return its result, and the hosts that recovered meanwhile."""
        work, number = self.work, len(self.attempts) + 1
        command = [*work.command]
        if world.micro_batch_size != work.run.optim.micro_batch_size:
            command.append(f"optim.micro_batch_size={world.micro_batch_size}")
        self.log(
            f"attempt {number}: {world.ranks} ranks on {', '.join(world.names)}, {world.micro_batch_size} samples "
            f"per rank and forward pass; logs in {logs.folder}"
        )
        failing = self._rendezvous.history.failing
        out = [host for host in work.hosts if host not in world.hosts and host.name not in failing]
        watch = Watch(work.run, world, out, work.site, self.policy.probe_s, self.log)
        attempt = Attempt(links, self._inbox, command, work.site, work.run.timeouts, address, logs, self.log)
        started = time.time()
        with watch:
            outcome = attempt.run(lambda: self._request(watch))
        self.attempts.append(
            AttemptRecord(
                attempt=number,
                hosts=list(world.names),
                ranks=world.ranks,
                micro_batch_size=world.micro_batch_size,
                left_out=reasons,
                status=outcome.status,
                first_step=outcome.first_step,
                last_step=outcome.last_step,
                started=started,
                ended=time.time(),
                logs=str(logs.folder),
                lost=outcome.lost,
                came_back=list(watch.back),
                left=outcome.left,
                cause=outcome.cause,
            )
        )
        self._write(outcome)
        return outcome, watch.back

    def _request(self, watch: Watch) -> Request:
        if self._signals:
            return "stop" if self._signals == 1 else "end"
        if watch.back:
            return "stop once begun"
        return "none"

    def _logs(self, links: list[Link]) -> Logs:
        try:
            return Logs(self.work.run.output_dir)
        except OSError as error:
            for link in links:
                link.close()
            raise CannotStartError(
                f"cannot create the folder for the output of ranks: {error.strerror}",
                where=str(error.filename),
                fix="free space and make output_dir writable",
            ) from None

    def _write(self, outcome: AttemptResult) -> None:
        """Write the records of all attempts, and the failure of the last one."""
        self._last = outcome
        output_dir, last = self.work.run.output_dir, self.attempts[-1]
        try:
            write_attempts(output_dir, self.attempts)
            if outcome.cause is not None:
                write_failure(output_dir, outcome.cause, outcome.others, attempt=last.attempt, logs=last.logs)
        except OSError as error:
            self.log(f"{output_dir / FAILURE} could not be written: {error.strerror}")

    def _end(self, code: int) -> int:
        if len(self.attempts) > 1:
            for line in summary(self.attempts):
                self.log(line)
        last = self._last
        for host, pids in last.left.items():
            self.log(f"host {host}: processes that could not be ended: {', '.join(map(str, pids))}")
        if code in (EXIT_FAILED, EXIT_USER_ERROR) and last.cause is not None:
            self.log(failure_text(last.cause, last.others, self.work.run.output_dir))
        elif code == EXIT_PREEMPTED:
            self.log(stopped_words(self.work.run.output_dir / "checkpoints"))
        elif code == EXIT_INTERRUPTED:
            self.log("interrupted: the ranks were ended, and nothing was saved")
        elif code == 0:
            (self.work.run.output_dir / FAILURE).unlink(missing_ok=True)
        return code

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1 if number == signal.SIGINT or not self._signals else 0


def summary(attempts: Sequence[AttemptRecord]) -> list[str]:
    """Return one line per attempt."""
    lines = []
    for item in attempts:
        steps = "no step" if item.last_step is None else f"steps {item.first_step} to {item.last_step}"
        end: str = item.status
        if item.cause is not None:
            reason = item.cause.message.splitlines()[0] if item.cause.message else item.cause.kind
            end += f": {item.cause.where()}: {reason}"
        elif end == "preempted" and item.came_back:
            end = f"saved to go on with {', '.join(item.came_back)}"
        lines.append(f"attempt {item.attempt}: {', '.join(item.hosts)} ({item.ranks} ranks), {steps}, {end}")
    return lines


class Watch:
    """A background check, during an attempt, for hosts outside of it (`out`) that respond again; a context manager."""

    def __init__(
        self, run: RunConfig, world: World, out: Sequence[Host], site: RemoteShell, every_s: float, log: Log
    ) -> None:
        self.back: tuple[str, ...] = ()
        """Names of recovered hosts that make a larger world; once there are any, the watch ends."""
        self._run, self._world, self._out = run, world, list(out)
        self._site, self._every_s, self._log = site, every_s, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        if self._out:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(self._every_s) and not self.back:
            # Stop connecting when the attempt is over: an agent that starts after the next one would end its ranks.
            links, _ = connect(self._out, self._site, Inbox(), over=self._stop.is_set)
            for link in links:
                link.close()
            answering = tuple(link.host for link in links)
            larger = largest_world(self._run, [*self._world.hosts, *answering], len(self._world.hosts))
            if larger is not None and larger.ranks > self._world.ranks:
                self.back = tuple(host.name for host in answering if host in larger.hosts)
                self._log(f"{', '.join(self.back)} answers again: the run saves, and continues with it")
