"""`accelerate launch`, once on every host. It only starts the ranks: DeepSpeed is set up by the run file."""

from __future__ import annotations

import shlex

import yaml

from m3i_scale.launch import ssh
from m3i_scale.launch.environment import Variable
from m3i_scale.launch.job import OVER_HOSTS, Job
from m3i_scale.launch.plan import LaunchFile, LaunchPlan
from m3i_scale.launch.processes import PARENT, TIED
from m3i_scale.launch.shell import export_lines, quoted, wrapped

HONOURS = OVER_HOSTS
CONFIG = "accelerate.yaml"
SCRIPT = "accelerate.sh"


def render(job: Job) -> LaunchPlan:
    """accelerate's own configuration, a script for all hosts, and its start on every one, over ssh."""
    hosts = job.hosts
    script = job.folder / SCRIPT
    commands = [ssh.script_on_host(job, host.name, script, place) for place, host in enumerate(hosts)]
    return LaunchPlan(
        launcher="accelerate",
        folder=job.folder,
        files=(
            LaunchFile(CONFIG, _config(job)),
            LaunchFile(SCRIPT, _script(job), job.mode),
        ),
        commands=tuple(commands) or (ssh.script_here(script, 0),),
        workdir=job.workdir,
        needs=ssh.needs(job),
        stops=ssh.stop_commands(job),
        port=None if hosts else job.cluster.master_port,
    )


def _config(job: Job) -> str:
    values = {
        "compute_environment": "LOCAL_MACHINE",
        # Not DEEPSPEED: accelerate would want a configuration of its own, which no rank reads. On hosts without a GPU
        # this type too starts plain processes.
        "distributed_type": "MULTI_GPU",
        "num_machines": job.nodes,
        "num_processes": job.nodes * job.ranks_per_node,
        "main_process_ip": job.head_address(),
        "main_process_port": job.cluster.master_port,
        "same_network": True,
        "main_training_function": "main",
        "mixed_precision": "no",
        "use_cpu": False,
        "debug": False,
    }
    return yaml.safe_dump(values, sort_keys=False)


def _script(job: Job) -> str:
    words = [job.python, "-m", "accelerate.commands.launch", f"--config_file={job.folder / CONFIG}"]
    lines = [
        "#!/bin/bash",
        f"# On every host: bash {SCRIPT} PLACE, which counts the hosts from 0, the head.",
        "set -eu",
        f"cd {shlex.quote(str(job.workdir))}",
        *export_lines([*job.variables, Variable(TIED, PARENT)]),
        wrapped(["exec", *quoted(words), '--machine_rank="$1"', "--module", *quoted(job.train)]),
    ]
    return "\n".join(lines) + "\n"
