"""Hook that computes losses on the validation datasets every N steps."""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.checkpoint.load import evaluating
from m3i_scale.data.loader import TrainStream
from m3i_scale.engine.agree import mean_over_ranks
from m3i_scale.run.data_supply import Fetcher, account_of_all, stop_if_bad
from m3i_scale.run.hooks import Hook, TrainState


class Evaluation(Hook):
    """Validation of the current student weights during training, on the stream of the validation datasets."""

    def __init__(self, state: TrainState, stream: TrainStream) -> None:
        self._state, self._stream = state, stream
        self._start = stream.state_dict()
        run = state.resolved.run
        self._every = run.evaluation.every_steps
        self._chooses = bool(self._every) and run.task is not None and run.task.chooses_head
        """Whether to evaluate the last step too, to select a head of a sweep."""
        self._is_behind = False
        """Whether steps were taken since the last evaluation."""

    def post_step(self) -> bool:
        step = self._state.step
        self._is_behind = True
        is_last = step == self._state.resolved.run.optim.steps
        if self._every and (step % self._every == 0 or (self._chooses and is_last)):
            self._evaluate()
        return False

    def on_finish(self) -> None:
        """Evaluate the last step of a head sweep if the run ended early because the data is exhausted."""
        if self._chooses and self._is_behind and not self._state.stopping:
            self._evaluate()

    def _evaluate(self) -> None:
        with self._state.timeouts.outside_of_steps("evaluate"):
            self._state.callbacks.on_evaluation(self._state.step, self.evaluate())
        self._is_behind = False

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return losses, nats, top-1 accuracies, mIoU and average precision. Every rank must call it.

        Every call uses the same micro-batches without augmentation. mIoU is computed over all pixels, and average
        precision over all images, each image once. Neither is a mean over micro-batches.
        """
        self._stream.load_state_dict(self._start)
        engine, resolved = self._state.engine, self._state.resolved
        run = resolved.run
        # The same samples in every stage, as far as its micro-batch size allows.
        of_stage = self._state.stage.run.optim.micro_batch_size
        count = math.ceil(run.evaluation.batches * run.optim.micro_batch_size / of_stage)
        values: dict[str, list[Tensor]] = {}
        targets = [target for target in resolved.recipe.targets if target.name in resolved.scored]
        scores = {
            target.name: of_target
            for target in targets
            if (of_target := target.scores(resolved.label_sets)) is not None
        }
        with evaluating(engine.module), contextlib.closing(iter(self._stream)) as stream:
            batches = Fetcher(stream)
            for batch in itertools.islice(batches, count):
                loss, metrics = engine(batch.to(get_accelerator().current_device_name()))
                for name, value in {"loss": loss, **metrics}.items():
                    if not name.endswith("/weight"):  # training records have the loss weights
                        values.setdefault(name, []).append(value.detach())
                for name, of_target in scores.items():
                    of_target.add(batch, engine.module.outputs[name])
        batches.raise_together()
        stop_if_bad(self._stream, account_of_all(self._stream))  # a single rank can only detect clear cases
        computed = {
            f"{name}/{score}": value
            for name, of_target in scores.items()
            for score, value in of_target.compute(engine.module.ranks).items()
        }
        totals = {name: sum(torch.stack(of_batches).tolist()) / count for name, of_batches in values.items()}
        return mean_over_ranks(totals) | computed
