"""What the supervisor and the agents of hosts say to each other: JSON, a line a message."""

from __future__ import annotations

import json
from typing import Any

BEAT_S = 1.0
"""Both sides say so often that they are there."""
AGENT_SILENCE = 0.6
"""Share of the supervisor's patience after which an agent that hears nothing ends its ranks. It is the smaller one, so
that nothing of a host that was cut off runs any more when the others go on without it."""

Message = dict[str, Any]


def encode(kind: str, **fields: Any) -> bytes:
    """A message as a line."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """A line as a message; None for lines that a shell's start-up files have printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "kind" in message else None
