"""Run `m3i-scale train`: in this process, or with one process per GPU of this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from m3i_scale.errors import EXIT_PREEMPTED, UserError
from m3i_scale.launch_command import render, run_plan
from m3i_scale.options import Overrides, RunFile
from m3i_scale.rank_variables import adopt_rank_variables, under_launcher, without_thread_limits

if TYPE_CHECKING:  # not imported at runtime, to keep --help fast
    from m3i_scale.config import RunConfig

_COMMON = (
    "data.datasets.NAME.path",
    "output_dir",
    "backbone.preset",
    "backbone.from_pretrained",
    "optim.steps",
    "optim.batch_size",
    "optim.micro_batch_size",
    "optim.lr",
    "checkpoint.every_steps",
    "deepspeed",
)
"""Fields in the help text. `m3i-scale config` lists all of them."""


class TrainCommand(TyperCommand):
    """Command whose help ends with the most common fields of a config file."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help text. The fields are only read here, because it takes time."""
        super().format_help(ctx, formatter)
        from m3i_scale.config.fields import describe_section

        table = Table.grid(padding=(0, 2))
        for key in _COMMON:
            field = describe_section(key, {})[0].fields[0]
            meaning = field.meaning.partition(". ")[0].rstrip(".")
            table.add_row(Text(key, style="bold cyan", no_wrap=True), Text(meaning))
        title = "Common settings (m3i-scale config lists all)"
        Console().print(Panel(table, title=title, title_align="left", border_style="dim"))


def train(
    run: RunFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of GPUs of this machine. Default: all visible GPUs.")
    ] = None,
) -> None:
    """Train, or resume from the latest valid checkpoint, with one process per GPU.

    Under a launcher (torchrun, deepspeed, accelerate, mpirun, `m3i-scale launch`), this process is one of its ranks.
    """
    if code := train_run(run, overrides or [], gpus):
        raise typer.Exit(code)


def train_run(run: str, overrides: list[str], gpus: int | None = None) -> int:
    """Train in this process, or in one process per GPU; return the exit code.

    Args:
        run: path of a config file, or the name of a built-in one.
        gpus: number of GPUs of this machine. Default: all visible ones. Must be None under a launcher.
    """
    from m3i_scale.objective.recipe import load_run_and_recipe

    variables = dict(os.environ)
    adopt_rank_variables(variables)
    try:
        load_run_and_recipe(run, overrides)  # before DeepSpeed is imported and builds anything
    except UserError:
        from m3i_scale.run.check import check_run
        from m3i_scale.tasks.packed_folders import RunFolders

        world, folders = variables.get("WORLD_SIZE", ""), RunFolders(run, overrides)
        ranks = int(world) or None if world.isdecimal() else None
        check_run(run, folders.overrides, ranks, folders.facts)  # also reports all other errors
        raise
    from m3i_scale.launch.job import gpus_here
    from m3i_scale.launch.local import count_processes
    from m3i_scale.tasks.packed_folders import pack_folders

    launched = under_launcher(variables)
    processes = count_processes(gpus, 0 if launched else gpus_here(), launched=launched)
    overrides = pack_folders(run, overrides, processes)
    config, _ = load_run_and_recipe(run, overrides)
    if processes > 1:
        return train_in_processes(config, run, overrides, processes)
    from m3i_scale.evaluation.online import make_online_evaluation
    from m3i_scale.evaluation.pictures.hook import make_pictures
    from m3i_scale.run.run_warnings import command_warnings
    from m3i_scale.run.train import start

    status = start(config, command_warnings(config, run, overrides), [make_online_evaluation, make_pictures])
    return EXIT_PREEMPTED if status == "preempted" else 0


def train_in_processes(config: RunConfig, run: str, overrides: list[str], processes: int) -> int:
    """Train in several processes on this machine, through the local launcher; return the exit code."""
    from m3i_scale.config import run_values
    from m3i_scale.launch.description import Cluster
    from m3i_scale.launch.job import make_job
    from m3i_scale.launch.local import free_port
    from m3i_scale.run.check import check_run

    check_run(run, overrides, processes)  # here, so that an error is printed once
    cluster = Cluster(ranks_per_node=processes, master_port=free_port())
    job = make_job(config, run, tuple(overrides), cluster, run_values(run, overrides), os.environ)
    redacted = render("local", job.without_secrets())
    # These processes stand in for this one, so they get its complete environment.
    environment = without_thread_limits(os.environ)
    try:
        return run_plan(render("local", job), redacted, job, environment)
    except UserError as error:
        if error.where == "--master-port":  # taken since `free_port`; `train` has no such option
            error.where, error.fix = None, "rerun the command, which takes another port"
        raise
