"""Encode the messages between the launch and the agents of hosts: JSON, one message per line."""

from __future__ import annotations

import json
import queue
import threading
from typing import IO, Any

BEAT_S = 1.0
"""Heartbeat interval of both sides."""
AGENT_SILENCE = 0.6
"""An agent's heartbeat timeout, as a fraction of the launch's; the agent then ends its ranks. It is smaller, so that a
disconnected host runs nothing any more when the others continue without it."""
_LINES = 10_000
_CLOSE_S = 5.0

Message = dict[str, Any]


def encode(kind: str, **fields: Any) -> bytes:
    """Encode a message as a line."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """Decode a line as a message; None for lines printed by a shell's startup files."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "kind" in message else None


class Writer:
    """Sender of an agent's messages, on a thread: an agent must notice a dead network, not block on it. Output of ranks
    that cannot be sent in time is dropped and counted."""

    def __init__(self, output: IO[bytes]) -> None:
        self.broken = False
        """Whether the connection is lost."""
        self._output = output
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, daemon=True, name="writer")
        self._thread.start()

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message that must not be dropped."""
        self._waiting.put(encode(kind, **fields))

    def log(self, rank: int, data: bytes) -> None:
        """Send output of a rank."""
        if self._waiting.qsize() > _LINES:
            self._dropped += len(data)
            return
        if self._dropped:
            data = f"\n[{self._dropped} bytes that could not be sent in time are left out]\n".encode() + data
            self._dropped = 0
        self.send("log", rank=rank, text=data.decode(errors="replace"))

    def close(self) -> None:
        """Wait, within limits, until all messages have been sent."""
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
