"""`m3i-scale launch`: one description, any launcher."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3i_scale.errors import EXIT_PREEMPTED, ConfigError, UserError
from m3i_scale.launch.launchers import LAUNCHERS, render
from m3i_scale.output import print_json, release_stdout

if TYPE_CHECKING:  # --help has no time to import them
    from m3i_scale.config import RunConfig
    from m3i_scale.launch.description import Cluster
    from m3i_scale.launch.job import Job
    from m3i_scale.launch.plan import LaunchPlan

_ANY_IMAGE = "registry.example.org/m3i-scale:latest"


def launch(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="A run file, or the name of a built-in one.")],
    launcher: Annotated[str, typer.Option("--with", help=f"{', '.join(LAUNCHERS)}.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value … for `train`.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="YAML with any of the fields of docs/launching.md.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines, where no hosts are named.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks on each of them.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="`name slots=N`, a line a machine.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only these hosts; once for each.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="All hosts but these.")] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface that ranks talk over.")] = None,
    master_address: Annotated[str | None, typer.Option(help="Of the head, as all machines reach it.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Where rank 0 waits for the others.")] = None,
    environment: Annotated[
        list[str] | None, typer.Option("--env", help="NAME or NAME=value that travels to the ranks.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="The interpreter on all machines.")] = None,
    workdir: Annotated[str | None, typer.Option(help="The working directory on all machines.")] = None,
    runner: Annotated[str | None, typer.Option(help="pdsh or openmpi: how `deepspeed` reaches hosts.")] = None,
    max_restarts: Annotated[int | None, typer.Option(help="elastic: starts after a failure. Default: 0.")] = None,
    min_nodes: Annotated[int | None, typer.Option(help="elastic: go on with so many hosts. Default: all.")] = None,
    min_compared: Annotated[
        int | None, typer.Option(help="elastic: go on where losses compare so many samples at a time. Default: any.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="elastic: of a rank, for larger micro-batches. Default: the host says.")
    ] = None,
    restart_pause_s: Annotated[float | None, typer.Option(help="elastic: before a restart, then doubled.")] = None,
    probe_s: Annotated[float | None, typer.Option(help="elastic: how often lost hosts are asked.")] = None,
    silence_s: Annotated[float | None, typer.Option(help="elastic: a host that is silent so long is lost.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="To reserve; 0 where ranks compute on CPUs.")] = None,
    partition: Annotated[str | None, typer.Option(help="Of Slurm.")] = None,
    account: Annotated[str | None, typer.Option(help="Of Slurm.")] = None,
    time_limit: Annotated[str | None, typer.Option(help=r"Of Slurm: \[days-]HH:MM:SS.")] = None,
    requeue: Annotated[bool | None, typer.Option(help="Slurm starts a preempted job again.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="A further option of sbatch: --sbatch=--qos=high.")] = None,
    data_claim: Annotated[str | None, typer.Option(help="Of Kubernetes: a volume claim with shards, at /data.")] = None,
    container_image: Annotated[str | None, typer.Option(help="What ranks run in.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only print what would be written and run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print it as one JSON document.")] = False,
) -> None:
    """Start a run with any launcher: write what it needs into `output_dir/launch`, run it, end with its exit code."""
    from m3i_scale.launch.description import Cluster, read_cluster
    from m3i_scale.launch.fit import check_fit

    known = Cluster.model_fields
    options = {key: value for key, value in context.params.items() if key in known}
    config, job = read_job(run, overrides or [], read_cluster(cluster, options))
    if dry_run:
        job = _with_image(job, launcher)
        plan = render(launcher, job.shown())
        print_json(plan.document()) if as_json else typer.echo(plan.text())
        try:
            check_fit(config, job, launcher)
        except UserError as error:
            typer.echo(f"the ranks would refuse this: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        return
    if as_json:
        raise ConfigError(
            "--json has no effect without --dry-run", where="--json", fix="add --dry-run, or leave it out"
        )
    release_stdout()
    plan = render(launcher, job)
    check_fit(config, job, launcher)
    raise typer.Exit(_run(plan, render(launcher, job.shown()), job))


def _with_image(job: Job, launcher: str) -> Job:
    """A dry run shows a manifest also before there is an image."""
    if launcher != "kubeflow" or job.cluster.container_image is not None:
        return job
    typer.echo(f"no --container-image: {_ANY_IMAGE} stands for it", err=True)
    return replace(job, cluster=job.cluster.model_copy(update={"container_image": _ANY_IMAGE}))


def _run(plan: LaunchPlan, shown: LaunchPlan, job: Job) -> int:
    """Run a plan; where a run has failed, say what it died of at the end."""
    from m3i_scale.launch.environment import without_secrets
    from m3i_scale.launch.execute import check_needs, execute, write_files
    from m3i_scale.launch.failures import forget_records
    from m3i_scale.launch.lock import launch_lock
    from m3i_scale.launch.logs import show
    from m3i_scale.launch.verdict import conclude
    from m3i_scale.scale.checkpoint.layout import stopped_words

    environment = without_secrets(os.environ, job.variables)
    if not plan.waits:
        with launch_lock(job.output_dir):
            check_needs(plan)
            write_files(plan)
        return execute(plan, shown, environment).code
    with launch_lock(job.output_dir):  # first: a run that lives there must not find other files
        if plan.launcher == "elastic":  # in this process, whose end every agent notices
            from m3i_scale.launch.elastic import FILE, read_launch

            write_files(plan)
            return read_launch(plan.folder / FILE).run()
        check_needs(plan)
        if job.hosts:
            from m3i_scale.launch.link import check_hosts

            check_hosts(job)
        write_files(plan)
        forget_records(job.output_dir)
        ending = execute(plan, shown, environment)
        told = conclude(job.output_dir, ending, shown, job.world_size)
    if told is not None:
        show(f"{told}\n")
    if ending.code == EXIT_PREEMPTED:
        show(f"{stopped_words(job.output_dir / 'checkpoints')}\n")
    return ending.code


def read_job(run: str, overrides: list[str], cluster: Cluster) -> tuple[RunConfig, Job]:
    """A run and a description, checked as far as it can be without data.

    Raises:
        ConfigError: what does not hold together.
    """
    from m3i_scale.config import run_values
    from m3i_scale.launch.job import make_job
    from m3i_scale.objective.recipe import load_run_and_recipe

    config, _ = load_run_and_recipe(run, overrides)

    return config, make_job(config, run, tuple(overrides), cluster, run_values(run, overrides), os.environ)
