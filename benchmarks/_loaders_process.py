"""A process of its own for every library, so that none changes another's world, and its memory is its own.

Orders come as JSON lines on standard input, answers go out the same way.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

WARM_BATCHES = 8
"""Before the clock starts; more than all workers have prepared while others were measured."""


class Process:
    """The parent's end."""

    def __init__(self, name: str, settings: dict[str, Any], log: Path) -> None:
        command = [sys.executable, str(Path(__file__)), name, json.dumps(settings)]
        self.name = name
        environment = {"OMP_NUM_THREADS": "1", "LITDATA_DISABLE_VERSION_CHECK": "1", **os.environ}
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
            )
        self._log = log
        self.fault: str | None = None
        """Why it gave up; it answers no more."""

    def ask(self, order: str, **values: Any) -> dict[str, Any]:
        """An order's answer; empty where the library failed, which `fault` explains."""
        if self.fault is not None or self._process.stdin is None or self._process.stdout is None:
            return {}
        try:
            self._process.stdin.write(json.dumps({"order": order, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"fault": f"the process ended; see {self._log}"}
        self.fault = answer.get("fault")
        return {} if self.fault else answer

    def end(self) -> None:
        """Close its input, which ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Server:
    """The library's end."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        from _loaders_sides import SIDES, task_of

        self._side, self._task = SIDES[name], task_of(settings)
        self._opened: Any = None

    def open(self, workers: int) -> dict[str, Any]:
        """A loader with so many workers; its first batches are thrown away."""
        self.close()
        self._opened = self._side.opens(replace(self._task, workers=workers))
        return {"shape": list(next(self._opened.batches)[0].shape)}

    def draw(self, samples: int) -> dict[str, Any]:
        """Seconds and samples of the next batches."""
        for _ in range(WARM_BATCHES):
            next(self._opened.batches)
        count, started = 0, time.perf_counter()
        while count < samples:
            count += len(next(self._opened.batches)[0])
        return {"samples": count, "seconds": time.perf_counter() - started}

    def close(self) -> dict[str, Any]:
        """End the workers."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None
        return {}

    def resume(self, shares: list[float]) -> dict[str, Any]:
        """One pass that goes on, and new loaders from states taken on its way."""
        steps = self._task.corpus.samples // self._task.batch
        wanted = {max(1, int(share * steps)): share for share in shares}
        states, numbers = {}, []
        opened = self._side.opens(self._task)
        for step, batch in zip(range(1, steps + 1), opened.batches, strict=False):
            numbers.append(batch[1].tolist())
            if step in wanted:
                states[step] = opened.state()
        opened.close()
        seconds: dict[str, float | None] = {}
        follow: list[list[int]] = []
        for step, state in states.items():
            started = time.perf_counter()
            again = self._side.opens(replace(self._task, state=state))
            first = next(again.batches, None)  # None: it resumed at an end
            seconds[str(wanted[step])] = None if first is None else time.perf_counter() - started
            if step == max(states) and first is not None:
                follow = [first[1].tolist(), *_numbers(again.batches, len(numbers) - step - 1)]
            again.close()
        return {"seconds": seconds, **_difference(numbers[max(states) :], follow)}

    def remember(self, seconds: float) -> dict[str, Any]:
        """Memory of this process and its workers over a long stream."""
        import psutil

        me, points, count = psutil.Process(), [], 0
        ends, look = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends:
            count += len(next(self._opened.batches)[0])
            if time.monotonic() > look:
                look = time.monotonic() + max(0.2, seconds / 400)
                resident = [process.memory_info().rss for process in (me, *me.children(recursive=True))]
                points.append((count, sum(resident) / 2**20))
        return {"samples": count, **slope(points)}


def slope(points: list[tuple[int, float]]) -> dict[str, Any]:
    """Least squares over the points after the first fifth, in which caches and queues fill."""
    settled = points[len(points) // 5 :]
    fit = statistics.linear_regression([at / 100_000 for at, _ in settled], [mib for _, mib in settled])
    sizes = [mib for _, mib in settled]
    return {"mib_per_100k_samples": fit.slope, "first_mib": sizes[0], "last_mib": sizes[-1], "peak_mib": max(sizes)}


def _numbers(batches: Iterator[Any], count: int) -> list[list[int]]:
    return [batch[1].tolist() for _, batch in zip(range(count), batches, strict=False)]


def _difference(went_on: list[list[int]], resumed: list[list[int]]) -> dict[str, Any]:
    """Samples that the resumed loader leaves out, and gives though they are not due, in the rest of the pass."""
    due, given = (Counter(number for batch in batches for number in batch) for batches in (went_on, resumed))
    return {
        "lost": (due - given).total(),
        "repeated": (given - due).total(),
        "of": due.total(),
        "order_identical": went_on == resumed,
    }


def serve(name: str, settings: dict[str, Any]) -> None:
    """Answer orders until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    sys.path.insert(0, str(Path(__file__).parent))
    server = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            server = server or Server(name, settings)
            answer = getattr(server, order.pop("order"))(**order)
        except Exception as error:  # a peer's failure is a finding, which the document tells
            answer = {"fault": f"{type(error).__name__}: {error}"[:400]}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    if server is not None:
        server.close()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
