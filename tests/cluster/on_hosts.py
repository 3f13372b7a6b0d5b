"""Run a command on the first of a few hosts that this machine plays; as root.

    python tests/cluster/on_hosts.py [COUNT] -- m3i-scale doctor --hostfile tests/cluster/hostfile --json

The hosts are those of the tests here (see `hosts.py`): node0, node1, …, with one sshd each. They end with the command.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from hosts import Hosts, unavailable  # noqa: E402
from launch import environment  # noqa: E402


def main(arguments: list[str]) -> int:
    """Exit code of the command."""
    if "--" not in arguments:
        print(__doc__, file=sys.stderr)
        return 2
    cut = arguments.index("--")
    count, command = int(arguments[0]) if cut else 2, arguments[cut + 1 :]
    reason = unavailable()
    if reason:
        print(f"no hosts can be made here: {reason}", file=sys.stderr)
        return 2
    with Hosts(count) as hosts:
        return subprocess.run(hosts.command("node0", command, Path.cwd()), env=environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
