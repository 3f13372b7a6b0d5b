"""A rank without a model: `python playing_rank.py OUTPUT STEPS PART@RANK@STEP…`. It steps, and plays its parts.

Ranks wait for each other by files in OUTPUT, as they would in a collective.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from m3i_scale.errors import DataError
from m3i_scale.host.rank_record import Heartbeat, recorded

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
OUTPUT = Path(sys.argv[1])
asked: list[int] = []


def play(part: str) -> None:
    if part == "exception":
        raise RuntimeError("the cause: a value that nobody thought of")
    if part == "closed":
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]")
    if part == "user":
        raise DataError("a shard cannot be read", where="shard-000003.tar", fix="copy it again")
    if part == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if part == "stand":
        os.kill(os.getpid(), signal.SIGSTOP)
    if part == "exit":
        print("error: something said just before the end")
        os._exit(9)
    if part == "children":  # of its group, and of none that it belongs to; both hold its output open
        subprocess.Popen(["sleep", "301"])
        subprocess.Popen(["sleep", "302"], start_new_session=True)


def note(number: int, frame: object) -> None:
    asked.append(number)


def ends_unseen(rank: int, step: int) -> bool:
    """Return whether a rank of this host is killed at this step and not yet reaped by its launcher. Only a rank that
    ends later is certain to be the second."""
    if f"kill@{rank}@{step}" not in sys.argv:
        return False
    pid = (OUTPUT / f"{os.environ['MASTER_PORT']}-{step - 1}-{rank}").read_text()
    return not pid or Path(f"/proc/{pid}").exists()


def together(heartbeat: Heartbeat, step: int) -> None:
    """Wait for all ranks."""
    heartbeat.at("reduce")
    missed = time.perf_counter()
    (OUTPUT / f"{os.environ['MASTER_PORT']}-{step}-{RANK}").write_text(str(os.getpid()))
    while missing := [
        rank for rank in range(WORLD) if not (OUTPUT / f"{os.environ['MASTER_PORT']}-{step}-{rank}").exists()
    ]:
        time.sleep(0.01)
        missed = time.perf_counter() if len(missing) > 1 else missed  # others are only slow
        patient = f"patient@{RANK}@{step}" in sys.argv and time.perf_counter() - missed > 2
        if patient and not any(ends_unseen(rank, step) for rank in missing):
            raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation")


def main() -> int:
    signal.signal(signal.SIGUSR2, note)
    parts = [part.split("@") for part in sys.argv[3:] if part.count("@") == 2]
    with recorded(OUTPUT) as heartbeat:
        heartbeat.at("other", 0)
        for step in range(1, int(sys.argv[2]) + 1):
            heartbeat.at("forward")
            time.sleep(0.02)
            print(f"rank {RANK} of {WORLD} at step {step} on {os.uname().nodename}", flush=True)
            for name, rank, at in parts:
                if rank in (str(RANK), "*") and at in (str(step), "*"):
                    play(name)
            together(heartbeat, step)
            heartbeat.at("other", step)
            if asked:  # the others hear of it before they get there: all stop at the same step
                (OUTPUT / f"{os.environ['MASTER_PORT']}-stop-{step + 2}").touch()
            if (OUTPUT / f"{os.environ['MASTER_PORT']}-stop-{step}").exists():
                return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
