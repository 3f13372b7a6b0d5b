"""Vector clocks of a simulated GPU: the host, its threads and every stream know how far each of the others is.

A clock maps the number of a timeline to the last of its operations that is known to be over. Waits for events and
streams pass this knowledge on. Two accesses to the same memory race if the later one does not know of the earlier one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

Clock = dict[int, int]


@functools.cache
def _packages() -> dict[str, str]:
    """Return the folders of the packages whose lines are reported, with their names."""
    folders: dict[str, str] = {}
    for name in ("m3i_scale", "deepspeed", "transformers", "torchvision", "torch"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            folders[str(folder / "optim" if name == "torch" else folder) + "/"] = name
    return {folder: f"{name}/optim/" if name == "torch" else f"{name}/" for folder, name in folders.items()}


@functools.cache
def _short(path: str) -> str | None:
    """Return the path of a source file from its package on; None outside of the packages."""
    for folder, name in _packages().items():
        if path.startswith(folder):
            return name + path.removeprefix(folder)
    return None


def line(count: int = 1) -> str:
    """Return the innermost lines of the packages on the stack, `package/file.py:number`, joined by ` < `."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < count:
        short = _short(frame.f_code.co_filename)
        place = f"{short}:{frame.f_lineno}"
        if short is not None and place not in lines[-1:]:  # a comprehension is a frame of its own
            lines.append(place)
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines) or "the backward pass"


class Timeline:
    """Operations that run in order: those of the host, of one of its threads, or of a stream."""

    def __init__(self, name: str) -> None:
        self.number = len(machine.timelines)
        self.name = name
        self.clock: Clock = {}
        machine.timelines.append(self)

    def follow(self, clock: Mapping[int, int]) -> None:
        """Order what comes next after everything that `clock` knows."""
        for number, at in clock.items():
            if at > self.clock.get(number, 0):
                self.clock[number] = at

    def tick(self) -> int:
        """Begin an operation and return its number."""
        at = self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return at


class Machine:
    """The host and the device: their timelines, and everything that is counted and found."""

    def __init__(self) -> None:
        self.timelines: list[Timeline] = []
        self.streams: list[Stream] = []
        self.current: list[Stream] = []
        """The stack of `torch.cuda.stream`; the last one is in use."""
        self.device_is_ahead = True
        """Answer of `query`: whether the device has passed every event at once. If so, no wait for an event hides that
        another one is missing; if not, waits that slow a host down that is far ahead are counted."""
        self.kernels = 0
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        """Races, lifetimes and devices."""

    def start(self) -> None:
        """Make the host and the default stream."""
        self.host = Timeline("the host")
        self.current = [Stream(name="the default stream")]

    @property
    def stream(self) -> Stream:
        """Return the stream in use."""
        return self.current[-1]

    def wait(self, kind: str, *streams: Stream) -> None:
        """Count a wait of the host, which then knows what the streams have done."""
        self.waits[f"{kind} at {line()}"] += 1
        for stream in streams:
            self.host.follow(stream.clock)

    @contextlib.contextmanager
    def thread(self, timeline: Timeline) -> Iterator[None]:
        """Run what is inside as a thread of the host; the host waits for it at the end."""
        self.host, host = timeline, self.host
        try:
            yield
        finally:
            self.host = host
            host.follow(timeline.clock)


machine = Machine()


class Stream(Timeline):
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: object = None, priority: int = 0, *, name: str = "", **_: object) -> None:
        super().__init__(name or f"the stream of {line()}")
        machine.streams.append(self)

    def launch(self) -> int:
        """Queue an operation, which comes after everything that the host knows, and return its number."""
        self.follow(machine.host.clock)
        return self.tick()

    def wait_stream(self, other: Stream) -> None:
        """Have later operations wait for those that the other stream has so far."""
        self.follow(machine.host.clock)
        self.follow(other.clock)

    def wait_event(self, event: Event) -> None:
        """Have later operations wait for the event."""
        self.follow(machine.host.clock)
        self.follow(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event behind the operations so far."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Have the host wait for the stream."""
        machine.wait("stream.synchronize", self)

    def query(self) -> bool:
        """Return whether the device has done everything."""
        return machine.device_is_ahead


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, *_: object, **__: object) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        """Record the event behind what the stream has so far."""
        stream = stream or machine.stream
        stream.follow(machine.host.clock)
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        """Have the stream wait for the event."""
        (stream or machine.stream).wait_event(self)

    def synchronize(self) -> None:
        """Have the host wait for the event."""
        machine.wait("event.synchronize")
        machine.host.follow(self.clock)

    def query(self) -> bool:
        """Return whether the device has passed the event."""
        return machine.device_is_ahead

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds between two events."""
        return 1.0


machine.start()
