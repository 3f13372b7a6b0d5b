"""What hosts are made of: the programs that they need, the script of their process 1, keys and configurations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

INTERFACES = ("eth0", "eth1")
"""Each host is on two networks; its name stands for its address on the first."""
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
PROGRAMS |= {"unshare": "util-linux", "nsenter": "util-linux", "pkill": "procps"}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")

BOOT = """
set -e
hostname "$NAME"
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/sshd /run/lock
mount -t tmpfs -o mode=1777 shm /dev/shm
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
if [ -e /etc/hostname ]; then mount --bind "$FOLDER/$NAME/hostname" /etc/hostname; fi
if [ -d "$EXTENSIONS" ]; then
  mkdir /run/built /run/work
  mount -t overlay -o "lowerdir=$EXTENSIONS,upperdir=/run/built,workdir=/run/work" built "$EXTENSIONS"
fi
if [ -d /root/.ssh ]; then mount -t tmpfs -o mode=700 ssh /root/.ssh; fi
echo booted
read -r connected
ip link set lo up
for number in 0 1; do
  ip address add "10.77.$number.$ADDRESS/24" dev "eth$number"
  ip link set "eth$number" up
done
"$SSHD" -D -e -f "$FOLDER/$NAME/sshd_config" 2>>"$FOLDER/$NAME/sshd.log" &
read -r forever # meanwhile the shell collects what has ended; it ends itself with the one that holds the other end
"""


def unavailable() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "hosts on one machine need root"
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program, path=SYSTEM_PATH) is None}
    if missing:
        return f"hosts on one machine need the packages {', '.join(sorted(missing))}"
    probe = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/run"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"hosts on one machine need namespaces: {tried.stderr.strip()}"


def extensions_folder() -> str:
    """Where DeepSpeed builds; each host has its own copy, as on a local disk: locks of one are not seen by another."""
    return os.environ.get("TORCH_EXTENSIONS_DIR") or f"{sys.prefix}/torch_extensions"


def address_of(number: int, interface: str) -> str:
    """Of the host of that number."""
    return f"10.77.{INTERFACES.index(interface)}.{number + 1}"


def new_folder() -> Path:
    """For keys and configurations. Those of tests that were killed go; the rest of their hosts went with them."""
    for folder in Path(tempfile.gettempdir()).glob("m3ih-*-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[1])):
            shutil.rmtree(folder, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"m3ih-{os.getpid()}-"))
    made.chmod(0o755)
    return made


def write_files(folder: Path, names: Sequence[str], machine: Mapping[str, str]) -> None:
    """One key pair that opens all hosts, a key of each host, /etc/hosts, and what ssh and sshd are told.

    Args:
        folder: an empty one.
        names: of the hosts, by number.
        machine: variables of every session.
    """
    _make_key(folder / "id")
    shutil.copy(folder / "id.pub", folder / "authorized_keys")
    known, lines = [], ["127.0.0.1 localhost"]
    given = " ".join(f'"{key}={value}"' for key, value in machine.items())
    for number, name in enumerate(names):
        home = folder / name
        home.mkdir()
        _make_key(home / "host_key")
        (home / "hostname").write_text(f"{name}\n")
        addresses = [address_of(number, interface) for interface in INTERFACES]
        listen = "".join(f"ListenAddress {address}\n" for address in addresses)
        (home / "sshd_config").write_text(
            f"{listen}HostKey {home}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
            f"UsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nSetEnv {given}\n"
        )
        known.append(f"{name},{name}-eth1,{','.join(addresses)} {(home / 'host_key.pub').read_text()}")
        lines += [f"{addresses[0]} {name}", f"{addresses[1]} {name}-eth1"]
    (folder / "known_hosts").write_text("".join(known))
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/id\n  IdentitiesOnly yes\n  BatchMode yes\n  ConnectTimeout 60\n"
        f"  GlobalKnownHostsFile {folder}/known_hosts\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n"
    )


def _make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "m3ih", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
