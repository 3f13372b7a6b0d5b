"""`m3i-scale doctor`: check the environment for a config file and a cluster description."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from m3i_scale.config import find_run_file, known_runs
from m3i_scale.errors import ConfigError
from m3i_scale.launch.description import Cluster
from m3i_scale.launch.doctor.examine import Examination
from m3i_scale.launch.doctor.findings import Finding
from m3i_scale.launch.doctor.machine import Needs
from m3i_scale.launch.environment import travelling
from m3i_scale.launch.transport import RemoteShell


def examine(
    run: str | None,
    overrides: list[str],
    cluster: Cluster,
    *,
    connect_s: float = 10.0,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Finding]:
    """Check the nodes of a cluster description, or this machine if it names none.

    Args:
        run: config file, or the name of a built-in one. None: check the nodes only.
        overrides: `section.key=value`.
        cluster: nodes and how to connect to them.
        connect_s: ssh connection timeout in seconds.
        tell: called with progress messages.
    """
    if overrides and run is None:
        raise ConfigError("overrides have no effect without a run file", where=" ".join(overrides))
    named = cluster.named_hosts()
    if not named and (cluster.nodes or 1) > 1:
        raise ConfigError(
            f"which are the {cluster.nodes} machines?",
            where=f"nodes: {cluster.nodes}",
            fix="--hostfile FILE, with a line `name slots=N` for every one",
        )
    slots = {host.name: host.slots for host in named} or {socket.gethostname(): cluster.ranks_per_node or 1}
    variables = {
        item.name: item.value for item in travelling(cluster.environment, os.environ, interface=cluster.interface)
    }
    site = RemoteShell(
        python=cluster.python or sys.executable,
        workdir=cluster.workdir or str(Path.cwd()),
        output_dir="",
        launch=secrets.token_hex(8),
        ssh=cluster.ssh,
        python_path=variables.get("PYTHONPATH", ""),
        environment=variables,
        transport=cluster.transport,
        ssh_to_all=bool(named),
    )
    examination = Examination(
        slots=slots,
        site=site,
        port=cluster.master_port,
        interface=cluster.interface,
        master_address=cluster.master_address,
        run=None if run is None else _same_everywhere(run),
        overrides=tuple(overrides),
        needs=None if run is None else _needs(run, overrides, slots),
        connect_s=connect_s,
        tell=tell,
    )
    return examination.findings()


def _same_everywhere(run: str) -> str:
    """Return a built-in name unchanged and a path as an absolute path, as launchers pass it to ranks."""
    path = find_run_file(run)
    return run if known_runs().get(run) == path else str(path.absolute())


def _needs(run: str, overrides: list[str], slots: dict[str, int]) -> dict[str, Needs]:
    from m3i_scale.objective.recipe import load_run_and_recipe
    from m3i_scale.run.preflight import needs_of

    (config, _), world = load_run_and_recipe(run, overrides), sum(slots.values())
    by_slots = {count: needs_of(config, world_size=world, ranks_here=count) for count in set(slots.values())}
    return {host: by_slots[count] for host, count in slots.items()}
