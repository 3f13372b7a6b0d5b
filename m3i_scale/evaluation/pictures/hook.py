"""Hook that writes visualizations of the same samples every N steps."""

from __future__ import annotations

import math
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed.accelerator import get_accelerator

from m3i_scale.checkpoint.layout import checkpoints, step_name, step_of
from m3i_scale.checkpoint.load import evaluating, first_samples
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.engine.agree import from_rank_0, together
from m3i_scale.engine.partition import end_recorded_step
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.pictures.draw import write_pictures
from m3i_scale.files import atomic_dir
from m3i_scale.host.output_dir import PICTURES
from m3i_scale.run.callbacks import write_errors
from m3i_scale.run.hooks import Hook, TrainState

if TYPE_CHECKING:
    from m3i_scale.evaluation.pictures.training import EncodedSamples


def make_pictures(state: TrainState, validation: TrainStream | None) -> Hook | None:
    """Return the hook of a run with `log.pictures_every_steps`."""
    return Pictures(state, validation) if state.resolved.run.log.pictures_every_steps else None


class Pictures(Hook):
    """Hook that writes visualizations to `output_dir/pictures`, one folder per step. It does not affect the run.

    Create it before resuming from a checkpoint: the streams are then at their start, so that the samples are the same
    after every resume. Without a validation stream, it uses training samples. If some rank has no samples, all ranks
    raise DataError.
    """

    def __init__(self, state: TrainState, validation: TrainStream | None) -> None:
        from m3i_scale.evaluation.pictures.training import TrainingPictures  # plotting modules take seconds to import

        self._state = state
        self._folder = state.resolved.run.output_dir / PICTURES
        seen = self._first_of(state.stream)
        samples = seen if validation is None else self._first_of(validation)
        self._pictures = TrainingPictures(state.resolved, state.engine.module, samples, seen)

    def _first_of(self, stream: TrainStream) -> Batch:
        """Return the first samples of a stream, the same on every rank, without consuming them."""
        run = self._state.stage.run
        count = run.log.picture_samples
        batches = math.ceil(count / (run.optim.micro_batch_size * self._state.ranks.world_size))
        return first_samples(together(lambda: stream.peek(batches), names_rank=True), count)

    def on_start(self) -> None:
        """Delete the pictures of steps that are repeated. A new run writes pictures of its initial weights."""
        self.on_rewind()
        if self._state.step == 0:
            self._write()

    def post_step(self) -> bool:
        step, run = self._state.step, self._state.resolved.run
        if step % run.log.pictures_every_steps == 0 or step == run.optim.steps:
            self._write()
        return False

    def on_finish(self) -> None:
        """Write pictures of the last step if the run ended early because the data is exhausted."""
        step, run = self._state.step, self._state.resolved.run
        if not self._state.stopping and step < run.optim.steps and step % run.log.pictures_every_steps:
            self._write()

    def on_rewind(self) -> None:
        from_rank_0(self._remove_undone)

    def _remove_undone(self) -> None:
        with _write_errors(self._folder):
            for path in checkpoints(self._folder):
                if (step_of(path) or 0) > self._state.step:
                    shutil.rmtree(path)

    def _write(self) -> None:
        module = self._state.engine.module
        with self._state.timeouts.outside_of_steps("pictures"):
            end_recorded_step(self._state.engine)
            with evaluating(module):
                encoded = self._pictures.encode(get_accelerator().current_device_name())
            from_rank_0(lambda: self._draw(encoded))

    def _draw(self, encoded: EncodedSamples) -> None:
        step = self._state.step
        try:
            pictures = self._pictures.draw(encoded)
        except NotMeasuredError as reason:
            self._state.tell(f"no pictures of step {step:,}: {reason}")
            return
        folder = self._folder / step_name(step)
        with _write_errors(folder), atomic_dir(folder, replace=True, durable=False) as begun:
            write_pictures(begun, pictures, step)
        self._state.callbacks.on_pictures(step, pictures)


def _write_errors(folder: Path) -> AbstractContextManager[None]:
    why, instead = "the run would go on without them", ". Or log.pictures_every_steps=0"
    return write_errors("pictures", folder, why=why, instead=instead)
