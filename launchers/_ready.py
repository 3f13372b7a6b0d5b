"""Write those ready-to-edit files of this folder that `m3i-scale launch` renders, for one example run.

    python launchers/_ready.py

The example: a checkout at /data/m3i-scale, an environment at /data/venv, two machines of eight GPUs.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from m3i_scale.launch import ENDS, LaunchPlan
from m3i_scale.launch.description import Cluster
from m3i_scale.launch.shell import quoted, wrapped
from m3i_scale.launch_command import read_job, render

HERE = Path(__file__).resolve().parent
FOLDER = "/data/m3i-scale/launchers"
OVERRIDES = ["data.datasets.main.path=/data/shards/train"]
COMMON = {"environment": ("OMP_NUM_THREADS=8",), "python": "/data/venv/bin/python"}
HOSTS = {"hosts": ("node1 slots=8", "node2 slots=8"), "interface": "eth0", "master_address": "10.0.0.1"}
COUNTED = {"nodes": 2, "ranks_per_node": 8}
IN_PODS = {"container_image": "registry.example.org/m3i-scale:latest", "data_claim": "shards"}
AT_CHECKOUT = {"workdir": "/data/m3i-scale"}


def plan(launcher: str, output_dir: str = "/data/runs/first", **fields: object) -> LaunchPlan:
    """The example, with one launcher."""
    cluster = Cluster.model_validate({**COMMON, **fields})
    return render(launcher, read_job("m3i", [*OVERRIDES, f"output_dir={output_dir}"], cluster)[1])


def script(plan: LaunchPlan) -> str:
    """A plan's commands as a shell script."""
    many = len(plan.commands) > 1
    commands = []
    for command in plan.commands:
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(command.environment.items())]
        commands.append(wrapped([*words, *quoted(command.argv), *(["&"] if many else [])]))
    ends = ENDS if many else ()
    return "\n".join(["#!/bin/bash", "set -e", f"cd {plan.workdir}", *commands, *ends]) + "\n"


def ready_files() -> dict[str, str]:
    """Text by path in this folder."""
    plans = {
        "local": plan("local", ranks_per_node=2, **AT_CHECKOUT),
        "deepspeed": plan("deepspeed", **HOSTS, **AT_CHECKOUT),
        "slurm": plan("slurm", **COUNTED, time_limit="24:00:00", **AT_CHECKOUT),
        "torchrun": plan("torchrun", **HOSTS, **AT_CHECKOUT),
        "elastic": plan("elastic", **HOSTS, max_restarts=20, min_nodes=1, **AT_CHECKOUT),
        "kubeflow": plan("kubeflow", "/output/first", **COUNTED, **IN_PODS, python="/usr/bin/python3"),
    }
    files = {name: {file.name: file.text for file in plan.files} for name, plan in plans.items()}
    found = {
        "local.sh": script(plans["local"]),
        "deepspeed/hostfile": files["deepspeed"]["hostfile"],
        "deepspeed/deepspeed_env": files["deepspeed"]["deepspeed_env"],
        "deepspeed/run.sh": script(plans["deepspeed"]),
        "slurm.sbatch": files["slurm"]["slurm.sbatch"],
        "torchrun.sh": files["torchrun"]["torchrun.sh"],
        "elastic.json": files["elastic"]["elastic.json"],
        "kubeflow.yaml": files["kubeflow"]["kubeflow.yaml"],
    }
    own_folder = {"deepspeed/run.sh": "deepspeed"}  # where their hostfile lies
    rendered = str(plans["slurm"].folder)
    return {
        path: text.replace(rendered, "/".join(filter(None, [FOLDER, own_folder.get(path)])))
        for path, text in found.items()
    }


def main() -> None:
    """Write them."""
    for path, text in ready_files().items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
