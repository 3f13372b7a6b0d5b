"""Runs `m3i-scale` in forks of one process that has imported everything, for tests that call it many times.

`Forks(folder)` starts that process and makes `folder/m3i-scale`, a command to be put first on PATH. A call has its own
working folder, environment, streams and exit code, as a process of its own would; only the imports are shared, which
take longer than most commands.

Not tested that way: what the package reads of the environment when it is imported, which is that of the test; and
signals, which reach the process that calls and not the fork.
"""

from __future__ import annotations

import array
import gc
import json
import os
import select
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

SELF = Path(__file__).resolve()


class Forks:
    """The process, until `close`."""

    def __init__(self, folder: Path) -> None:
        address = folder / "forks.socket"
        command = folder / "m3i-scale"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{SELF}" call "{address}" "$@"\n')
        command.chmod(0o755)
        self.folder = folder
        with (folder / "forks.log").open("w") as log:
            arguments = [sys.executable, str(SELF), "serve", str(address)]
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert self._process.stdout is not None
        if b"ready\n" not in iter(self._process.stdout.readline, b""):  # DeepSpeed prints before it
            raise AssertionError((folder / "forks.log").read_text())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, *arguments: str, **given: Any) -> subprocess.CompletedProcess[str]:
        """Run the command with `arguments`; `given` goes to `subprocess.run`."""
        command = [str(self.folder / "m3i-scale"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, **given)


def preload() -> None:
    """Import all that commands need, once for all forks."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  it imports torch's compiler

    import m3i_scale.evaluation.measures
    import m3i_scale.exports.verify
    import m3i_scale.run.train  # noqa: F401

    gc.collect()
    gc.freeze()  # else every fork searches what was imported, and with that copies it


def serve(address: str) -> None:
    """Answer calls, each in a fork."""
    preload()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:  # stdin ends with whoever has started this
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    if os.fork() == 0:  # nobody has to wait for it
                        listener.close()
                        _answer(connection)
                    os._exit(0)
                os.wait()


def _answer(connection: socket.socket) -> None:
    """Be the process that was asked for, say its exit code, and end."""
    descriptors = array.array("i")
    message, (control,), _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(3 * descriptors.itemsize))
    descriptors.frombytes(control[2])
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    call: dict[str, Any] = json.loads(message)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = ["m3i-scale", *call["arguments"]]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
    code = 0
    try:
        from m3i_scale.cli import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([code]))
        os._exit(0)


def call(address: str, arguments: list[str]) -> int:
    """Ask for a command; return its exit code."""
    asked = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendmsg(
            [json.dumps(asked).encode()],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))],
        )
        code = connection.recv(1)
    return code[0] if code else 1


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:]))
