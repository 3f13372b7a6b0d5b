"""Starts ranks of a job, waits for them, and leaves nothing behind: no process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


PORTS = range(11_000, 19_000)
"""Below those that the system gives to connections and to who asks for any port, which would take a chosen one away
before a job listens there."""


def free_port() -> int:
    """A port that nobody listens on, and that no other test of this machine gets until all have been given."""
    with (Path(tempfile.gettempdir()) / f"m3i-scale-tests-port-{os.getuid()}").open("a+") as last:
        fcntl.flock(last, fcntl.LOCK_EX)
        last.seek(0)
        number = int(last.read() or 0)
        while True:
            number = (number + 1) % len(PORTS)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", PORTS[number]))
                break
        last.truncate(0)
        last.write(str(number))
    return PORTS[number]


def environment(**more: str) -> dict[str, str]:
    """On a CPU, with one thread, in a world of its own."""
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    paths = [str(TESTS), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
        "COLUMNS": "200",
        **more,
    }


class Job:
    """Processes of one job, each with its output in a file."""

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]], logs: Path, port: int) -> None:
        self.port = port
        self.logs = logs
        self.left_in_shared_memory: list[str] = []
        """Files that the job itself had not removed when all its processes had ended."""
        self._before = self._shared_memory()  # of killed jobs of earlier test runs, when the port was given last
        logs.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for number, (command, variables) in enumerate(zip(commands, environments, strict=True)):
            with self.log(number).open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, env=variables, cwd=logs, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )

    def log(self, number: int = 0) -> Path:
        return self.logs / f"process-{number}.log"

    def text(self) -> str:
        """What all processes said."""
        return "\n".join(self.log(number).read_text() for number in range(len(self.processes)))

    def signal(self, number: int) -> None:
        """To every process that runs, and to what it started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def wait(self, timeout_s: float = 900) -> list[int]:
        """Exit codes, once all have ended and everything is swept up. The limit only ends a hang."""
        try:
            codes = [process.wait(timeout_s) for process in self.processes]
            self.left_in_shared_memory = sorted(path.name for path in self._shared_memory() - self._before)
            return codes
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text()[-4000:]}") from None
        finally:
            self.end()

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the process left behind

    def _shared_memory(self) -> set[Path]:
        return set(Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*"))


def start_ranks(arguments: list[str], world_size: int, logs: Path, **variables: str) -> Job:
    """`python ARGUMENTS` once per rank, with the variables that launchers set. Quicker than a launcher."""
    port = free_port()
    environments = [
        environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **variables,
        )
        for rank in range(world_size)
    ]
    return Job([[sys.executable, *arguments]] * world_size, environments, logs, port)


def start_deepspeed(arguments: list[str], world_size: int, logs: Path, **variables: str) -> Job:
    """The `deepspeed` launcher, as a user calls it."""
    port = free_port()
    launcher = str(Path(sys.executable).parent / "deepspeed")
    options = ["--no_local_rank", "--num_accelerators", str(world_size), "--master_port", str(port)]
    return Job([[launcher, *options, *arguments]], [environment(**variables)], logs, port)
