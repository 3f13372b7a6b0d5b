"""Read the phases of a run: the last steps may see images of another size."""

from __future__ import annotations

from pydantic import Field

from m3i_scale.config.limits import MAX_BATCH, MAX_SIDE
from m3i_scale.config.sections import Section


class Phase(Section):
    """Describes some of the steps of a run. What is left out is as in the rest of the run file."""

    steps: int = Field(ge=1)
    """So many of `optim.steps`, which those of all phases make together."""
    image_size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Side of the images in pixels; default: the backbone's. Its positions are interpolated to another one."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=MAX_BATCH)
    """Samples per rank in one forward pass; default: optim.micro_batch_size. optim.batch_size stays."""
