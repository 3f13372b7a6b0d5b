"""The loop. One step fits one screen; everything else is asked of the rooms below or done by callbacks."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import merge_states
from m3i_scale.errors import CheckpointError, UserError
from m3i_scale.run.callbacks.base import Callback, CallbackList, RunInfo
from m3i_scale.run.diagnosis import Diagnosis
from m3i_scale.run.meter import Meter, bad_groups
from m3i_scale.run.preemption import Preemption
from m3i_scale.run.schedule import learning_rate, momentum_at
from m3i_scale.run.setup import Plan, check_resume, make_plan, meta_of, open_stream, run_yaml, start_engine
from m3i_scale.scale.checkpoint.commit import lock_directory, newest_good, prune, step_name, sweep, verify
from m3i_scale.scale.checkpoint.space import explain
from m3i_scale.scale.checkpoint.state import from_rank_0, load_checkpoint, read_meta, save_checkpoint
from m3i_scale.scale.collectives import ProcessGroupRanks, agree, mean_over_ranks

Status = Literal["finished", "preempted"]


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a forward pass until the ranks have agreed that the step is good."""

    loss: torch.Tensor
    figures: dict[str, torch.Tensor]
    keys: list[str]


class Trainer:
    """One run on one rank, from the newest good checkpoint to the last step or to a signal."""

    def __init__(
        self, plan: Plan, ranks: ProcessGroupRanks, callbacks: list[Callback], resume_from: Path | None
    ) -> None:
        self.plan, self.run, self.ranks = plan, plan.run, ranks
        self.callbacks = CallbackList(callbacks if ranks.rank == 0 else [])
        self.resume_from = resume_from
        self.stream = open_stream(plan, ranks)
        # Opened now, so that validation shards that cannot be read are found before the first step.
        self.validation = open_stream(plan, ranks, validation=True) if plan.run.data.validation else None
        self.validation_start = self.validation.state_dict() if self.validation else {}
        self.engine, self.momentum = start_engine(plan, ranks)
        self.device = torch.device(get_accelerator().current_device_name())
        self.meter = Meter(self.engine.module, self.run.optim.steps, self.run.optim.batch_size)
        self.step = 0
        self.saved_step = -1
        self.preemption = Preemption()
        self.diagnosis = Diagnosis()

    def fit(self) -> Status:
        """Train. Returns how it ended; raises a UserError where the run must not go on."""
        self.preemption.install()
        self._resume()
        run, optim = self.run, self.run.optim
        info = RunInfo(
            run.name, run.output_dir, optim.steps, self.step, self.ranks.world_size, run.model_dump(mode="json")
        )
        self.callbacks.on_start(info)
        status: Status | Literal["failed"] = "failed"
        # Closing ends loader workers here, while everything still stands, and not at the exit of the interpreter.
        with contextlib.closing(iter(self.stream)) as batches:
            try:
                status = self._loop(batches)
            finally:
                self.callbacks.on_end(status)
        return status

    def _loop(self, batches: Iterator[Batch]) -> Status:
        run, optim = self.run, self.run.optim
        while self.step < optim.steps:
            logs = (self.step + 1) % run.log.every_steps == 0 or self.step + 1 == optim.steps
            asked = self._train_step(batches, logs)
            if run.evaluation.every_steps and self.step % run.evaluation.every_steps == 0:
                self.callbacks.on_evaluation(self.step, self.validate())
            if asked or self.step % run.checkpoint.every_steps == 0 or self.step == optim.steps:
                self.save()
            if asked and self.step < optim.steps:
                return "preempted"
        if self.saved_step != self.step:
            self.save()
        return "finished"

    def _train_step(self, batches: Iterator[Batch], logs: bool) -> bool:
        """One optimizer step over the global batch; returns whether any rank has been asked to stop after it."""
        lr = learning_rate(self.step, self.run.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.module.measure_health = logs
        seen: list[MicroBatch] = []
        asked = False
        for number in range(self.plan.accumulation):
            batch, wait_s = self._next_batch(batches)
            loss, figures = self.engine(batch)
            seen.append(MicroBatch(loss.detach(), figures, batch.keys))
            self.engine.backward(loss)
            self.engine.module.after_backward(self._gradient_scale())
            self.meter.add_micro_batch(loss, figures, self.engine.module.token_count, wait_s)
            self.meter.add_gradients(self._gradient_scale())
            if number + 1 == self.plan.accumulation:  # one vote a step, however many micro-batches
                asked = self._vote(seen)
            self.engine.step()
        momentum = None
        if self.momentum is not None and self.plan.recipe.momentum is not None:
            momentum = momentum_at(self.step, self.plan.recipe.momentum, self.run.optim.steps)
            if self.engine.was_step_applied():  # an fp16 overflow skips the optimizer, and so the average
                self.momentum.update(momentum)
        self.step += 1
        self.meter.end_step()
        if logs:
            record = self.meter.record(
                step=self.step,
                lr=lr,
                grad_norm=self.engine.get_global_grad_norm(),
                momentum=momentum,
                quarantined=sum(self.stream.quarantined.values()),
                world_size=self.ranks.world_size,
            )
            self.callbacks.on_step(record)
            for fault in self.diagnosis.check(record):
                self.callbacks.on_warning(self.step, asdict(fault))
        return asked

    def _next_batch(self, batches: Iterator[Batch]) -> tuple[Batch, float]:
        started = time.perf_counter()
        batch = next(batches)
        wait_s = time.perf_counter() - started
        return batch.to(self.device), wait_s

    def _gradient_scale(self) -> float:
        """How much larger than the true gradient the backward pass computes it (fp16 loss scale, accumulation)."""
        scale = float(self.engine.optimizer.cur_scale) if self.engine.fp16_enabled() else 1.0
        return scale / self.plan.accumulation

    def _vote(self, seen: list[MicroBatch]) -> bool:
        """Whether any rank was asked to stop. All ranks refuse a loss that is not finite, before the optimizer has it.

        Raises:
            UserError: a loss of this step is not finite on some rank.
        """
        finite = torch.isfinite(torch.stack([micro.loss for micro in seen]))
        bad, asked = agree(~finite.all(), self.preemption.requested)
        if not bad:
            return asked
        own = [micro for micro, good in zip(seen, finite.tolist(), strict=True) if not good]
        named = "finite here, not on another rank"
        if own:
            named = ", ".join(bad_groups(own[0].figures)) or "the weighted sum"
        raise UserError(
            f"the loss is not finite at step {self.step + 1}",
            where=f"rank {self.ranks.rank}: {named}",
            why=f"samples of this rank: {', '.join((own or seen)[0].keys[:8])} …",
            fix="start again from the last checkpoint with a lower optim.lr or a smaller optim.clip_grad_norm",
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and nats on the validation sources: the same micro-batches, without augmentation, every time."""
        if self.validation is None:
            raise ValueError("no validation sources")
        self.validation.load_state_dict(self.validation_start)
        module = self.engine.module
        module.measure_health = False
        module.eval()
        totals: dict[str, float] = {}
        count = self.run.evaluation.batches
        with contextlib.closing(iter(self.validation)) as batches:
            for batch in itertools.islice(batches, count):
                loss, figures = self.engine(batch.to(self.device))
                for name, value in {"loss": loss, **figures}.items():
                    if name.endswith("/weight"):  # as in the training records
                        continue
                    totals[name] = totals.get(name, 0.0) + float(value) / count
        module.train()
        return mean_over_ranks(totals)

    def save(self) -> None:
        """Commit a checkpoint of this step, then drop what retention no longer keeps."""
        root = self.run.output_dir / "checkpoints"
        final = root / step_name(self.step)
        if self.resume_from == final:
            return  # nothing was trained since
        stage = self.engine.zero_optimization_stage()
        meta = meta_of(self.plan, step=self.step, world_size=self.ranks.world_size, zero_stage=stage)
        save_checkpoint(
            final,
            self.engine,
            self.momentum,
            data_state=self.stream.state_dict(),
            meta=meta,
            run_yaml=run_yaml(self.run),
        )
        from_rank_0(lambda: prune(root, self.run.checkpoint.keep_latest, committed=final))
        self.saved_step = self.step

    def _resume(self) -> None:
        if self.resume_from is None:
            return
        states = load_checkpoint(self.resume_from, self.engine, self.momentum)
        self.stream.load_state_dict(merge_states(states))
        self.step = self.saved_step = int(read_meta(self.resume_from)["step"])


def find_resume(run: RunConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what was passed over (rank 0 only: it reads every byte).

    Raises:
        CheckpointError: `resume: never` with checkpoints there, a named checkpoint that is not good, or checkpoints
            of which none is good.
    """
    root = run.output_dir / "checkpoints"
    if run.checkpoint.resume not in ("auto", "never"):
        named = Path(run.checkpoint.resume)
        faults = verify(named) if named.is_dir() else ["no such folder"]
        if faults:
            raise CheckpointError(f"cannot resume: {faults[0]}", where=str(named), fix="checkpoint.resume=auto")
        own, _ = newest_good(root)
        if own is None or int(read_meta(own)["step"]) <= int(read_meta(named)["step"]):
            return named, []
        if named.resolve().parent == root.resolve():
            raise CheckpointError(
                f"the run has newer good checkpoints than the named one: {own.name}",
                where=str(named),
                fix="checkpoint.resume=auto; to branch off, name the checkpoint and take another output_dir",
            )
        return own, [f"going on from the run's own {own.name}, which is newer than {named}"]
    newest, passed = newest_good(root)
    notes = [f"passed over {path.name}: {reason}" for path, reason in passed]
    if run.checkpoint.resume == "never" and (newest or passed):
        raise CheckpointError(
            "checkpoint.resume is 'never', and there are checkpoints",
            where=str(root),
            fix="take another output_dir, or checkpoint.resume=auto",
        )
    if newest is None and passed:
        raise CheckpointError(
            "there are checkpoints, and none of them is good",
            where="; ".join(notes),
            fix="move them away to start anew",
        )
    return newest, notes


Announce = Callable[[Plan, Path | None, list[str]], None]


def train(run: RunConfig, ranks: ProcessGroupRanks, callbacks: list[Callback], announce: Announce) -> Status:
    """Check, lock, resume, train. Every rank calls it; `callbacks` and `announce` only serve rank 0."""
    plan = make_plan(run, ranks.world_size)
    with contextlib.ExitStack() as stack:
        from_rank_0(lambda: _lock(run, stack))
        resume_from, notes = from_rank_0(lambda: find_resume(run))
        if resume_from is not None:
            check_resume(plan, resume_from, ranks.world_size)
        from_rank_0(lambda: _write_settings(plan))
        if ranks.rank == 0:
            announce(plan, resume_from, notes)
        return Trainer(plan, ranks, callbacks, resume_from).fit()


def _lock(run: RunConfig, stack: contextlib.ExitStack) -> None:
    """Hold the run's folder, and clear what a killed job left half written."""
    lock = stack.enter_context(lock_directory(run.output_dir))
    sweep(run.output_dir / "checkpoints", lock)


def _write_settings(plan: Plan) -> None:
    """Keep what the run was given, and the tokenizer that an export needs. Only once nothing is left to refuse."""
    folder = plan.run.output_dir
    try:
        (folder / "run.yaml").write_text(run_yaml(plan.run), encoding="utf-8")
        (folder / "deepspeed.json").write_text(json.dumps(plan.deepspeed.config, indent=1), encoding="utf-8")
        if plan.tokenizer is not None:
            plan.tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise explain(error, folder / "checkpoints") from None
