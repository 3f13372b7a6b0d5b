"""A real Slurm with two nodes on this one machine, for tests that are root and have Debian's `slurm-wlm` and `munge`.

Everything lives in a folder, on free ports and in a process namespace of its own, whose first process ends with the
test, however that ends; the kernel then ends whatever is inside, daemons, job steps and ranks. In there `n1` and `n2`
are names of this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from launch import environment, free_port

NODES = ("n1", "n2")
KILL_WAIT_S = 120
"""Between SIGTERM and SIGKILL; long, because a save on a busy machine may take more than the 30 that are usual."""
_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
_START_S = 300
_PREFIX = "m3i-slurm-"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# How long a requeued job waits before it starts again: as long as credentials are valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=15
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait={kill_wait}
ReturnToService=1
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=2
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""

INIT = """\
set -eu
mount --bind hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
munged --foreground --origin 127.0.0.1 --num-threads 2 --socket "$PWD/munge.socket" --key-file "$PWD/munge.key" \
  --pid-file "$PWD/munged.pid" --log-file "$PWD/munged.log" --seed-file "$PWD/munged.seed" &
until [ -S munge.socket ]; do sleep 0.02; done
slurmctld -D -c &
for node in n1 n2; do slurmd -D -N "$node" & done
wait
"""


def missing() -> str | None:
    """What this machine lacks, as the reason to skip."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    absent = [name for name in _DAEMONS if shutil.which(name, path=path) is None]
    if os.geteuid() != 0 or absent:
        return f"a Slurm needs root and {', '.join(absent) or 'its daemons'}, which the pipeline has"
    return None


class Slurm:
    """The running cluster, and commands to it."""

    def __init__(self, folder: Path, init: psutil.Process) -> None:
        self.folder, self._init = folder, init
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"))

    def command(self, *words: str, fails: bool = False) -> str:
        """Output of sbatch, scontrol, … as root; `fails`: it may."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=300, check=False)
        assert fails or done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """The number of the job; it starts in the folder of its script."""
        return self.command("sbatch", "--parsable", f"--chdir={script.parent}", *options, str(script)).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        fields = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, until: Callable[[], bool], told: Callable[[], str], timeout_s: float = 900) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"{told()}\n{self.logs()}"
            time.sleep(0.1)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those inside whose command line has all of `words`."""
        found = []
        for process in self._init.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if set(words) <= set(process.cmdline()):
                    found.append(process)
        return found

    def logs(self) -> str:
        """The end of what the daemons have written."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _wait_for_nodes(self) -> None:
        def idle() -> bool:
            assert self._init.is_running(), self.logs()
            return self.command("sinfo", "-h", "-o", "%T %D", fails=True).strip() == f"idle {len(NODES)}"

        self.wait(idle, lambda: self.command("sinfo", fails=True), _START_S)


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Start munged, slurmctld and a slurmd for each node; end everything and remove the folder."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # short: the path of a socket has at most 107 characters
    lock = FileLock(folder / "lock")
    lock.acquire()
    init = None
    try:
        init = _start(folder)
        cluster = Slurm(folder, psutil.Process(init.pid))
        cluster._wait_for_nodes()
        yield cluster
    finally:
        if init is not None:
            _end(init)
        shutil.rmtree(folder)
        lock.release()


def sweep() -> None:
    """Remove the folders that killed tests have left; their processes are gone already."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(Timeout), FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder)


def _start(folder: Path) -> subprocess.Popen[bytes]:
    folder.chmod(0o755)  # munge's clients must reach its socket
    host = socket.gethostname().split(".")[0]
    ports = [free_port() for _ in range(3)]
    text = CONF.format(host=host, folder=folder, port=ports[0], ports=ports[1:], kill_wait=KILL_WAIT_S)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "state").mkdir()
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    variables = environment(SLURM_CONF=str(folder / "slurm.conf"))
    variables["PATH"] += ":/usr/sbin"
    with (folder / "init.log").open("w") as log:
        return subprocess.Popen(
            [*command, "bash", "-c", INIT], cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        )


def _end(unshare: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for first in psutil.Process(unshare.pid).children():
            first.kill()  # returns to its parent only when the whole namespace is gone
    unshare.wait(300)
