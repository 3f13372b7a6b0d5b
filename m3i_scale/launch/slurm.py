"""Write a script for `sbatch`: one task per rank. A job is requeued if its ranks were stopped on request and saved."""

from __future__ import annotations

import re
import shlex

from m3i_scale.errors import EXIT_PREEMPTED, ConfigError
from m3i_scale.host.output_dir import RANK_RECORDS
from m3i_scale.host.rank_record import RECORD_FILES
from m3i_scale.launch import OF_SCHEDULERS, PUBLIC, Command, Executable, LaunchFile, LaunchPlan
from m3i_scale.launch.description import SLURM_EXPORTS
from m3i_scale.launch.job import Job
from m3i_scale.launch.shell import export_lines, quoted, wrapped

HONORS = OF_SCHEDULERS | {
    "master_port",
    "workdir",
    "partition",
    "account",
    "time_limit",
    "requeue",
    "sbatch",
    "container_runtime",
    "container_mounts",
}
SCRIPT = "slurm.sbatch"
EXIT_REASON = "m3i_scale.launch.exit_reason"
"""Module that reports the failure reason of a run, once for all ranks."""
NOTICE_S = 120
"""Ranks are signaled this many seconds before the time limit."""
ALONE_S = 30
"""Ranks that still run this long after one of them has exited are ended, on all nodes. Not immediately
(--kill-on-bad-exit): the script uses the common exit code of the ranks, 75, or 2 for a user error. Ranks ended by Slurm
have another code."""
# Rank variables of the trainer. Set in a separate shell, because each task has other values. `exec`, because Slurm
# signals every process of a step, and a remaining shell would die of it together with its task.
_AS_RANK = (
    "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
    'LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$@"'
)

_SIGNALS = (
    "# USR2 goes to the steps of the job, so to the ranks, and not to this shell, which waits; --signal=B:USR2 would",
    "# do the opposite. SIGTERM (scancel, scontrol requeue, a lost node, the end of the time) goes to both, and must",
    "# end this shell: with a trap for it, a job that was cancelled would go back into the queue.",
)


def render(job: Job) -> LaunchPlan:
    """Return a batch script, and the command that submits it."""
    script = "\n".join([*_header(job), "", *_body(job), ""])
    path = job.folder / SCRIPT
    return LaunchPlan(
        launcher="slurm",
        folder=job.folder,
        files=(LaunchFile(SCRIPT, script, 0o755 if job.mode == PUBLIC else 0o700),),
        commands=(Command(("sbatch", str(path))),),  # --export passes secrets from the environment by name
        workdir=job.workdir,
        waits=False,
        needs=(Executable("sbatch", "apt-get install slurm-client"),),
    )


def _header(job: Job) -> list[str]:
    cluster = job.cluster
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--gpus-per-node={job.gpus_per_node}" if job.gpus_per_node else None,
        f"--cpus-per-task={cluster.cpus_per_rank}" if cluster.cpus_per_rank else None,
        f"--partition={cluster.partition}" if cluster.partition else None,
        f"--account={cluster.account}" if cluster.account else None,
        f"--time={cluster.time_limit}" if cluster.time_limit else None,
        f"--signal=USR2@{NOTICE_S}",
        "--requeue" if cluster.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={str(job.folder).replace('%', '%%')}/slurm-%j.log",
        f"--chdir={job.workdir}",
        f"--export={','.join([*SLURM_EXPORTS, *(variable.name for variable in job.secret)])}",
    ]
    lines = [f"#SBATCH {_option(option)}" for option in options if option is not None]
    for line in cluster.sbatch:
        if not line.startswith("--"):
            raise ConfigError(
                f"an option of sbatch must start with '--', got {line!r}",
                where="sbatch",
                fix="use e.g. --sbatch=--qos=high",
            )
        lines.append(f"#SBATCH {line}")  # of two that differ, sbatch uses the later one
    return ["#!/bin/bash", *lines]


def _option(option: str) -> str:
    """Quote an option for sbatch, which splits lines itself: a backslash makes the next character literal."""
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", option)


def _body(job: Job) -> list[str]:
    cluster = job.cluster
    lines = ["set -u", 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
    if cluster.interface is None:
        lines.append("export MASTER_ADDR=$head")
    else:  # this script runs on the master node
        lines += [
            f"MASTER_ADDR=$(ip -4 -oneline address show dev {shlex.quote(cluster.interface)} |",
            '  awk \'{ sub("/.*", "", $4); print $4; exit }\')',
            f'[ -n "$MASTER_ADDR" ] || {{ echo "$head has no interface {cluster.interface}" >&2; exit 2; }}',
            "export MASTER_ADDR",
        ]
    lines += [f"export MASTER_PORT={cluster.master_port}"]
    lines += export_lines(job.plain)
    records, folder = shlex.quote(str(job.output_dir / RANK_RECORDS)), shlex.quote(str(job.output_dir))
    files = " ".join(f"{records}/{pattern}" for pattern in RECORD_FILES)
    lines += ["", f"rm -f {files}  # of ranks of an earlier attempt"]
    lines += ["", *_SIGNALS, _srun(job), "code=$?"]
    if cluster.container_image is None:
        words = f'{shlex.quote(job.python)} -m {EXIT_REASON} {folder} "$code" "$SLURM_NTASKS"'
        lines.append(f'[ "$code" -eq {EXIT_PREEMPTED} ] || {words}')
    if cluster.requeue:
        lines += [
            "",
            "# The ranks were stopped and have saved a checkpoint. A canceled job is not requeued.",
            f'if [ "$code" -eq {EXIT_PREEMPTED} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
            '  echo "job $SLURM_JOB_ID was stopped after saving a checkpoint: requeuing it"',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return [*lines, 'exit "$code"']


def _srun(job: Job) -> str:
    cluster = job.cluster
    words = ["srun", "--kill-on-bad-exit=0", f"--wait={ALONE_S}", "--export=ALL"]
    if cluster.cpus_per_rank:
        words.append(f"--cpus-per-task={cluster.cpus_per_rank}")  # Slurm 22.05 to 23.11 do not inherit it from sbatch
    mounts = [str(job.workdir), str(job.output_dir), *cluster.container_mounts]
    inside: list[str] = []
    if cluster.container_image is not None and cluster.container_runtime == "pyxis":
        words += quoted(
            [
                f"--container-image={cluster.container_image}",
                f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}",
                f"--container-workdir={job.workdir}",
                "--no-container-mount-home",
            ]
        )
    elif cluster.container_image is not None:
        inside = ["apptainer", "exec", *(["--nv"] if job.gpus_per_node else [])]
        inside += [*(f"--bind={path}" for path in mounts), f"--pwd={job.workdir}", cluster.container_image]
    words += ["bash", "-c", f"'{_AS_RANK}'", "rank"]
    return wrapped([*words, *quoted([*inside, job.python, "-u", "-m", *job.train])])
