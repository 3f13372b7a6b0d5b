"""Losses over all micro-batches of a step, for `optim.contrastive_batch: global` (GradCache, Gao et al., 2021).

All micro-batches are encoded without gradient, and the features that losses compare are cached. Then each is encoded
again with gradient, and its features replace their cached copy, as `accum_freq` of open_clip does. The loss has the
same value in all of the A micro-batches, and the engine averages their gradients: heads, temperatures and loss weights
get the gradient of one large batch. Features have a gradient in one micro-batch only, so it is multiplied by A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from m3i_scale.backbones.base import Tokens
from m3i_scale.data.batch import Batch
from m3i_scale.objective.targets.base import Context, Encoded


@dataclass
class Features:
    """Features of one micro-batch, without gradient, that losses over all micro-batches compare."""

    batch: Batch
    """Annotations; the images are empty."""
    counts: dict[str, Tensor]
    pooled: list[dict[nn.Module, Tensor]]
    """Outputs of pooling decoders (B, F), by encoded input."""
    text_BE: Tensor | None
    encoded_views: dict[tuple[str, int], Tokens]
    """Views encoded by teachers, which are encoded once."""
    layers: dict[tuple[str, int], list[Tensor]]
    statistics: dict[tuple[str, str, int, int], Tensor | None]
    """Statistics of patch-level targets. Micro-batches have equal numbers of patches, so that their mean is exact."""


class StepFeatures:
    """Features of the micro-batches of a step, and which of them is encoded now."""

    def __init__(self, count: int) -> None:
        self.features: list[Features | None] = [None] * count
        self.number = 0

    @property
    def present(self) -> Features | None:
        """Return the features of the present micro-batch, or None if they are not cached."""
        return self.features[self.number]

    @present.setter
    def present(self, features: Features) -> None:
        self.features[self.number] = features

    @property
    def is_last(self) -> bool:
        """Return whether the last micro-batch is encoded now."""
        return self.number + 1 == len(self.features)

    def with_statistics(self, context: Context) -> Context:
        """Return the context of the present micro-batch with the statistics of all of them."""
        each = [features.statistics for features in self._all()]
        statistics = {key: _mean([one[key] for one in each]) for key in each[0]}
        return replace(context, statistics=statistics)

    def join(self, context: Context, views: set[tuple[str, int]]) -> Context:
        """Return the context of all micro-batches for image-level targets, without paired captions.

        Args:
            context: of the present micro-batch, of which only the features have a gradient.
            views: keys of the views that image-level targets use.
        """
        every = self._all()
        parts = [part for of_input in context.inputs.values() for part in of_input]
        joint = {
            id(part): JointInput(**vars(part), cached=[features.pooled[place] for features in every], step=self)
            for place, part in enumerate(parts)
        }
        text_BE = context.text_BE
        if text_BE is not None:
            text_BE = self.with_present([features.text_BE for features in every], text_BE)
        return Context(
            batch=Batch.cat([features.batch for features in every]),
            views={},
            inputs={name: [joint[id(part)] for part in of_input] for name, of_input in context.inputs.items()},
            whole={view: joint[id(part)] for view, part in context.whole.items()},
            encoded_views={
                key: _join_tokens([features.encoded_views[key] for features in every])
                for key in views.intersection(every[0].encoded_views)
            },
            counts={name: torch.stack([one.counts[name] for one in every]).sum() for name in context.counts},
            measures=context.measures,
            text_BE=text_BE,
        )

    def with_present(self, cached: Sequence[Tensor | None], present_BF: Tensor) -> Tensor:
        """Return the rows of all micro-batches. Only those of the present one have a gradient, multiplied by the number
        of micro-batches."""
        rows = [values for values in cached if values is not None]
        rows[self.number] = present_BF + (present_BF - present_BF.detach()) * (len(rows) - 1)
        return torch.cat(rows)

    def _all(self) -> list[Features]:
        every = [features for features in self.features if features is not None]
        if len(every) < len(self.features):
            raise ValueError(f"the features of {len(every)} of {len(self.features)} micro-batches are cached")
        return every


@dataclass(kw_only=True)
class JointInput(Encoded):
    """An encoded input of the present micro-batch that is pooled together with those of the other micro-batches."""

    cached: list[dict[nn.Module, Tensor]]
    """Outputs of pooling decoders, by micro-batch."""
    step: StepFeatures

    def pooled(self, decoder: nn.Module) -> Tensor:
        return self.step.with_present([pooled[decoder] for pooled in self.cached], super().pooled(decoder))


def without_images(batch: Batch) -> Batch:
    """Return the batch with empty images, which keeps none in memory."""
    empty = {name: getattr(batch, name)[..., :0, :0].clone() for name in ("images_VBCHW", "small_VBCHW")}
    return replace(batch, **empty)


def _mean(statistics: list[Tensor | None]) -> Tensor | None:
    values = [value for value in statistics if value is not None]
    return torch.stack(values).mean(dim=0) if values else None


def _join_tokens(encoded: list[Tokens]) -> Tokens:
    cls, tokens = zip(*encoded, strict=True)
    return torch.cat(cls), torch.cat(tokens)
