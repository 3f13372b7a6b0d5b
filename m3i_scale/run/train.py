"""Entry point of training: connect the ranks, lock the output directory, find a checkpoint, and run the loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from m3i_scale.checkpoint.commit import explain, sweep
from m3i_scale.checkpoint.layout import step_of, stopped_words
from m3i_scale.config import RunConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.parts import PartWorkers, started_workers
from m3i_scale.engine.agree import from_rank_0, together
from m3i_scale.engine.device import compute_deterministically, nondeterminism_explained, precision_warnings
from m3i_scale.engine.engine import awaited_optimizer, set_micro_batch_size
from m3i_scale.engine.process_group import check_shared, start_ranks, stop_ranks
from m3i_scale.errors import UserError
from m3i_scale.files import atomic_write, write_json
from m3i_scale.host.failures import record_collectives
from m3i_scale.host.output_dir import RANK_RECORDS, launch_of, lock_directory
from m3i_scale.host.rank_record import Heartbeat, recorded
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.output import wide_console
from m3i_scale.rank_variables import ranks_on_host
from m3i_scale.run.callbacks import Callback, CallbackList
from m3i_scale.run.callbacks.loggers import MetricsWriter, trackers_of
from m3i_scale.run.check import resolve_run
from m3i_scale.run.data_supply import check_sources_last
from m3i_scale.run.flops import count_work
from m3i_scale.run.hooks import Garbage, Hook, MakeHook, Preemption, Timeouts, TrainState
from m3i_scale.run.hooks.checkpointing import Checkpointing, Rewinding
from m3i_scale.run.hooks.evaluation import Evaluation
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.hooks.metrics import Metrics
from m3i_scale.run.meter import Meter
from m3i_scale.run.preflight import (
    check_before_joining,
    check_distinct_cards,
    check_machines,
    check_software,
    extend_segments,
)
from m3i_scale.run.resume import check_resume, find_resume
from m3i_scale.run.run_warnings import run_warnings
from m3i_scale.run.setup import ResolvedRun, open_data, print_start, run_yaml, start_engine
from m3i_scale.run.spike import Rewinds, finish_rewind
from m3i_scale.run.summary import finished_text, summary_lines, time_line
from m3i_scale.run.trainer import Status, Trainer

_CONSOLE = wide_console(stderr=True, soft_wrap=True)


def make_callbacks(run: RunConfig) -> list[Callback]:
    """Return the callbacks configured in `log`, and always the writer of metrics.jsonl."""
    callbacks: list[Callback] = [MetricsWriter()]
    if run.log.progress:
        from m3i_scale.run.callbacks.progress import ProgressDisplay

        callbacks.append(ProgressDisplay(_CONSOLE))
    return callbacks + trackers_of(run.log)


def start(run: RunConfig, warnings: Sequence[str] = (), make_hooks: Sequence[MakeHook] = ()) -> Status:
    """Connect to the other ranks and train. `warnings` are about the command line; rank 0 prints them with the warnings
    about the run. `make_hooks` creates additional hooks, of extensions."""
    extend_segments()
    torch.manual_seed(run.seed)
    with contextlib.ExitStack() as stack:
        heartbeat = stack.enter_context(recorded(run.output_dir))
        heartbeat.at("check")
        with started_workers(run.data) as workers:
            resolve = check_first(run)
            if "RANK" in os.environ and get_accelerator().device_name() != "cpu":
                stack.enter_context(record_collectives(run.output_dir / RANK_RECORDS, os.environ))
            callbacks = make_callbacks(run)
            if run.hardware.deterministic:
                compute_deterministically()
            check_before_joining()
            heartbeat.at("join")
            ranks = start_ranks(
                run.timeouts.startup_s, min(run.timeouts.rendezvous_s, run.timeouts.startup_s), print_rank0
            )
            clean = False
            try:
                status = train(run, ranks, callbacks, heartbeat, resolve, workers, warnings, make_hooks)
                clean = True
            finally:
                stop_ranks(wait=clean)
    if status == "preempted" and ranks.rank == 0 and launch_of(run.output_dir) is None:  # else the launcher does
        print_rank0(stopped_words(run.output_dir / "checkpoints"))
    return status


def check_first(run: RunConfig) -> Callable[[], ResolvedRun]:
    """Validate the run before the rendezvous and before anything is built. Return a function that returns the resolved
    run or raises its error. Call it after the rendezvous, because a node that fails earlier would leave the others
    waiting. If all ranks are on this host, a UserError is raised at once."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    outcome: Future[ResolvedRun] = Future()
    try:
        outcome.set_result(resolve_run(run, world))
    except Exception as error:  # raised after the rendezvous
        if isinstance(error, UserError) and (ranks_on_host(os.environ) or 1) == world:
            raise
        outcome.set_exception(error)
    return outcome.result


def print_rank0(text: str) -> None:
    """Print one line for the user."""
    _CONSOLE.print(text, markup=False, highlight=False)


def train(
    run: RunConfig,
    ranks: ProcessGroupRanks,
    callbacks: list[Callback],
    heartbeat: Heartbeat | None = None,
    resolve: Callable[[], ResolvedRun] | None = None,
    workers: Sequence[PartWorkers] = (),
    warnings: Sequence[str] = (),
    make_hooks: Sequence[MakeHook] = (),
) -> Status:
    """Validate, lock, resume and train. Every rank must call it. `callbacks` are used on rank 0 only; `resolve` returns
    the run that was resolved before the rendezvous, or raises its error."""
    heartbeat = heartbeat or Heartbeat(None)
    heartbeat.at("open")
    check_distinct_cards()
    check_software(run)
    resolved = together(resolve or (lambda: resolve_run(run, ranks.world_size)), names_rank=True)
    resolved = _with_engine_of_rank_0(run, resolved, ranks.world_size)
    with contextlib.ExitStack() as stack:
        from_rank_0(lambda: _lock(run, stack))
        check_shared(run.output_dir)
        resume_from, notes = from_rank_0(lambda: find_resume(run))
        if resume_from is not None:
            notes = notes + from_rank_0(lambda: check_resume(resolved, resume_from, ranks.world_size))
        check_machines(resolved)
        from_rank_0(lambda: _write_settings(resolved))
        # Open the data before printing the engine tables, so that data errors are not buried below them.
        stream, validation = open_data(resolved.in_stage(0), ranks, workers)
        if ranks.rank == 0:
            found = (
                *warnings,
                *run_warnings(run, ranks=ranks.world_size),
                *precision_warnings(resolved.deepspeed.config),
            )
            for note in (*notes, *(f"warning: {warning}" for warning in found)):
                _CONSOLE.print(note, style="yellow", markup=False, highlight=False)
            for line in summary_lines(resolved, stream.sample_counts, ranks.world_size, resume_from):
                print_rank0(line)
            if (awaited := awaited_optimizer(resolved.deepspeed.config)) is not None:
                print_rank0(awaited)
        trainer = start_trainer(
            resolved, ranks, callbacks, resume_from, stream, validation, print_rank0, heartbeat, make_hooks
        )
        with nondeterminism_explained():
            status = trainer.fit()
        if status == "finished" and ranks.rank == 0:
            print_rank0(finished_text(run, trainer.state.step))
        return status


def _with_engine_of_rank_0(run: RunConfig, resolved: ResolvedRun, world_size: int) -> ResolvedRun:
    """Return the run with the DeepSpeed config of rank 0, which `deepspeed: auto` may choose differently for devices of
    different memory. Collective."""
    chosen = from_rank_0(lambda: resolved.run.deepspeed)

    def follow() -> ResolvedRun:
        if chosen == resolved.run.deepspeed:
            return resolved
        return resolve_run(run.model_copy(update={"deepspeed": chosen}), world_size)

    return together(follow, names_rank=True)


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
    call it. Only rank 0 uses `callbacks` and `tell`."""
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
    meter = Meter(engine.module, run.optim.batch_size, count_work(stages[0]))
    start = 0 if resume_from is None else step_of(resume_from) or 0
    if ranks.rank == 0:
        tell(time_line(stages, meter.work, start, ranks.world_size))
    engine.module.span = meter.step_times.span
    # The engine calls this name for the gradient reduction that remains after the backward pass.
    engine.allreduce_gradients = meter.step_times.span("reduce")(engine.allreduce_gradients)
    timeouts = Timeouts(run.timeouts, meter.step_times, heartbeat)
    state = TrainState(resolved, stages[0], ranks, engine, ema, stream, CallbackList(callbacks), tell, timeouts)
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
        *([Evaluation(state, validation)] if validation is not None else []),
        *filter(None, (make(state, validation) for make in make_hooks)),
        checkpointing,
    ]
    return Trainer(state, stages, meter, validation, heartbeat, hooks, preemption, checkpointing)


def _lock(run: RunConfig, stack: contextlib.ExitStack) -> None:
    """Lock the output directory and clean up incomplete files of a killed job."""
    stack.enter_context(lock_directory(run.output_dir, trains=True))
    sweep(run.output_dir / "checkpoints")
    finish_rewind(run.output_dir)


def _write_settings(resolved: ResolvedRun) -> None:
    """Write the config and the tokenizer for exports. Call it only after all validation."""
    folder = resolved.run.output_dir
    _ = resolved.identity  # hash the teachers' files now, not at the first save
    try:
        atomic_write(folder / "run.yaml", run_yaml(resolved.run))
        write_json(folder / "deepspeed.json", resolved.deepspeed.config)
        if resolved.tokenizer is not None:
            resolved.tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise explain(error, folder / "checkpoints") from None
