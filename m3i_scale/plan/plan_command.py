"""`m3i-scale plan`: the command and its tables. Slow imports happen inside the function."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.bar import Bar
from rich.console import Group
from rich.table import Table
from rich.text import Text

from m3i_scale.options import AsJson, Overrides, RunFile, choices
from m3i_scale.output import print_result
from m3i_scale.text import duration_text

_PLAN_ERROR = 0.1
"""Recommended memory margin, for the error of the plan and fragmentation in the allocator."""


def plan(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Number of nodes.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks (GPUs) per node.")] = 8,
    memory_gib: Annotated[float, typer.Option(min=0.1, metavar="GIB", help="Memory per device.")] = 80.0,
    device: Annotated[
        str, typer.Option("--hardware", **choices("h100", "a100", "cpu"), help="Type of the devices.")
    ] = "h100",
    tflops_per_gpu: Annotated[
        float | None, typer.Option(min=1e-3, metavar="X", help="Peak TFLOP/s per device; default: by hardware.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, metavar="X", help="Model FLOPs utilization; default: 0.21 of an h100, 0.39 of an a100."
        ),
    ] = None,
    intra_gb_s: Annotated[
        float | None, typer.Option(min=1e-3, metavar="X", help="Intra-node bandwidth per GPU in GB/s, one direction.")
    ] = None,
    inter_gb_s: Annotated[
        float | None, typer.Option(min=1e-3, metavar="X", help="Inter-node bandwidth per GPU in GB/s, one direction.")
    ] = None,
    latency_us: Annotated[float | None, typer.Option(min=0.0, metavar="US", help="Inter-node latency in µs.")] = None,
    intra_latency_us: Annotated[
        float | None, typer.Option(min=0.0, metavar="US", help="Intra-node latency in µs.")
    ] = None,
    workspace_gib: Annotated[
        float | None, typer.Option(min=0.0, metavar="GIB", help="Non-tensor memory per rank: CUDA context, workspaces.")
    ] = None,
    host_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, metavar="GIB", help="Host memory per node; checked only if given.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Training samples; default: steps × batch size.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of classes; default: read from the shards.")
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=8, metavar="N", help="Vocabulary of the text tower; default: read from the shards."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, communication and training time of a run. Needs neither data nor a GPU.

    Exit with code 2 if the run does not fit, and suggest the cheapest change that makes it fit.
    """
    from m3i_scale.objective.recipe import load_run_and_recipe

    config, _ = load_run_and_recipe(run, overrides)
    from m3i_scale.plan.planning import machine_of
    from m3i_scale.plan.search import check_feasible, plan_run

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
    print_result(as_json, document, lambda: plan_table(document))
    check_feasible(planned)


def plan_table(document: dict[str, Any]) -> Group:
    """Return the document of `RunPlan.document` as tables for the terminal."""
    peak, limit = document["peak_gib_per_rank"], document["memory_gib"]
    verdict, style = _verdict(peak, limit)
    ranks = f"{document['ranks']:,} rank" + ("s" if document["ranks"] != 1 else "")
    head = Text(f"{document['name']} on {ranks}: {peak:.2f} of {limit:g} GiB per rank, {verdict}")
    head.stylize(f"bold {style}")
    memory = _memory(document, max(peak, limit))
    return Group(
        head,
        *(Text(f"warning: {text}", style="yellow") for text in document["warnings"]),
        *(_stage(number, stage) for number, stage in enumerate(document["stages"])),
        _planned(document["planned"], document["ranks"]),
        memory,
        _figures(document),
        *_suggestion(document),
    )


def _stage(number: int, stage: dict[str, Any]) -> Text:
    """Return the requirements of one stage of a run. Everything below is for the stage with the largest peak."""
    return Text(
        f"stage {number}: {stage['steps']:,} steps, {stage['image_size']} px, micro-batch size "
        f"{stage['micro_batch_size']}: {stage['peak_gib_per_rank']:.2f} GiB per rank, {stage['step_time_s']:.3g} s "
        f"per step, {duration_text(86_400 * stage['days'])}",
        style="" if stage["fits"] else "red",
    )


def _planned(choice: dict[str, Any], ranks: int) -> Text:
    accumulation = choice["accumulation"]
    batch = f"{choice['micro_batch_size'] * accumulation * ranks:,} samples per step"
    return Text(
        f"planned: deepspeed={choice['deepspeed']} (ZeRO-{choice['stage']} in {choice['precision']}), {batch} = "
        f"{choice['micro_batch_size']} × {accumulation} × {ranks:,} ranks, "
        f"activation_checkpointing={choice['activation_checkpointing']}"
    )


def _verdict(peak: float, limit: float) -> tuple[str, str]:
    if peak > limit:
        return "does not fit", "red"
    if peak > (1 - _PLAN_ERROR) * limit:
        return f"fits if the estimate is off by less than {limit / peak - 1:.1%}: leave a larger margin", "yellow"
    return "fits", "green"


def _memory(document: dict[str, Any], width: float) -> Table:
    table = Table("at the peak", "GiB", "", box=None)
    table.columns[1].justify = "right"
    start = 0.0
    for name, size in document["parts"].items():
        table.add_row(name, f"{size:.2f}", Bar(width, start, start + size, width=40))
        start += size
    most = document["activations_gib"]
    if most > document["parts"].get("activations", 0.0):
        table.add_row("activations (maximum)", f"{most:.2f}", "at another time than the peak")
    for name, size in document["host_parts"].items():
        table.add_row(f"host memory: {name}", f"{size:.2f}", "")
    node, limit = document["host_gib_per_node"], document["host_memory_gib"]
    checked = Text("not checked: set --host-memory-gib")
    if limit is not None:
        checked = Text(f"of {limit:g}: does not fit", "red") if node > limit else Text(f"of {limit:g}", "green")
    table.add_row("host memory per node", f"{node:.2f}", checked)
    return table


def _figures(document: dict[str, Any]) -> Table:
    counts, links = document["parameters"], document["comm_gib_per_step_by_link"]
    table = Table("", "", box=None, show_header=False)
    parameters = ", ".join(
        f"{count / 1e6:,.1f}M {role.replace('ema', 'EMA')}" for role, count in counts.items() if count
    )
    table.add_row("parameters", parameters)
    table.add_row("compute", f"{document['flop_per_sample'] / 1e12:.3g} TFLOP/sample, including recomputation")
    traffic = f"{links['intra']:.3g} GiB within a node, {links['inter']:.3g} GiB between nodes, per rank and step"
    table.add_row("communication", traffic)
    for kind, size in document["comm_gib_per_step_by_kind"].items():
        table.add_row("", f"{kind}: {size:.3g} GiB")
    seconds = f"{document['step_time_s']:.3g} s ({document['compute_s']:.3g} s compute, "
    seconds += f"{document['communication_s']:.3g} s communication, {document['host_s']:.3g} s host)"
    table.add_row("step", seconds)
    table.add_row("samples/day", f"{document['samples_per_day']:,.0f}")
    hours = document["gpu_hours"]
    rank_hours = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    rank_hours += " CPU-rank hours" if document["on_host"] else " GPU hours"
    table.add_row(f"{document['samples']:,} samples", f"{duration_text(86_400 * document['days'])}, {rank_hours}")
    table.add_row("checkpoint", f"{document['checkpoint_gib']:.3g} GiB")
    table.add_row("assumed", f"hardware {document['hardware']} (--hardware), {document['memory_gib']:g} GiB per rank")
    table.add_row("assumed", f"MFU {document['mfu']:g} of {document['tflops_per_rank']:g} TFLOP/s (--mfu)")
    for text in document["assumed"]:
        table.add_row("assumed", f"{text}: there are no local shards")
    return table


def _suggestion(document: dict[str, Any]) -> list[Text]:
    found = document["suggestion"]
    if found is None:
        return [Text("no setting that was tried fits", style="red")]
    fastest = [_choice(f"fastest with {each['deepspeed']}", each) for each in document["compared"]]
    return [*fastest, _choice("suggested", found)]


def _choice(what: str, choice: dict[str, Any]) -> Text:
    times = f"{choice['step_time_s']:.3g} s per step, {choice['host_s']:.3g} s host"
    return Text(f"{what} ({choice['peak_gib_per_rank']:.2f} GiB, {times}): {' '.join(choice['overrides'])}")
