"""Callback that writes TensorBoard event files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from m3i_scale.host.picture_files import Picture
from m3i_scale.run.callbacks.base import Callback, Rewind, RunInfo, StepRecord, flatten, require
from m3i_scale.text import redact

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardWriter(Callback):
    """Writer of event files in `output_dir/tensorboard`. A resumed run hides the points that it will repeat."""

    def __init__(self) -> None:
        """Check that the package is installed, long before the first step."""
        require("tensorboard", extra="tensorboard", setting="log.tensorboard")
        self._writer: SummaryWriter | None = None
        self._folder = Path()

    def on_start(self, run_info: RunInfo) -> None:
        self._folder = run_info.output_dir / FOLDER
        self._writer = self._open(run_info.start_step)
        config = yaml.safe_dump(redact(run_info.config, names=True), sort_keys=False)
        self._writer.add_text("run", f"```yaml\n{config}```", run_info.start_step)

    def on_step(self, record: StepRecord) -> None:
        self._add(record.step, record.scalars())

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self._add(step, flatten(values, "evaluation"))

    def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        if self._writer is None:
            raise RuntimeError("on_start has not been called")
        for picture in pictures:
            pixels_HWC = np.asarray(picture.image.convert("RGB"))
            self._writer.add_image(f"pictures/{picture.name}", pixels_HWC, step, dataformats="HWC")
        self._writer.flush()

    def on_rewind(self, rewind: Rewind) -> None:
        self.on_end("rewound")
        self._writer = self._open(rewind.rewound_to)

    def on_end(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=step + 1 if step else 0)

    def _add(self, step: int, values: dict[str, float]) -> None:
        if self._writer is None:
            raise RuntimeError("on_start has not been called")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
