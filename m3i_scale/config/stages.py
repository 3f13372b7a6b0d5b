"""Config section `stages`: training stages with different image sizes."""

from __future__ import annotations

from pydantic import Field

from m3i_scale.config.limits import MAX_BATCH, MAX_SIDE
from m3i_scale.config.sections import Section


class Stage(Section):
    """One stage of a run. Omitted fields keep their value from the rest of the config file."""

    steps: int = Field(ge=1)
    """Number of steps of this stage. All stages together must have `optim.steps`."""
    image_size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Image size in pixels. Default: the backbone's. Position embeddings are interpolated to any other size."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=MAX_BATCH)
    """Samples per rank in one forward pass. Default: optim.micro_batch_size. optim.batch_size does not change."""
