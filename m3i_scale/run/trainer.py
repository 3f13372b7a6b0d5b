"""Training loop. Hooks act on all ranks around the training step; callbacks only observe, on rank 0."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from m3i_scale.config.optim import learning_rate
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.stream import Account
from m3i_scale.engine.agree import agree_and_average
from m3i_scale.engine.device import RandomStates, random_states, replayed
from m3i_scale.engine.engine import set_micro_batch_size, spread_nonfinite, take_step, undone_if_skipped
from m3i_scale.engine.peak import device_name
from m3i_scale.errors import UserError
from m3i_scale.host.rank_record import Heartbeat
from m3i_scale.objective.step_features import StepFeatures
from m3i_scale.run import flops
from m3i_scale.run.callbacks import RunInfo
from m3i_scale.run.check import stage_lines
from m3i_scale.run.data_supply import DeviceCopies, Fetcher, StepBatches, stop_if_bad
from m3i_scale.run.hooks import Hook, MicroBatchResult, Preemption, TrainState, give_back_collector
from m3i_scale.run.hooks.checkpointing import Checkpointing
from m3i_scale.run.hooks.metrics import gradient_scale
from m3i_scale.run.meter import Meter
from m3i_scale.run.setup import ResolvedRun

Status = Literal["finished", "preempted"]


@dataclass
class Trainer:
    """Training loop of one run on one rank, from the latest valid checkpoint to the last step or to a stop signal. See
    `start_trainer`."""

    state: TrainState
    stages: Sequence[ResolvedRun]
    """The run with the settings of each stage."""
    meter: Meter
    validation: TrainStream | None
    heartbeat: Heartbeat
    hooks: list[Hook]
    """Includes `preemption` and `checkpointing`."""
    preemption: Preemption
    checkpointing: Checkpointing

    def __post_init__(self) -> None:
        self.run, self.step_times = self.state.resolved.run, self.meter.step_times
        self.fetcher, self.copy = Fetcher(iter(())), DeviceCopies()

    def fit(self) -> Status:
        """Train until the end of the run. Return how it ended, or raise a UserError if it must not continue."""
        state = self.state
        self.preemption.install()
        self.heartbeat.at("resume")
        self.checkpointing.resume()
        self._enter_stage()
        self.step_times.on_change = self.heartbeat.at
        state.callbacks.on_start(self._run_info())
        status: Status | Literal["failed"] = "failed"
        try:
            self._loop()
            status = "preempted" if state.stopping and state.step < self.run.optim.steps else "finished"
        except UserError as error:
            if error.everywhere:  # raised on all ranks, so collectives are safe
                for hook in self.hooks:
                    hook.on_error()
            raise
        finally:
            give_back_collector()
            state.callbacks.on_end(status)
        return status

    def _run_info(self) -> RunInfo:
        run, state, work = self.run, self.state, self.meter.work
        facts = {
            "flop_per_step": work.flop["model"],
            "peak_tflops": work.peak.tflops,
            "peak_source": work.peak.source,
            "data_sheet_tflops": work.peak.data_sheet_tflops,
            "device": device_name(),
            "micro_batch_size": state.stage.run.optim.micro_batch_size,
        }
        config = run.model_dump(mode="json")
        return RunInfo(run.name, run.output_dir, run.optim.steps, state.step, state.ranks.world_size, config, facts)

    def _loop(self) -> None:
        state = self.state
        for hook in self.hooks:
            hook.on_start()
        self.heartbeat.at("other", state.step)
        ended = False
        while state.step < self.run.optim.steps and not state.stopping and not ended:
            ended = self._train_stage()
        for hook in self.hooks:
            hook.on_finish()

    def _train_stage(self) -> bool:
        """Train until the stage of the next step ends. Return whether the data is exhausted."""
        state = self.state
        self._enter_stage()
        self._tell_stage()
        # Stop the data readers here, while the process is intact, instead of at interpreter exit.
        with contextlib.closing(iter(state.stream)) as batches_of_rank:
            batches = StepBatches(state.stream, batches_of_rank, state.stage.accumulation)
            self.fetcher = Fetcher(batches)
            while state.step < self.run.optim.steps and state.stage is self._stage_of(state.step):
                if state.stopping:
                    return False
                if self._data_ended(batches):
                    return True
                self.train_step()
        return False

    def _stage_of(self, step: int) -> ResolvedRun:
        return self.stages[self.run.stage_at(step)]

    def _enter_stage(self) -> None:
        """Switch to the stage of the next step if it changes. Image and micro-batch size change from the next sample
        on; weights, optimizer and EMA stay unchanged."""
        state, stage = self.state, self._stage_of(self.state.step)
        if stage is state.stage:
            return
        with state.timeouts.outside_of_steps("stage"):
            size = stage.run.optim.micro_batch_size
            for stream in (state.stream, *([] if self.validation is None else [self.validation])):
                stream.resize(stage.image_size, size)
            state.stage = stage
            set_micro_batch_size(state.engine, size)
            flop = flops.step_flop(stage.run, stage.label_sets, stage.vocab_size)
            self.meter.work = replace(self.meter.work, flop=flop)
        state.timeouts.begin_stage()
        self.meter.reset()

    def _tell_stage(self) -> None:
        """Notify hooks and callbacks if a stage begins with the next step."""
        state = self.state
        if not self.run.stages or state.step not in self.run.stage_starts:
            return
        if state.step:
            for hook in self.hooks:
                hook.on_stage()
            state.tell(stage_lines(self.run)[self.run.stage_at(state.step)])
        stage = {
            "image_size": state.stage.image_size,
            "micro_batch_size": state.stage.run.optim.micro_batch_size,
            "flop_per_step": self.meter.work.flop["model"],
        }
        state.callbacks.on_stage(state.step, stage)

    def _data_ended(self, batches: StepBatches) -> bool:
        """Return whether the data is exhausted, and log it if so."""
        with self.step_times.span("data"):
            ended = batches.ended()
        self.meter.add_wait(batches.waited_s)
        if ended:
            step, steps = self.state.step, self.run.optim.steps
            self.state.tell(f"the datasets are exhausted after step {step} of {steps} (epochs)")
        return ended

    def train_step(self) -> None:
        """Run one optimizer step, then the hooks. If a hook undoes the step, later hooks do not run."""
        self._optimizer_step()
        if any(hook.post_step() for hook in self.hooks):
            for hook in self.hooks:
                hook.on_rewind()

    def _optimizer_step(self) -> None:
        """Run the forward and backward passes of a global batch, the vote of all ranks, and the optimizer step."""
        state, run = self.state, self.run
        done = state.step + 1
        # Steps of different stages take different times, so no record may cover two stages.
        state.logged = done % run.log.every_steps == 0 or done in (run.optim.steps, *run.stage_starts)
        state.lr = learning_rate(state.step, run.optim)
        state.engine.module.progress = state.step / run.optim.steps
        for group in state.engine.optimizer.param_groups:
            group["lr"] = state.lr * group["lr_scale"]
        state.micro_batches = []
        with undone_if_skipped(state.engine, state.engine.module):
            micro_batches = self._micro_batches()
            for number in range(state.stage.accumulation):  # a loop over them would keep each until the next is copied
                last = number + 1 == state.stage.accumulation
                state.engine.module.measure_health = state.logged and last
                self._micro_batch(*next(micro_batches))
                if last:  # one vote per step, regardless of gradient accumulation
                    self._vote()
                with self.step_times.span("optimizer"):
                    take_step(state.engine)
        state.applied = state.engine.was_step_applied()  # a skipped step does not update the EMA either
        self._update_ema()
        state.step += 1
        self.heartbeat.at("other", state.step)
        state.timeouts.end_step()

    def _micro_batches(self) -> Iterator[tuple[Batch, StepFeatures | None, RandomStates | None]]:
        """Yield the micro-batches of a step. With `contrastive_batch: global`, also yield the features of all of them,
        and the random states with which a micro-batch was encoded ahead."""
        count = self.state.stage.accumulation
        if self.run.optim.contrastive_batch == "micro" or count == 1:
            for _ in range(count):
                yield self._next_batch(), None, None
            return
        step, states = StepFeatures(count), list[RandomStates | None]([None])
        on_host = [self._fetch() for _ in range(count)]
        for number in range(1, count):
            step.number = number
            states.append(random_states())
            with torch.no_grad(), self.step_times.span("forward"):
                self.state.engine(self.copy(on_host[number]), step)
        for number, batch in enumerate(on_host):
            step.number = number
            yield self.copy(batch), step, states[number]  # copied again: images of one micro-batch are on the device

    def _micro_batch(self, batch: Batch, step: StepFeatures | None, states: RandomStates | None) -> None:
        state = self.state
        with self.step_times.span("forward"), replayed(states):
            loss, figures = state.engine(batch, step)
        with self.step_times.span("backward"):
            state.engine.backward(spread_nonfinite(loss))
        state.engine.module.after_backward(gradient_scale(state))
        micro_batch = MicroBatchResult(loss.detach(), figures, batch.keys)
        state.micro_batches.append(micro_batch)
        for hook in self.hooks:
            hook.post_micro_batch(batch, micro_batch)

    def _next_batch(self) -> Batch:
        return self.copy(self._fetch())

    def _fetch(self) -> Batch:
        with self.step_times.span("data"):
            started = time.perf_counter()
            batch = next(self.fetcher)
            self.meter.add_wait(time.perf_counter() - started)
            return batch

    def _vote(self) -> None:
        """Exchange the votes of all ranks on the step in one collective, before the optimizer step."""
        state = self.state
        losses = torch.stack([micro_batch.loss for micro_batch in state.micro_batches]).float()
        (bad, starved, *voted), state.loss, sums = agree_and_average(
            ~torch.isfinite(losses).all(),
            self.fetcher.failed,
            *(hook.vote() for hook in self.hooks),
            value=losses.mean(),
            counts=state.stream.account,
        )
        state.finite = not bad
        if starved:
            self.fetcher.raise_together()
        stop_if_bad(state.stream, Account(*sums))
        for hook, any_rank in zip(self.hooks, voted, strict=True):
            hook.pre_optimizer_step(any_rank)

    def _update_ema(self) -> None:
        state = self.state
        if state.ema is None:
            return
        task, teacher = self.run.task, state.resolved.recipe.ema
        decay = None if task is None else task.ema_decay_at(state.step)
        if decay is None and teacher is not None:
            decay = teacher.decay_at(state.step, self.run.optim.steps)
        if decay is None:
            raise ValueError("the run has EMA weights, but neither the task nor the recipe sets an EMA decay")
        state.ema_decay = decay
        if state.applied:
            with self.step_times.span("ema"):
                state.ema.update(decay)
