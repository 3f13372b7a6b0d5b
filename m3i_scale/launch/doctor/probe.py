"""One host's part, `python -m m3i_scale.launch.doctor.probe`: answers requests until its standard input ends.

A request is a line of JSON on standard input, the answer a line on standard output. The process ends, at once and
whatever it is doing, when standard input does (the one who asks has gone) or when its time is over, so that nothing is
left on a host. Nothing but the standard library is imported before it has said that it is there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = '{"doctor": '
"""What an answer's line begins with: login scripts and libraries print too."""


class _Answers:
    """Standard output for answers alone; what anybody else prints goes to standard error."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, answer: dict[str, Any]) -> None:
        self._stream.write(f"{MARK}{json.dumps(answer)}}}\n")
        self._stream.flush()


class Probe:
    """What this process knows between requests."""

    def __init__(self) -> None:
        self.left: list[Path] = []
        """Files and folders to remove, in this order."""
        self.store: Any = None
        self.listener: Any = None

    def time(self) -> dict[str, Any]:
        """The clock of this host."""
        return {"time": time.time()}

    def environment(self, secret: dict[str, str]) -> dict[str, Any]:
        """Variables that do not belong on a command line."""
        os.environ.update(secret)
        return {}

    def look(self, request: dict[str, Any]) -> dict[str, Any]:
        """Everything that this host can tell by itself."""
        try:
            from m3i_scale.launch.doctor.look import look

            return look(request, self.left)
        except ImportError as error:
            return {"missing": f"{type(error).__name__}: {error}"}

    def listen(self, address: str, port: int, seconds: float) -> dict[str, Any]:
        """Open the port that rank 0 will wait at."""
        from m3i_scale.launch.doctor.network import Listener

        try:
            self.listener = Listener(address, port, seconds)
        except OSError as error:
            return {"fault": error.strerror or str(error)}
        return {"port": self.listener.port}

    def meet(self, address: str, port: int, seconds: float, shared: dict[str, Any] | None) -> dict[str, Any]:
        """Reach the head's port, and read what the others have written."""
        from m3i_scale.launch.doctor.network import reach
        from m3i_scale.launch.doctor.shared import read_notes

        notes = read_notes(Path(shared["folder"]), shared["names"]) if shared else None
        return {"port": reach(address, port, seconds), "shared": notes}

    def close(self) -> dict[str, Any]:
        """Let go of the port."""
        if self.listener is not None:
            self.listener.close()
        return {}

    def join(self, **request: Any) -> dict[str, Any]:
        """Connect to the store that groups of ranks find each other with."""
        from m3i_scale.launch.doctor.network import open_store

        try:
            self.store = open_store(**request)
        except (RuntimeError, OSError) as error:
            return {"fault": _first_line(error)}
        return {}

    def measure(self, **request: Any) -> dict[str, Any]:
        """Collectives of a group that this host belongs to."""
        from m3i_scale.launch.doctor.bandwidth import measure

        try:
            return measure(self.store, **request)
        except (RuntimeError, OSError) as error:
            return {"fault": _first_line(error)}

    def clean(self) -> dict[str, Any]:
        """Remove what `look` has written."""
        from m3i_scale.launch.doctor.shared import remove_notes

        remove_notes(self.left)
        return {}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read(requests: queue.SimpleQueue[str], probe: Probe) -> None:
    for line in sys.stdin:
        requests.put(line)
    for path in probe.left:  # nobody is there to say `clean`
        try:
            path.rmdir() if path.is_dir() else path.unlink()
        except OSError:
            continue
    os._exit(0)


def main() -> None:
    """Serve."""
    faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)  # also while a library holds the interpreter
    answers, requests, probe = _Answers(), queue.SimpleQueue[str](), Probe()
    threading.Thread(target=_read, args=(requests, probe), daemon=True).start()
    answers.send({"here": sys.executable})
    while True:
        request = json.loads(requests.get())
        serve: Callable[..., dict[str, Any]] = getattr(probe, request.pop("do"))
        try:
            answers.send(serve(**request))
        except Exception as error:  # told to the one who asks, who names the host
            answers.send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
