"""Outputs of the training modules on fixed inputs, for every kind of part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from m3i_scale.errors import ExportError
from m3i_scale.hub.tensors import ExportedModule
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.detection.modeling_mask_rcnn import joined
from m3i_scale.tasks.detection.object_detector import detect, detector_of
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector
from m3i_scale.tasks.segmentation.mask_queries import MaskQueries
from m3i_scale.tasks.segmentation.pixel_heads import segment


def trained_outputs(
    objective: Objective, part: ExportedModule, pixels_BCHW: Tensor, tokens: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the outputs of a part by name, and additional outputs by name after a dot; arguments and errors as for
    `trained_output`."""
    if part.name != "detector":
        yield part.name, trained_output(objective, part, pixels_BCHW, tokens)
        return
    detector, whole_B2 = detector_of(objective), torch.tensor([pixels_BCHW.shape[2:]] * len(pixels_BCHW))
    if isinstance(detector, RfDetrDetector):
        with torch.no_grad():
            found = detector.predict(detector.encode(objective.student, pixels_BCHW))[0]
    else:
        found = joined(detect(objective, pixels_BCHW, whole_B2, whole_B2))
    yield part.name, found[part.output]
    for name in part.also:
        yield f"{part.name}.{name}", found[name]


@torch.no_grad()
def trained_output(
    objective: Objective, part: ExportedModule, pixels_BCHW: Tensor, tokens: Mapping[str, Tensor] | None
) -> Tensor:
    """Return the output of a part as training computes it.

    Args:
        objective: the training modules, with loaded weights.
        part: the exported model.
        pixels_BCHW: normalized images.
        tokens: `input_ids` and `attention_mask` (T, L), for parts that read text.
    """
    if part.name == "vision":
        return objective.student.last_hidden_state(pixels_BCHW)
    if part.name == "tokens":
        return torch.cat(objective.student.encode_whole(pixels_BCHW), dim=1)
    if part.name == "backbone":
        _, tokens_BND = objective.student.encode_whole(pixels_BCHW)
        map_BDHW: Tensor = tokens_BND.transpose(1, 2).unflatten(2, objective.student.grid)
        return map_BDHW
    if part.output in ("logits", "masks_queries_logits"):
        return _logits(objective, part, pixels_BCHW)
    if tokens is None or objective.text is None:
        raise ExportError("the recipe has no text target", where=part.name)
    if part.name == "text":
        output = objective.text.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        hidden: Tensor = output.last_hidden_state
        return hidden
    images_BE, scale, _ = _head(objective, "text", pixels_BCHW)
    texts_TE = objective.embed_text(tokens["input_ids"], tokens["attention_mask"].bool())
    similar: Tensor = scale * (images_BE @ texts_TE.T)
    return similar


def _logits(objective: Objective, part: ExportedModule, pixels_BCHW: Tensor) -> Tensor:
    """Return logits: of a classifier (B, K), of a segmenter at input resolution (B, K, H, W), or query masks (B, Q, H,
    W)."""
    if part.name == "classifier":
        logits_BK: Tensor = _head(objective, "category", pixels_BCHW)[part.label_set]
        return logits_BK
    queries = next((head for head in objective.heads.values() if isinstance(head, MaskQueries)), None)
    if queries is not None:
        return queries.encode_view(objective.student, pixels_BCHW, 1.0)[1][-1]
    return segment(objective, pixels_BCHW)


def _head(objective: Objective, modality: str, pixels_BCHW: Tensor) -> Any:
    target = next(item for item in objective.recipe.targets if item.modality == modality)
    return objective.heads[target.name](objective.pooled(target.decoder, pixels_BCHW))
