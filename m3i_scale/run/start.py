"""Start of a run on one rank: engine, activation checkpointing and hooks, and a report on the pretrained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from rich.table import Table
from rich.text import Text

from m3i_scale.checkpoint.commit import explain
from m3i_scale.config import RunConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.engine.activations import describe_activations
from m3i_scale.engine.engine import set_micro_batch_size
from m3i_scale.files import write_json
from m3i_scale.host.rank_record import Heartbeat
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.output import wide_console
from m3i_scale.run.callbacks import Callback, CallbackList
from m3i_scale.run.data_supply import check_sources_last
from m3i_scale.run.flops import count_work
from m3i_scale.run.hooks import Hook, MakeHook, Timeouts, TrainState
from m3i_scale.run.hooks.checkpointing import Checkpointing, Rewinding
from m3i_scale.run.hooks.evaluation import Evaluation
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.hooks.metrics import Metrics
from m3i_scale.run.hooks.process import Garbage, Preemption
from m3i_scale.run.meter import Meter
from m3i_scale.run.setup import ResolvedRun, open_data, start_engine
from m3i_scale.run.spike import Rewinds
from m3i_scale.run.trainer import Trainer

START = "start.json"


def start_trainer(
    resolved: ResolvedRun,
    ranks: ProcessGroupRanks,
    callbacks: Sequence[Callback] = (),
    resume_from: Path | None = None,
    stream: TrainStream | None = None,
    validation: TrainStream | None = None,
    tell: Callable[[str], None] = lambda text: None,
    heartbeat: Heartbeat | None = None,
    make_hooks: Sequence[MakeHook] = (),
) -> Trainer:
    """Build the engine and the hooks of a run. Opens its data if no stream is passed (see `open_data`). Every rank must
    call it. `callbacks` and `tell` are only used on rank 0."""
    run = resolved.run
    heartbeat = heartbeat or Heartbeat(None)
    if ranks.rank != 0:
        callbacks, tell = [], lambda text: None
    stages = [resolved.in_stage(number) for number in range(max(len(run.stages), 1))]
    if stream is None:
        stream, validation = open_data(stages[0], ranks)
    if validation is None and run.evaluation.every_steps:
        raise ValueError("evaluation.every_steps is set, and no validation stream is given")
    if (note := check_sources_last(stream, run.optim.batch_size, run.optim.steps)) is not None:
        tell(note)
    engine, ema = start_engine(
        resolved, ranks, lambda report: print_start(report, run), reads_source=resume_from is None
    )
    set_micro_batch_size(engine, stages[0].run.optim.micro_batch_size)
    policy, compiled = run.backbone.activation_checkpointing, run.backbone.compiles
    tell(describe_activations(engine.module, policy, compiled=compiled))
    work = count_work(stages[0])
    meter = Meter(engine.module, run.optim.steps, run.optim.batch_size, work)
    engine.module.span = meter.step_times.span
    # The engine calls this name for the gradient reduction that remains after the backward pass.
    engine.allreduce_gradients = meter.step_times.span("reduce")(engine.allreduce_gradients)
    timeouts = Timeouts(run.timeouts, meter.step_times, heartbeat)
    state = TrainState(resolved, stages[0], ranks, engine, ema, stream, CallbackList(callbacks), tell, timeouts)
    device = torch.device(get_accelerator().current_device_name())
    rewinds = Rewinds(run.output_dir, starts_from_0=resume_from is None)
    guard = Guard(state, lambda: meter.gradients)
    preemption = Preemption(state, run.output_dir if ranks.rank == 0 else None)
    checkpointing = Checkpointing(state, resume_from, guard, rewinds)
    # The guard must judge a step before its record is written, and undone steps must not be evaluated.
    hooks: list[Hook] = [
        Garbage(),
        preemption,
        guard,
        Metrics(state, meter, guard),
        Rewinding(state, guard, checkpointing, rewinds),
        *([Evaluation(state, validation, device)] if validation is not None else []),
        *filter(None, (make(state, validation, device) for make in make_hooks)),
        checkpointing,
    ]
    return Trainer(state, stages, work, meter, validation, heartbeat, hooks, preemption, checkpointing)


def print_start(report: dict[str, Any], run: RunConfig) -> None:
    """Print the load result of the pretrained weights, and save it, with the names of all tensors, in the run's
    folder."""
    table = Table(box=None, show_header=False)
    for topic, text in _report_rows(report):
        table.add_row(Text(topic, style="bold"), Text(text))
    wide_console(stderr=True, soft_wrap=True).print(table)
    try:
        write_json(run.output_dir / START, report)
    except OSError as error:
        raise explain(error, run.output_dir / "checkpoints") from None


def _report_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (topic, text) rows of a report."""
    rows = [
        ("start from", f"{report['source']} ({report['kind']}, files: {len(report['files'])})"),
        ("loaded", f"{report['loaded']} tensors, {report['parameters']:,} parameters"),
    ]
    rows += [
        ("resized", f"{name}: {tuple(how['from'])} → {tuple(how['to'])}") for name, how in report["resized"].items()
    ]
    rows += [("zero", f"{len(names)} × {reason}") for reason, names in report["zeros"].items()]
    rows += [("left out", f"{len(names)} × {reason}, e.g. {names[0]}") for reason, names in report["left_out"].items()]
    rows += [("fresh", name) for name in report["fresh"]]
    rows += [("assumed", f"{name} = {why}") for name, why in report["assumed"].items()]
    return rows
