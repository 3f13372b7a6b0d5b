"""Carries packets between tap interfaces, each after a delay: `python _carrier.py TAP …`, milliseconds by line on
standard input. A switch that knows every address from the packets that it has seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import struct
import sys
import time
from collections import deque
from pathlib import Path

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_LARGEST = 65_600


def main(names: list[str]) -> None:
    """Until standard input ends."""
    taps = [_open(name) for name in names]
    print("ready", flush=True)
    delay_s, known = 0.0, dict[bytes, int]()
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([0, *taps], [], [], wait)
        for source in ready:
            if source == 0:
                line = os.read(0, 100)
                if not line:
                    return
                delay_s = float(line.split()[-1]) / 1e3
                continue
            for packet in _packets(source):
                known[packet[6:12]] = source
                target = known.get(packet[:6])
                due = time.monotonic() + delay_s
                for tap in taps if target is None else [target]:
                    if tap != source:
                        waiting.append((due, tap, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, tap, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # an interface that is down, or full, loses the packet
                os.write(tap, packet)


def _open(name: str) -> int:
    device = Path("/dev/net/tun")
    if not device.exists():  # a container has the kernel's, and no name for it
        device.parent.mkdir(exist_ok=True)
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    tap = os.open(device, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def _packets(tap: int) -> list[bytes]:
    found = []
    for _ in range(16):  # then the others' turn
        try:
            found.append(os.read(tap, _LARGEST))
        except BlockingIOError:
            break
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
