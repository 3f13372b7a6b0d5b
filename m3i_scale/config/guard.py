"""Read the section `guard` of a run file: steps that are not finite, and losses that jump."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import Section


class SpikeConfig(Section):
    """Says when a loss counts as a spike, and how often the run goes back for one."""

    z: float = Field(default=8.0, gt=0)
    """A loss is above the limit when it exceeds the median of the window by so many standard deviations, which are
    1.4826 times the median absolute deviation."""
    window: int = Field(default=128, ge=4)
    """Losses of so many steps before are looked at."""
    min_history: int = Field(default=64, ge=4)
    """With fewer losses than this nothing is judged."""
    patience: int = Field(default=3, ge=1)
    """Steps in a row above the limit that make a spike; fewer are a bad batch."""
    max_rewinds: int = 3
    """The run goes back so many times at most, restarts included; the next spike ends it."""

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
    """Says what a run does about steps that are not finite, and about losses that jump."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient that is not finite on any rank: leave the step out on all ranks, or end the run."""
    max_skipped_in_a_row: int = Field(default=3, ge=2)
    """The run ends at the so manieth step in a row that is not finite. One is a bad batch, two are bad luck; weights
    that are at fault never recover, and every further step would only use up data."""
    spike: SpikeConfig | None = None
    """Go back to a checkpoint when the loss spikes, and go on behind the data that came since. Default: do not."""

    @model_validator(mode="after")
    def _count_is_read(self) -> Self:
        if (
            self.nonfinite == "stop"
            and self.max_skipped_in_a_row != type(self).model_fields["max_skipped_in_a_row"].default
        ):
            raise ValueError("max_skipped_in_a_row has no effect with nonfinite: stop")
        return self
