"""Outputs of the training modules on fixed inputs, for every kind of part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from m3i_scale.errors import ExportError
from m3i_scale.export.tensors import ExportedModule
from m3i_scale.objective.information import Objective


def trained_outputs(
    objective: Objective, part: ExportedModule, pixels_BCHW: Tensor, tokens: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the outputs of a part by name; names of additional outputs follow a dot. Arguments as for
    `trained_output`."""
    if part.trained is None:
        yield part.name, trained_output(objective, part, pixels_BCHW, tokens)
        return
    with torch.no_grad():
        outputs = part.trained(objective, pixels_BCHW)
    yield part.name, outputs[part.output]
    for name in part.also:
        yield f"{part.name}.{name}", outputs[name]


@torch.no_grad()
def trained_output(
    objective: Objective, part: ExportedModule, pixels_BCHW: Tensor, tokens: Mapping[str, Tensor] | None
) -> Tensor:
    """Return the output of a part for normalized images, as training computes it. Parts that read text need `tokens`:
    `input_ids` and `attention_mask` (T, L)."""
    if part.name == "vision":
        return objective.student.last_hidden_state(pixels_BCHW)
    if part.name == "tokens":
        return torch.cat(objective.student.encode_whole(pixels_BCHW), dim=1)
    if part.name == "backbone":
        _, tokens_BND = objective.student.encode_whole(pixels_BCHW)
        map_BDHW: Tensor = tokens_BND.transpose(1, 2).unflatten(2, objective.student.grid)
        return map_BDHW
    if part.name == "classifier":
        logits_BK: Tensor = _head(objective, "category", pixels_BCHW)[part.label_set]
        return logits_BK
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


def _head(objective: Objective, modality: str, pixels_BCHW: Tensor) -> Any:
    target = next(item for item in objective.recipe.targets if item.modality == modality)
    return objective.heads[target.name](objective.pooled(target.decoder, pixels_BCHW))
