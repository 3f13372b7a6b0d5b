"""The built-in elastic launcher over ssh or srun: finds root causes of failures, and restarts on remaining hosts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from m3i_scale.config import RunConfig
from m3i_scale.elastic.attempts import Launch
from m3i_scale.elastic.link import RemoteShell
from m3i_scale.elastic.rendezvous import Policy, Work
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.files import json_text, read_json
from m3i_scale.host.output_dir import launch_lock
from m3i_scale.launch import OVER_HOSTS, Command, LaunchFile, LaunchPlan
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.job import Job
from m3i_scale.launch.shell import SRUN, SSH
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.output import print_line
from m3i_scale.upgrade import upgrade_config

FILE = "elastic.json"
HONORS = OVER_HOSTS | {
    "max_restarts",
    "min_nodes",
    "restart_pause_s",
    "probe_s",
    "silence_s",
    "transport",
}


def render(job: Job) -> LaunchPlan:
    """Return a file with the complete launch description, and the local command that reads it."""
    cluster = job.cluster
    hosts = job.hosts or (Host("localhost", job.ranks_per_node),)
    if cluster.min_nodes is not None and cluster.min_nodes > len(hosts):
        raise ConfigError(
            f"min_nodes must be at most the number of hosts, {len(hosts)}, got {cluster.min_nodes}",
            where="min_nodes",
            fix=f"set min_nodes to {len(hosts)} or less",
        )
    if cluster.min_nodes is not None and not cluster.max_restarts:
        raise ConfigError(
            "min_nodes has no effect without restarts",
            where="min_nodes",
            fix="add --max-restarts 10, for example, or leave out --min-nodes",
        )
    content = {
        "hosts": [f"{host.name} slots={host.slots}" for host in hosts],
        "interface": cluster.interface,
        "master_address": cluster.master_address,
        "master_port": cluster.master_port if "master_port" in cluster.model_fields_set else None,
        "python": job.python,
        "workdir": str(job.workdir),
        "ssh": list(cluster.ssh),
        "transport": cluster.transport,
        "environment": {variable.name: variable.value for variable in job.variables},
        "silence_s": cluster.silence_s,
        "max_restarts": cluster.max_restarts,
        "min_hosts": cluster.min_nodes,
        "pause_s": cluster.restart_pause_s,
        "probe_s": cluster.probe_s,
        "command": list(job.rank_argv),
        "run": {**job.values, "output_dir": str(job.output_dir)},
    }
    text = json_text(content)
    return LaunchPlan(
        launcher="elastic",
        folder=job.folder,
        files=(LaunchFile(FILE, text, job.mode),),
        commands=(Command((sys.executable, "-m", "m3i_scale.elastic.launch", str(job.folder / FILE))),),
        workdir=job.workdir,
        needs=() if not job.hosts else (SRUN,) if cluster.transport == "srun" else (SSH,),
    )


def read_launch(path: Path) -> Launch:
    """Read a launch file that `render` wrote. To run it, the caller must hold the lock of its output folder."""
    try:
        content: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the launch file: {error}",
            where=str(path),
            fix="start the run again with `m3i-scale launch`, which writes this file",
        ) from None
    run = RunConfig.model_validate(upgrade_config(content["run"]))
    parse_recipe(run.recipe, where=str(path), imports=True)  # the launch uses its contrastive batch size
    site = RemoteShell(
        python=content["python"],
        workdir=content["workdir"],
        output_dir=str(run.output_dir),
        ssh=tuple(content["ssh"]),
        transport=content["transport"],
        environment=content["environment"],
        silence_s=content["silence_s"],
    )
    hosts = [line.split(" slots=") for line in content["hosts"]]
    work = Work(
        run,
        tuple(content["command"]),
        tuple(Host(name, int(slots)) for name, slots in hosts),
        site,
        content["master_address"],
        content["interface"],
        content["master_port"],
    )
    policy = Policy(*(content[key] for key in ("max_restarts", "min_hosts", "pause_s", "probe_s")))
    return Launch(work, policy, lambda text: print_line(text, stderr=True))


def main() -> None:
    """Run `python -m m3i_scale.elastic.launch FILE`."""
    try:
        launch = read_launch(Path(sys.argv[1]))
        with launch_lock(launch.work.run.output_dir):
            sys.exit(launch.run())
    except UserError as error:
        print_line(f"error: {error}", stderr=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
