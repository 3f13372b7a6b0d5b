"""Run `m3i-scale launch`: one description for any launcher.

To add a launcher, create a module with `HONORS` and `render`, and add its name to `LAUNCHERS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Protocol, cast

import typer

from m3i_scale.errors import EXIT_PREEMPTED, ConfigError, UserError, did_you_mean
from m3i_scale.launch.description import Cluster, takes_cluster, without_secret_variables
from m3i_scale.options import RunFile, choices
from m3i_scale.output import print_json, print_line, release_stdout
from m3i_scale.text import yaml_string

if TYPE_CHECKING:  # not imported at runtime, to keep --help fast
    from m3i_scale.config import RunConfig
    from m3i_scale.launch import LaunchPlan
    from m3i_scale.launch.job import Job

_NAME_THEM = "name the machines: --hostfile FILE, with a line `name slots=N` for every one"
_ALLOCATED = "leave it out: the machines are those of the allocation, of which --include takes some"
LAUNCHERS = ("local", "deepspeed", "slurm", "torchrun", "kubeflow", "elastic")
READY_FILES = {"mpirun": "launchers/mpirun.sh", "accelerate": "launchers/accelerate.sh, with accelerate.yaml"}
"""Launchers that users start themselves, with a file from a checkout."""


class Launcher(Protocol):
    """Interface of a launcher's module."""

    HONORS: frozenset[str]
    """Supported fields of `Cluster`."""

    def render(self, job: Job) -> LaunchPlan:
        """Return files and commands."""


def find_launcher(name: str) -> Launcher:
    """Return the module of a launcher."""
    if name in READY_FILES:
        raise ConfigError(
            f"`launch` does not start {name}",
            where="--with",
            fix=f"edit and start {READY_FILES[name]} (docs/guides/multi-gpu.md), or launch with deepspeed or torchrun",
        )
    if name not in LAUNCHERS:
        raise ConfigError(f"unknown launcher '{name}'", where="--with", fix=did_you_mean(name, LAUNCHERS))
    module = {"elastic": "elastic.launch", "torchrun": "launch.torchrun_agent"}.get(name, f"launch.{name}")
    return cast(Launcher, import_module(f"m3i_scale.{module}"))


def render(name: str, job: Job) -> LaunchPlan:
    """Return the files and commands of one launcher."""
    launcher = find_launcher(name)
    for field in sorted(job.cluster.model_fields_set - launcher.HONORS):
        others = [other for other in LAUNCHERS if field in find_launcher(other).HONORS]
        fix = f"leave it out, or launch with {' or '.join(others)}"
        if field == "nodes":
            fix = _ALLOCATED if job.cluster.transport == "srun" else _NAME_THEM
        raise ConfigError(
            f"`{field}` has no effect with {name}", where=f"{field}: {getattr(job.cluster, field)}", fix=fix
        )
    return launcher.render(job)


@takes_cluster(Cluster.model_fields)
def launch(
    run: RunFile,
    launcher: Annotated[str, typer.Option("--with", **choices(*LAUNCHERS), help="Launcher.")],
    cluster: Cluster,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the run as section.key=value.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the files and commands.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")] = False,
) -> None:
    """Start a run with a launcher, on one node or many, and exit with its exit code.

    Launch files are written to `output_dir/launch`.
    """
    from m3i_scale.elastic.worlds import check_fit
    from m3i_scale.tasks.packed_folders import pack_folders

    config, job = read_job(run, overrides or [], cluster)
    if dry_run:
        plan = render(launcher, job.without_secrets())
        print_json(plan.document()) if as_json else typer.echo(plan.text())
        try:
            check_fit(config, job, launcher)
        except UserError as error:
            print_line(f"the run would not start: {error}", stderr=True)
            raise typer.Exit(error.exit_code) from None
        return
    if as_json:
        raise ConfigError(
            "--json has no effect without --dry-run", where="--json", fix="add --dry-run, or leave it out"
        )
    release_stdout()
    render(launcher, job)  # its errors come before the packing
    check_fit(config, job, launcher)
    if cluster.workdir is not None and not config.output_dir.is_absolute():  # where the ranks look for it
        overrides = [*(overrides or []), f"output_dir={yaml_string(str(job.output_dir))}"]
    ranks = None if launcher == "elastic" else job.world_size  # hosts may join and leave
    config, job = read_job(run, pack_folders(run, overrides, ranks), cluster)
    plan = render(launcher, job)
    environment = without_secret_variables(os.environ, job.variables)
    raise typer.Exit(run_plan(plan, render(launcher, job.without_secrets()), job, environment))


def run_plan(plan: LaunchPlan, redacted: LaunchPlan, job: Job, environment: Mapping[str, str]) -> int:
    """Run a plan and return its exit code; print the cause of a failure at the end."""
    from m3i_scale.checkpoint.layout import stopped_words
    from m3i_scale.host.output_dir import launch_lock
    from m3i_scale.host.rank_record import forget_records
    from m3i_scale.launch.execute import check_needs, execute, write_files
    from m3i_scale.launch.exit_reason import conclude

    if not plan.waits:
        with launch_lock(job.output_dir):
            check_needs(plan)
            write_files(plan)
        return execute(plan, redacted, environment).code
    with launch_lock(job.output_dir):  # first: files of a live run must not change
        if plan.launcher == "elastic":  # in this process: every agent notices its end
            from m3i_scale.elastic.launch import FILE, read_launch

            write_files(plan)
            return read_launch(plan.folder / FILE).run()
        check_needs(plan)
        if job.hosts:
            from m3i_scale.elastic.link import check_hosts

            check_hosts(job)
        write_files(plan)
        forget_records(job.output_dir)
        result = execute(plan, redacted, environment)
        conclusion = conclude(job.output_dir, result, redacted, job.world_size)
    if conclusion is not None:
        print_line(conclusion, stderr=True)
    if result.code == EXIT_PREEMPTED:
        print_line(stopped_words(job.output_dir / "checkpoints"), stderr=True)
    return result.code


def read_job(run: str, overrides: list[str], cluster: Cluster) -> tuple[RunConfig, Job]:
    """Read a run and a description, validated as far as possible without data."""
    from m3i_scale.config import run_values
    from m3i_scale.launch.job import make_job
    from m3i_scale.objective.recipe import load_run_and_recipe

    config, _ = load_run_and_recipe(run, overrides)

    return config, make_job(config, run, tuple(overrides), cluster, run_values(run, overrides), os.environ)
