"""Semantic segmentation: the class of every pixel."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from m3i_scale.config.data import Reads
from m3i_scale.data.batch import Batch
from m3i_scale.data.shards import MASK_LABELS
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError
from m3i_scale.objective.distributions import Loss
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.targets.base import Context, Encoded, Scores, Sizes, TargetModules
from m3i_scale.tasks.full_image_target import FullImageTarget
from m3i_scale.tasks.segmentation.pixel_heads import PixelHead, mean_iou, overlaps
from m3i_scale.tasks.segmentation.segmentation_heads import EomtSegmentation, SegmentationHead, UperNetSegmentation

if TYPE_CHECKING:
    from m3i_scale.exports.source import Source
    from m3i_scale.exports.tensors import ExportedModule


class Segmentation(FullImageTarget):
    """Semantic segmentation."""

    kind: ClassVar[str] = "segmentation"
    modality: ClassVar[str] = "mask"
    representation: ClassVar[str] = "class of every pixel"
    labels_file: ClassVar[str | None] = MASK_LABELS

    head: SegmentationHead
    """Segmentation head."""

    @property
    def reads(self) -> Reads:
        return "masks"

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("miou",)

    def scores(self, label_sets: dict[str, list[str]]) -> Scores:
        return _MeanIou()

    def export(self, source: Source) -> ExportedModule:
        from m3i_scale.tasks.segmentation.export_segmenter import eomt_part, upernet_part

        if isinstance(self.head, EomtSegmentation):
            return eomt_part(source, self.head, self.name)
        return upernet_part(source, self.head, self.name)

    @property
    def compares_samples(self) -> bool:
        """Return whether batch norm gets a single value per sample, as for the global pooling of UPerNet."""
        return isinstance(self.head, UperNetSegmentation)

    def build_head(self, sizes: Sizes) -> nn.Module:
        if len(sizes.classes) != 1:
            raise ConfigError(
                f"a segmenter has one class list, but the datasets have {len(sizes.classes)}",
                where="data.datasets",
                fix="use datasets with the same class list, under one label_set",
            )
        return _module_class(self.head)(self.head, sizes.backbone, sizes.classes[0], sizes.ranks)

    def present(self, batch: Batch) -> Tensor:
        """Return which samples have a labeled pixel: bool (B)."""
        return (batch.masks_BHW != NO_CLASS).flatten(1).any(dim=1)

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return the mean over all labeled pixels. In evaluation mode also return overlaps of truth and prediction."""
        truth_BHW = context.batch.masks_BHW.long()
        valid_BHW = truth_BHW != NO_CLASS
        truth_BHW = truth_BHW.masked_fill(~valid_BHW, 0)
        head: PixelHead = given.head
        size = truth_BHW.shape[1], truth_BHW.shape[2]
        predictions = list(head.predict(given.decoder(encoded.tokens_BLD), encoded.maps, given.grid, size))
        value, nats = head.loss(predictions, encoded.maps, truth_BHW, valid_BHW, self.distribution, given.ranks)
        outputs = {}
        if not head.training:
            logits_BKHW = predictions[0]
            predicted_BHW = logits_BKHW.argmax(dim=1)
            outputs["overlaps_3K"] = overlaps(predicted_BHW, truth_BHW, valid_BHW, logits_BKHW.shape[1])
        return Loss(value, nats, outputs=outputs)


def _module_class(head: SegmentationHead) -> Callable[..., PixelHead]:
    """Return the class of a head's module, which may be user-defined."""
    try:
        kind = resolve_name(head.module)
        below = isinstance(kind, type) and issubclass(kind, PixelHead)
        problem = None if below else f"{head.module} must be a subclass of PixelHead"
    except (AttributeError, ImportError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        raise ConfigError(
            f"the head '{head.kind}' must name its module: {problem}",
            where="task.head",
            fix='set module: ClassVar[str] = "my_package.my_module.MyPixelHead" in its class',
        )
    if kind.__abstractmethods__:
        raise ConfigError(
            f"{head.module} must define {', '.join(sorted(kind.__abstractmethods__))}",
            where="task.head",
            fix="define it in the class",
        )
    if hasattr(kind, "encode") and kind.encode_view is PixelHead.encode_view:
        raise ConfigError(
            f"{head.module} must define `encode_view`, not `encode`, which is never called",
            where="task.head",
            fix="rename the method to `encode_view`",
        )
    return cast(Callable[..., PixelHead], kind)


class _MeanIou(Scores):
    """Mean intersection over union over all pixels of all ranks."""

    def __init__(self) -> None:
        self._overlaps_3K: Tensor | None = None

    def add(self, batch: Batch, outputs: dict[str, Any]) -> None:
        counts_3K: Tensor = outputs["overlaps_3K"]
        self._overlaps_3K = counts_3K if self._overlaps_3K is None else self._overlaps_3K + counts_3K

    def compute(self, ranks: Ranks) -> dict[str, float]:
        return {} if self._overlaps_3K is None else {"miou": mean_iou(ranks.sum(self._overlaps_3K))}
