"""Config section `guard`: handling of non-finite steps and loss spikes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import Section


class SpikeConfig(Section):
    """Settings of loss-spike detection and rollback."""

    z: float = Field(default=8.0, gt=0)
    """Threshold in standard deviations above the median loss of the window. The standard deviation is estimated as
    1.4826 times the median absolute deviation."""
    window: int = Field(default=128, ge=4)
    """Number of previous steps whose losses form the window."""
    min_history: int = Field(default=64, ge=4)
    """Minimum number of losses in the window before spikes are detected."""
    patience: int = Field(default=3, ge=1)
    """Consecutive steps above the threshold that count as a spike. Fewer are treated as a bad batch."""
    max_rewinds: int = 3
    """Maximum number of rollbacks, including across restarts. The next spike ends the run."""

    @field_validator("max_rewinds")
    @classmethod
    def _goes_back(cls, most: int) -> int:
        if most < 1:
            raise ValueError(
                f"{most} rewinds: the guard would have no effect; take 1 or more, or leave out guard.spike"
            )
        return most

    @model_validator(mode="after")
    def _history_fits(self) -> Self:
        if self.window < self.min_history:
            raise ValueError(
                f"window ({self.window}) is less than min_history ({self.min_history}): nothing would ever be judged"
            )
        return self


class GuardConfig(Section):
    """Settings of NaN/Inf handling and loss-spike rollback."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """Action for a non-finite loss or gradient on any rank. skip: skip the step on all ranks. stop: end the run."""
    max_skipped_in_a_row: int = Field(default=3, ge=2)
    """End the run at this many consecutive skipped steps. A single bad batch is tolerated, but diverged weights never
    recover, and further steps only use up data."""
    spike: SpikeConfig | None = None
    """Roll back to a checkpoint on a loss spike and skip the data since then. Default: off."""

    @model_validator(mode="after")
    def _count_is_read(self) -> Self:
        if (
            self.nonfinite == "stop"
            and self.max_skipped_in_a_row != type(self).model_fields["max_skipped_in_a_row"].default
        ):
            raise ValueError("max_skipped_in_a_row has no effect with nonfinite: stop")
        return self
