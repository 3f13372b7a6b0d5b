"""Command line: one verb per command, without logic."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from m3i_scale import __version__
from m3i_scale.checkpoint.commands import checkpoint_app
from m3i_scale.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, ErrorCollector, UserError
from m3i_scale.evaluate.compare_command import compare
from m3i_scale.launch import OVER_HOSTS
from m3i_scale.launch.description import Cluster
from m3i_scale.launch_command import launch, takes_cluster
from m3i_scale.options import AsJson, Imports, Overrides, RunFile, reading_bar, writes_to
from m3i_scale.output import leave_out_accelerator_warning, print_json, print_line, reserve_stdout, wide_console
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.report.commands import report, watch
from m3i_scale.shards.commands import shards_app
from m3i_scale.tasks.finetune_command import finetune_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="M3I pre-training of vision backbones with DeepSpeed. Exit codes: 0 done, 2 a mistake that the message "
    "explains, 75 stopped by a signal after saving (start again to go on).",
)
_ERRORS = wide_console(stderr=True, soft_wrap=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"m3i-scale {__version__}")
        raise typer.Exit


def _print_result(as_json: bool, document: Any, table: Callable[[], RenderableType]) -> None:
    if as_json:
        print_json(document)
    else:
        wide_console().print(table())


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Declare the options that do not belong to a command."""


recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback(epilog="Example: m3i-scale recipes --json")
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """Print the paper's table, read from the built-in recipes: what predicts what, and how."""
    from m3i_scale.report.recipe_table import RecipeTable, built_in_rows

    context.obj = as_json
    if context.invoked_subcommand is not None:
        return
    rows = built_in_rows()
    _print_result(as_json, rows, lambda: RecipeTable(rows))


@recipes_app.command("show", epilog="Example: m3i-scale recipes show m3i --output m3i.md")
def show_recipe(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name of a built-in recipe, or a run file.")],
    output: Annotated[Path | None, typer.Option(callback=writes_to, help="Write a flowchart: FILE.mmd or .md")] = None,
    as_json: AsJson = False,
) -> None:
    """Print one recipe: its inputs and targets; with --output, write a Mermaid flowchart, too."""
    from m3i_scale.objective.recipe import load_run_and_recipe
    from m3i_scale.report.recipe_graph import write_mermaid
    from m3i_scale.report.recipe_table import RecipeTable

    _, recipe = load_run_and_recipe(name)
    row, as_json = recipe.summary(), as_json or context.obj
    if output is not None:
        write_mermaid(recipe, output)
    _print_result(as_json, row, lambda: RecipeTable([row]))
    if output is not None and not as_json:
        print_line(f"flowchart: {output}")


@app.command(epilog="Example: m3i-scale backbones vit-g/14 internimage-h")
def backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Only these presets.")] = None, as_json: AsJson = False
) -> None:
    """Print the sizes of `backbone.preset`: parameters, multiply-adds, tokens, input size."""
    from m3i_scale.backbones import describe_presets

    rows = describe_presets(names or [])
    _print_result(as_json, rows, lambda: _backbone_table(rows))


def _backbone_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        *("preset", "input", "token", "mask", "tokens", "width", "layers", "parameters", "GMAC"),
        box=None,
        caption="input, token and mask cell: side in pixels; parameters: millions",
    )
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "preset" else "right"
    for row in rows:
        sides = [str(row[key]) for key in ("image_size", "patch_size", "mask_cell", "tokens", "width", "layers")]
        table.add_row(row["name"], *sides, f"{row['parameters'] / 1e6:,.1f}", f"{row['gmac']:.1f}")
    return table


@app.command(
    epilog="Example: deepspeed --no_local_rank --num_gpus 8 --module m3i_scale train m3i "
    "data.datasets.main.path=/data/shards/train output_dir=/data/runs/first"
)
def train(
    run: RunFile,
    overrides: Overrides = None,
) -> None:
    """Train, or resume from the latest valid checkpoint. Start it with any launcher; alone it runs on one rank."""
    from m3i_scale.objective.recipe import load_run_and_recipe

    try:
        config, _ = load_run_and_recipe(run, overrides)  # before DeepSpeed is imported and builds anything
    except UserError:
        leave_out_accelerator_warning()
        from m3i_scale.run.check import check_run

        adopt_rank_variables(os.environ)
        world = os.environ.get("WORLD_SIZE", "")
        ranks = int(world) if world.isdecimal() else 0
        check_run(run, overrides, ranks or None)  # which also reports all other errors
        raise
    from m3i_scale.evaluate.pictures.hook import make_pictures
    from m3i_scale.run.run_warnings import repeated_overrides
    from m3i_scale.run.train import start

    if start(config, repeated_overrides(overrides or []), [make_pictures]) == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


@app.command(epilog="Example: m3i-scale check run.yaml --ranks 64 --json")
def check(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="That it will have: batch and streams, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """List all errors that `train` finds before it reads samples. Start nothing. Exit code 2 if there are errors.

    A valid setting that is probably a mistake is a warning, and does not change the exit code: a learning rate of SGD,
    a setting without effect, validation on training data. `shards check` reads the samples.
    """
    leave_out_accelerator_warning()
    from m3i_scale.config import load_run
    from m3i_scale.run.check import errors_of, stage_lines
    from m3i_scale.run.run_warnings import warnings_of

    errors = ErrorCollector()
    errors.errors = errors_of(run, overrides, ranks)
    warnings = warnings_of(run, overrides, ask_servers=not errors.errors)
    if as_json:
        print_json({"errors": [error.to_json() for error in errors.errors], "warnings": warnings})
        if errors.errors:
            raise typer.Exit(EXIT_USER_ERROR)
    else:
        console = wide_console(soft_wrap=True)
        for warning in warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        errors.raise_any()
        for line in (*stage_lines(load_run(run, overrides)), "nothing to refuse"):
            console.print(line, markup=False, highlight=False)


@app.command(epilog="Example: m3i-scale config m3i optim.steps=10")
def config(run: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved config: `extends` and overrides applied, defaults filled in, secrets redacted.

    The recipe is printed as written; `check` validates it.
    """
    import yaml

    from m3i_scale.config import load_run
    from m3i_scale.text import redact

    # Recipe classes are not used: they include losses, so they would import torch first.
    values = redact(load_run(run, overrides).model_dump(mode="json"))
    if as_json:
        print_json(values)
    else:
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


@app.command(epilog="Example: m3i-scale stop /data/runs/first")
def stop(
    run: Annotated[str, typer.Argument(help="The output folder of a run, its run file, or a built-in name.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option(help="Until the run has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Stop a run on all nodes: it finishes its step and saves. Rerun the same command to resume."""
    from m3i_scale.run.stop import stop as stop_run

    result = stop_run(run, overrides or [], wait=wait, tell=lambda text: print_line(text, stderr=True))
    print_json(result) if as_json else print_line(result["text"])
    if result["status"] == "ended":
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Example: m3i-scale plan m3i_vit_g14 --nodes 2 --ranks-per-node 8 --memory-gib 80")
def plan(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks per node.")] = 8,
    memory_gib: Annotated[float, typer.Option(min=0.1, help="Memory per device in GiB.")] = 80.0,
    device: Annotated[str, typer.Option("--hardware", help="h100, a100, or cpu: ranks compute on hosts.")] = "h100",
    tflops_per_gpu: Annotated[
        float | None, typer.Option(min=1e-3, help="Peak rate, 10¹² FLOP/s; default: the device's.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the peak rate that is reached; default: h100 0.21, a100 0.39."),
    ] = None,
    intra_gb_s: Annotated[
        float | None, typer.Option(min=1e-3, help="Intra-node bandwidth per GPU in GB/s, one direction.")
    ] = None,
    inter_gb_s: Annotated[
        float | None, typer.Option(min=1e-3, help="Inter-node bandwidth per GPU in GB/s, one direction.")
    ] = None,
    latency_us: Annotated[float | None, typer.Option(min=0.0, help="Latency of a step between nodes.")] = None,
    intra_latency_us: Annotated[float | None, typer.Option(min=0.0, help="Latency of a step within a node.")] = None,
    workspace_gib: Annotated[
        float | None, typer.Option(min=0.0, help="Non-tensor memory per rank in GiB (CUDA context, workspaces).")
    ] = None,
    host_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Host memory per node in GiB; checked only if given.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Training samples; default: steps × batch size.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes; default: the shards'.")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=8, help="Vocabulary size of the text tower; default: read from the shards.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plan memory, communication and time of a run before it starts; needs neither data nor a GPU."""
    from m3i_scale.objective.recipe import load_run_and_recipe

    config, _ = load_run_and_recipe(run, overrides)
    from m3i_scale.plan.planning import machine_of
    from m3i_scale.plan.search import check_feasible, plan_run
    from m3i_scale.report.terminal_tables import plan_table

    where = machine_of(
        device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        memory_gib=memory_gib,
        mfu=mfu,
        tflops=tflops_per_gpu,
        intra_gb_s=intra_gb_s,
        inter_gb_s=inter_gb_s,
        latency_us=latency_us,
        intra_latency_us=intra_latency_us,
        workspace_gib=workspace_gib,
        host_memory_gib=host_memory_gib,
    )
    planned = plan_run(config, where, classes=classes, tokens=vocabulary, samples=samples)
    document = planned.document()
    _print_result(as_json, document, lambda: plan_table(document))
    check_feasible(planned)


@app.command(epilog="Example: m3i-scale doctor m3i --hostfile /data/hostfile --interface eth0")
@takes_cluster(field for field in Cluster.model_fields if field in {*OVER_HOSTS, "transport"})
def doctor(
    cluster: Cluster,
    run: Annotated[str | None, typer.Argument(help="A run file, or the name of a built-in one.")] = None,
    overrides: Overrides = None,
    connect_s: Annotated[float, typer.Option("--connect-timeout", min=1, help="Seconds that ssh may take.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Check whether every host is ready: ssh, versions, code, devices, memory, files, network, shards.

    Exit code 2 if one is not.
    """
    leave_out_accelerator_warning()
    from m3i_scale.elastic.doctor.command import examine
    from m3i_scale.host.findings import errors_in
    from m3i_scale.report.terminal_tables import doctor_table

    findings = examine(run, overrides or [], cluster, connect_s=connect_s, log=_ERRORS.print)
    rows = [finding.to_json() for finding in findings]
    _print_result(as_json, rows, lambda: doctor_table(rows))
    if errors_in(findings):
        raise typer.Exit(EXIT_USER_ERROR)


@app.command(epilog="Example: m3i-scale evaluate /data/export --data /data/shards/val --train-data /data/shards/train")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="An exported folder, or any Hub folder of a vision model.")],
    data: Annotated[str, typer.Option(help="Shards to measure on.")],
    train_data: Annotated[str | None, typer.Option(help="Shards that kNN and the linear probes learn from.")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="knn, linear, dense, classifier, zero_shot, retrieval: all by default; or segmenter or detector."
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="mean, cls or both: the image vector of kNN and linear probe.")] = "mean",
    baseline: Annotated[str, typer.Option(help="pixels: also probe the raw pixels.")] = "none",
    exclude_group: Annotated[list[str] | None, typer.Option(help="Leave out samples of a group.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A zero-shot prompt, {} for the class name; several are averaged.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images in one forward pass (64), of a detector (4); of a segmenter windows (16)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    pictures: Annotated[
        Path | None,
        typer.Option(
            callback=writes_to,
            help="New folder for visualizations: of features (attention, dense PCA …), or predictions of a segmenter "
            "or detector.",
        ),
    ] = None,
    picture_count: Annotated[
        int | None, typer.Option(min=1, help="Number of predictions of a segmenter or detector; default: 20.")
    ] = None,
    picture_samples: Annotated[
        str | None, typer.Option(help="Samples whose features are shown, at most eight: shard.tar/key,shard.tar/key …")
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Measure what frozen features are worth (kNN, linear and dense probe, zero-shot, retrieval). Also measure how
    often a trained head is right (top-1, top-5, mIoU of a segmenter, AP of a detector). Intervals are by concept."""
    from m3i_scale.config.sections import import_given
    from m3i_scale.evaluate.commands import evaluate as run_evaluation
    from m3i_scale.evaluate.report import render
    from m3i_scale.evaluate.towers import TEMPLATES

    import_given(imports)
    with reading_bar() as progress:
        result = run_evaluation(
            model_dir,
            data,
            train_data=train_data,
            measures=tuple(measure) if measure else None,
            pool=cast(Any, pool),
            baseline=cast(Any, baseline),
            exclude_groups=tuple(exclude_group or ()),
            templates=tuple(template or TEMPLATES),
            batch_size=batch_size,
            device=device,
            pictures=pictures,
            picture_count=picture_count,
            picture_samples=picture_samples.split(",") if picture_samples is not None else None,
            progress=progress,
        )
    _print_result(as_json, result, lambda: render(result))


app.command(epilog="Example: m3i-scale compare /data/before /data/after --data /data/domain --general /data/other")(
    compare
)


@app.command(epilog="Example: m3i-scale export /data/runs/first --output /data/export --weights ema")
def export(
    run: Annotated[Path, typer.Argument(help="A run's output_dir (its newest good checkpoint), or one checkpoint.")],
    output: Annotated[Path, typer.Option(callback=writes_to, help="Folder to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="student or ema.")] = "student",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    task: Annotated[
        str, typer.Option(help="features, classification, segmentation, detection, zero_shot or backbone.")
    ] = "features",
    file_format: Annotated[
        str, typer.Option("--format", help="transformers, timm, or onnx: a file for ONNX Runtime, too.")
    ] = "transformers",
    label_set: Annotated[str | None, typer.Option(help="Label set of the exported classifier.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    license_id: Annotated[
        str, typer.Option("--license", help="Licence of the weights, as the Hub spells it, for the model card.")
    ] = "other",
    evaluation: Annotated[
        Path | None, typer.Option(help="What `evaluate --json` printed. Default: evaluation.json of the run.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Publish as this repository of the Hub, private.")] = None,
    public: Annotated[bool, typer.Option(help="Publish for everyone.")] = False,
    dry_run: Annotated[bool, typer.Option(help="With --push: only list files and sizes.")] = False,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face folder for standard classes, verified in a fresh process."""
    leave_out_accelerator_warning()
    from m3i_scale.config.sections import import_given
    from m3i_scale.export.export import export_and_push
    from m3i_scale.export.push import push_summary
    from m3i_scale.export.write import ExportContents

    import_given(imports)
    result = export_and_push(
        run,
        output,
        push_to=push,
        public=public,
        dry_run=dry_run,
        weights=cast(Any, weights),
        dtype=cast(Any, dtype),
        wanted=ExportContents(cast(Any, task), cast(Any, file_format), label_set, max_shard_size),
        overwrite=overwrite,
        license_id=license_id,
        evaluation_file=evaluation,
    )
    if as_json:
        print_json(result)
        return
    table = Table("", "")
    for key, value in result.items():
        if isinstance(value, str | int | float):
            table.add_row(key, str(value))
    for row in push_summary(result["push"]) if push is not None else ():
        table.add_row(*row)
    wide_console().print(table)


app.command(epilog="Example: m3i-scale report /data/runs/first /data/runs/second --output report.html")(report)
app.command(epilog="Example: m3i-scale watch /data/runs/first")(watch)
app.command(epilog="Example: m3i-scale launch m3i --with deepspeed --hostfile /data/hostfile --dry-run")(launch)
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(finetune_app, name="finetune")


def _check_dotted_options(arguments: list[str]) -> None:
    """Reject options with a dot, such as `--optim.lr 1e-3`: settings have no leading dashes here."""
    for item in arguments:
        match = re.fullmatch(r"--?([A-Za-z_]\w*(?:\.\w+)+)(=.*)?", item, re.DOTALL)
        if match:
            raise ConfigError(f"there is no option {item}", fix=f"write {match[1]}{match[2] or '=VALUE'}")


def main() -> None:
    """Run the command line; a UserError is printed, and its exit code is used."""
    # The `deepspeed` launcher adds --local_rank=N; LOCAL_RANK has the same value.
    sys.argv[1:] = [item for item in sys.argv[1:] if not item.startswith("--local_rank=")]
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        _check_dotted_options(sys.argv[1:])
        app()
    except UserError as error:
        adopt_rank_variables(os.environ)
        ranks = os.environ.get("WORLD_SIZE", "1") != "1"
        _ERRORS.print(_format_error(error, os.environ.get("RANK", "?") if ranks else None))
        sys.exit(error.exit_code)


def _format_error(error: UserError, rank: str | None) -> Text:
    """Return a message that rank 0 prints in full and others on one line. One call prints it, so lines do not mix. If
    not all ranks are known to have the error, each prints all of it, on one line."""
    head = Text("error: " if rank is None else f"[rank {rank}] error: ", style="bold red")
    if rank in (None, "0"):
        text = str(error)
    elif error.everywhere:
        text = f"{error.what} (rank 0 tells more)"
    else:
        text = "; ".join(line.strip() for line in str(error).splitlines())
    return Text.assemble(head, Text(text, style="default"))
