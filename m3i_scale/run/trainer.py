"""The loop. One step fits one screen; everything else is asked of the rooms below or done by callbacks."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator

from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.state import merge_states
from m3i_scale.data.stream import Account
from m3i_scale.errors import UserError
from m3i_scale.launch.place import Place
from m3i_scale.run.activations import set_activations
from m3i_scale.run.callbacks.base import Callback, CallbackList, RunInfo
from m3i_scale.run.failure import MicroBatch, report_of
from m3i_scale.run.fetch import Fetcher
from m3i_scale.run.first_weights import tell_start
from m3i_scale.run.flops import step_flop
from m3i_scale.run.guard import Guard, Outcome, RunEndedError, Vote, check_guard_room
from m3i_scale.run.meter import Meter, Work, long_run_note
from m3i_scale.run.patience import Patience
from m3i_scale.run.preemption import Preemption
from m3i_scale.run.probe import check_probe, evaluating
from m3i_scale.run.records import Records
from m3i_scale.run.rewind import Rewinds
from m3i_scale.run.saves import Saves
from m3i_scale.run.schedule import learning_rate, momentum_at
from m3i_scale.run.setup import Plan, open_data, start_engine
from m3i_scale.run.spike import Spike
from m3i_scale.run.supply import Shares, Supply, account_of_all, check_supply, ending_words, stop_if_bad
from m3i_scale.scale.checkpoint.layout import read_meta
from m3i_scale.scale.checkpoint.load import load_checkpoint
from m3i_scale.scale.checkpoint.saver import bytes_wanted
from m3i_scale.scale.collectives import ProcessGroupRanks, agree_and_average, mean_over_ranks
from m3i_scale.scale.deepspeed.rules import precision
from m3i_scale.scale.loss_scale import loss_scale, spread_nonfinite, take_step, undone_if_skipped
from m3i_scale.scale.peak import compute_dtype, measured_peak, named_peak
from m3i_scale.scale.together import together

Status = Literal["finished", "preempted"]


class Trainer:
    """One run on one rank, from the newest good checkpoint to the last step or to a signal."""

    def __init__(
        self,
        plan: Plan,
        ranks: ProcessGroupRanks,
        callbacks: list[Callback],
        resume_from: Path | None,
        stream: TrainStream | None = None,
        validation: TrainStream | None = None,
        tell: Callable[[str], None] = lambda text: None,
        place: Place | None = None,
    ) -> None:
        """Opens `plan`'s own data where no stream of micro-batches is given (see `open_data`); `tell` serves rank 0."""
        self.plan, self.run, self.ranks = plan, plan.run, ranks
        self.callbacks = CallbackList(callbacks if ranks.rank == 0 else [])
        self.tell = tell if ranks.rank == 0 else lambda text: None
        self.stream, self.validation = (stream, validation) if stream is not None else open_data(plan, ranks)
        self.shares = Shares(self.stream)
        note = check_supply(self.stream, self.run.optim.batch_size, self.run.optim.steps)
        if note is not None:
            self.tell(note)
        self.validation_start = self.validation.state_dict() if self.validation else {}
        self.engine, self.momentum = start_engine(
            plan, ranks, lambda report: tell_start(report, plan.run), reads_source=resume_from is None
        )
        check_guard_room(plan.run, bytes_wanted(self.engine, self.momentum))
        self.activations = set_activations(plan.run, self.engine, self.stream)
        """Which layers recompute, in words."""
        self.device = torch.device(get_accelerator().current_device_name())
        self.work = self._count_work()
        self.meter = Meter(self.engine.module, self.run.optim.steps, self.run.optim.batch_size, self.work)
        self.phases = self.meter.phases
        self.engine.module.span = self.phases.span
        # What is left of the reduction when the backward pass is over; the engine calls it by this name.
        self.engine.allreduce_gradients = self.phases.timed("reduce", self.engine.allreduce_gradients)
        self.place = place or Place(None)
        self.patience = Patience(self.run.timeouts, self.phases, self.place)
        self.step = 0
        self.saves = Saves(plan, ranks, self.engine, self.momentum, self.tell)
        self.saves.loaded = resume_from
        self.fetcher = Fetcher(iter(()))
        self.preemption = Preemption(self.run.output_dir if ranks.rank == 0 else None)
        self.guard = Guard(self.run.guard, self.run.output_dir, self.callbacks.on_warning)
        self.records = Records(
            self.engine, self.stream, self.meter, self.shares, self.guard, self.callbacks, ranks.world_size
        )
        self.rewinds = Rewinds(self.run.output_dir, anew=resume_from is None)

    def _count_work(self) -> Work:
        """FLOPs of a step, counted on every rank alike, and the peak that MFU is a share of."""
        plan, given = self.plan, self.run.hardware.peak_tflops
        dtype = compute_dtype(plan.deepspeed.config)
        peak = measured_peak(dtype) if given is None else named_peak(given, dtype)
        return Work(step_flop(self.run, plan.label_sets, plan.vocab_size), self.run.text.max_tokens, peak)

    def long_run_note(self, first_step: int) -> str | None:
        """See `m3i_scale.run.meter.long_run_note`; from a step on."""
        optim = self.run.optim
        return long_run_note(self.work, optim.steps - first_step, optim.batch_size, self.ranks.world_size)

    def fit(self) -> Status:
        """Train. Returns how it ended; raises a UserError where the run must not go on."""
        self.preemption.install()
        self.place.at("resume")
        self._resume()
        self.phases.tell = self.place.at
        run, optim = self.run, self.run.optim
        info = RunInfo(
            run.name,
            run.output_dir,
            optim.steps,
            self.step,
            self.ranks.world_size,
            run.model_dump(mode="json"),
            flop_per_step=self.work.flop["model"],
            peak_tflops=self.work.peak.tflops,
            peak_source=self.work.peak.source,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        )
        self.callbacks.on_start(info)
        status: Status | Literal["failed"] = "failed"
        # Closing ends loader workers here, while everything still stands, and not at the exit of the interpreter.
        with contextlib.closing(iter(self.stream)) as batches:
            try:
                supply = Supply(self.stream, batches, self.plan.accumulation)
                self.fetcher = Fetcher(supply)
                status = self._loop(supply)
            except RunEndedError:
                self._commit_what_is_written()
                raise
            finally:
                self.callbacks.on_end(status)
        return status

    def _loop(self, supply: Supply) -> Status:
        run, optim = self.run, self.run.optim
        self.shares.start()
        self.place.at("other", self.step)
        asked = False
        while self.step < optim.steps and not self._ended(supply):
            logs = (self.step + 1) % run.log.every_steps == 0 or self.step + 1 == optim.steps
            asked, spike = self._train_step(self.fetcher, logs)
            with self.patience.long("rewind") if spike is not None else contextlib.nullcontext():
                gone_back = spike is not None and self._rewind(spike)
            if gone_back:
                if asked:
                    return "preempted"
                continue
            if run.evaluation.every_steps and self.step % run.evaluation.every_steps == 0:
                with self.patience.long("evaluate"):
                    with self._ending_together():
                        figures = self.validate()
                    self.callbacks.on_evaluation(self.step, figures)
            due = asked or self.step % run.checkpoint.every_steps == 0 or self.step == optim.steps
            if due or self.saves.written:
                with self.patience.long("save"):
                    self.save() if due else self.saves.commit_if_written()
            if asked and self.step < optim.steps:
                break
        with self.patience.long("save"):
            if self.saves.step != self.step:
                self.save()
            self.saves.close()
        return "preempted" if asked and self.step < optim.steps else "finished"

    def _ended(self, supply: Supply) -> bool:
        """Whether the data are over, which is said."""
        with self._ending_together(), self.phases.span("fetch"):
            ended = supply.ended()
        self.meter.add_wait(supply.waited_s)
        if ended:
            self.tell(ending_words(self.stream, self.step, self.run.optim.steps, self.ranks.world_size, supply.bad))
        return ended

    def _train_step(self, batches: Iterator[Batch], logs: bool) -> tuple[bool, Spike | None]:
        """One optimizer step over the global batch; returns whether any rank has been asked to stop after it, and a
        loss spike that it has confirmed."""
        lr = learning_rate(self.step, self.run.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.module.measure_health = logs
        with undone_if_skipped(self.engine, self.engine.module):
            seen, vote = self._micro_batches(batches)
        applied = (
            self.engine.was_step_applied()
        )  # a gradient that is not finite skips the optimizer, and so the average
        momentum = None
        if self.momentum is not None and self.plan.recipe.momentum is not None:
            momentum = momentum_at(self.step, self.plan.recipe.momentum, self.run.optim.steps)
            if applied:
                with self.phases.span("momentum"):
                    self.momentum.update(momentum)
        self.step += 1
        self.place.at("other", self.step)
        self.patience.end_step()
        spike = self.guard.after_step(self.step, vote, self._outcome(seen, applied=applied))
        self.meter.end_step(applied=applied, finite=vote.finite)
        if logs:
            self.records.write(self.step, lr=lr, momentum=momentum, applied=applied)
        else:
            self.callbacks.on_progress(self.step)
        return vote.asked, spike

    def _outcome(self, seen: list[MicroBatch], *, applied: bool) -> Outcome:
        return Outcome(
            applied=applied,
            overflows=self.engine.fp16_enabled(),
            grad_norm=lambda: float(self.engine.get_global_grad_norm()),
            report=lambda: report_of(self.ranks.rank, seen, self.meter.gradients),
        )

    def _micro_batches(self, batches: Iterator[Batch]) -> tuple[list[MicroBatch], Vote]:
        """All forward and backward passes of a step, and the step."""
        seen: list[MicroBatch] = []
        vote = Vote(0.0, finite=True, asked=False)
        for number in range(self.plan.accumulation):
            batch, wait_s = self._next_batch(batches)
            self.saves.remember(batch)
            with self.phases.span("forward"):
                loss, figures = self.engine(batch)
            seen.append(MicroBatch(loss.detach(), figures, batch.keys))
            with self.phases.span("backward"):
                self.engine.backward(spread_nonfinite(loss))
            self.engine.module.after_backward(self._gradient_scale())
            self.meter.add_micro_batch(
                loss, figures, self.engine.module.token_count, wait_s, batch.text_ids_BT.shape[1]
            )
            self.meter.add_gradients(self._gradient_scale())
            if number + 1 == self.plan.accumulation:  # one vote a step, however many micro-batches
                vote = self._vote(seen)
            with self.phases.span("step"):
                take_step(self.engine)
        return seen, vote

    def _next_batch(self, batches: Iterator[Batch]) -> tuple[Batch, float]:
        with self.phases.span("fetch"):
            started = time.perf_counter()
            batch = next(batches)
            wait_s = time.perf_counter() - started
            return batch.to(self.device), wait_s

    def _gradient_scale(self) -> float:
        """How much larger than the true gradient the backward pass computes it (fp16 loss scale, accumulation)."""
        return (loss_scale(self.engine) or 1.0) / self.plan.accumulation

    def _vote(self, seen: list[MicroBatch]) -> Vote:
        """What all ranks have to say about the step before the optimizer has it, in one collective.

        Raises:
            UserError: the data of some rank failed, or too much of what all ranks have read is bad.
        """
        losses = torch.stack([micro.loss for micro in seen]).float()
        (bad, asked, starved, self.saves.others_write), loss, sums = agree_and_average(
            ~torch.isfinite(losses).all(),
            self.preemption.requested,
            self.fetcher.failed,
            self.saves.writing,
            value=losses.mean(),
            counts=self.stream.account,
        )
        with self._ending_together():
            if starved:
                self.fetcher.raise_together()
            stop_if_bad(self.stream, Account(*sums))
        return Vote(loss, finite=not bad, asked=asked)

    @contextlib.contextmanager
    def _ending_together(self) -> Iterator[None]:
        """What is raised inside, all ranks raise: a save that is on its way is committed first."""
        try:
            yield
        except UserError:
            self._commit_what_is_written()
            raise

    def _commit_what_is_written(self) -> None:
        """Before all ranks end together: one may write for longer than a step may take."""
        with self.patience.long("save"):
            self.saves.commit_what_is_written()

    def _rewind(self, spike: Spike) -> bool:
        """Go back to the newest good checkpoint from before a spike, while the data stay where they are.

        Returns:
            False where there is none, which is said.

        Raises:
            UserError: the run has gone back as often as it may.
        """
        config = self.run.guard.spike
        if config is None or len(self.rewinds) >= config.max_rewinds:
            raise self.guard.ended(self.step, f"the loss has spiked, and max_rewinds are used up: {spike}")
        self.saves.close()  # a save that is on its way may be one of those that are undone
        found = self.rewinds.begin(
            spike, self.stream.state_dict(), batch_size=self.run.optim.batch_size, most=config.max_rewinds
        )
        if found is None:
            self.guard.told_only(spike)
            return False
        checkpoint, rewind = found
        self.saves.loaded = checkpoint
        load_checkpoint(checkpoint, self.engine, self.momentum)
        self._go_on_from(together(lambda: read_meta(checkpoint)))
        self.records.restart()
        self.callbacks.on_rewind(rewind)
        self.guard.told(rewind)
        return True

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and nats on the validation sources: the same micro-batches, without augmentation, every time."""
        if self.validation is None:
            raise ValueError("no validation sources")
        self.validation.load_state_dict(self.validation_start)
        totals: dict[str, float] = {}
        count = self.run.evaluation.batches
        with evaluating(self.engine.module), contextlib.closing(iter(self.validation)) as stream:
            batches = Fetcher(stream)
            for batch in itertools.islice(batches, count):
                loss, figures = self.engine(batch.to(self.device))
                for name, value in {"loss": loss, **figures}.items():
                    if name.endswith("/weight"):  # as in the training records
                        continue
                    totals[name] = totals.get(name, 0.0) + float(value) / count
        batches.raise_together()
        stop_if_bad(self.validation, account_of_all(self.validation))  # a rank by itself is sure of the worst only
        return mean_over_ranks(totals)

    def save(self) -> None:
        """Commit a checkpoint of this step, or begin to."""
        told = {"guard": self.guard.state(), "rewinds": len(self.rewinds)}
        self.saves.save(self.step, self.stream.state_dict(), told)

    def _resume(self) -> None:
        if self.saves.loaded is None:
            return
        resume_from = self.saves.loaded
        states = load_checkpoint(resume_from, self.engine, self.momentum)
        meta = together(lambda: read_meta(resume_from))
        probe = check_probe(resume_from, meta, self.engine, precision=precision(self.plan.deepspeed.config))
        if self.run.checkpoint.probe:
            self.saves.probe = probe
        states = together(lambda: self.rewinds.data_states(resume_from)) or states
        changed = self.stream.load_state_dict(merge_states(states), self.run.data.changed_sources)
        for name, text in changed.items():
            self.tell(f"source {name}: {text}")
        self._go_on_from(meta)

    def _go_on_from(self, meta: dict[str, Any]) -> None:
        """Take over the step of a checkpoint, and what the guard knew then."""
        self.step = self.saves.step = int(meta["step"])
        self.guard.load(meta.get("guard"))
