"""Messages on their way to the supervisor, on a thread: an agent must notice a dead network, not wait for it."""

from __future__ import annotations

import queue
import threading
from typing import IO, Any

from m3i_scale.launch.wire import encode

_LINES = 10_000
_CLOSE_S = 5.0


class Writer:
    """Never blocks who says something. What ranks print is dropped, and counted, where it cannot be sent in time.

    Args:
        output: closed at the end.
    """

    def __init__(self, output: IO[bytes]) -> None:
        self.broken = False
        """Whether the other side is gone."""
        self._output = output
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, daemon=True, name="writer")
        self._thread.start()

    def say(self, kind: str, **fields: Any) -> None:
        """A message that must arrive."""
        self._waiting.put(encode(kind, **fields))

    def log(self, rank: int, data: bytes) -> None:
        """What a rank has printed."""
        if self._waiting.qsize() > _LINES:
            self._dropped += len(data)
            return
        if self._dropped:
            data = f"\n[{self._dropped} bytes that could not be sent in time are left out]\n".encode() + data
            self._dropped = 0
        self.say("log", rank=rank, text=data.decode(errors="replace"))

    def close(self) -> None:
        """Wait for what is on its way, within limits."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                while line:
                    line = line[self._output.write(line) :]
            except OSError:
                self.broken = True
                return
