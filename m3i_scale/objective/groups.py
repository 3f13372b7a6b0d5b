"""−log P̂ of one target from one input: the groups k of equation (5), by what is predicted.

A group never asks for the name of a method. It reads encoder, distribution and regulariser from the recipe's row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from m3i_scale.backbones.base import Tokens, gather_tokens
from m3i_scale.data.batch import Batch
from m3i_scale.objective.decoders import ClassToken, Pointwise, TransformerDecoder
from m3i_scale.objective.distributions import (
    PairTargets,
    bernoulli_pairs,
    boltzmann_classes,
    boltzmann_pairs,
    boltzmann_queue,
    boltzmann_samples,
    boltzmann_soft,
    gaussian,
    gaussian_unit,
    unit,
)
from m3i_scale.objective.estimate import gaussian_information
from m3i_scale.objective.heads import standardize
from m3i_scale.objective.inputs import EncodedInput
from m3i_scale.objective.positions import relative_position
from m3i_scale.objective.recipe import TargetSpec
from m3i_scale.objective.recipe_rules import kind_of
from m3i_scale.objective.regularizers import (
    centered_probabilities,
    cross_correlation,
    dense_unigrad,
    mean_entropy,
    pooled_unigrad,
    sharpened_probabilities,
    standardize_target,
    target_correlation,
    variance_covariance,
)
from m3i_scale.objective.targets import patchify

if TYPE_CHECKING:
    from m3i_scale.objective.information import Objective


@dataclass
class Encoded:
    """One encoded input, by image."""

    where: EncodedInput
    cls_B1D: Tensor
    tokens_BLD: Tensor
    """Visible tokens only."""


Outcome = tuple[Tensor, Tensor | None]
"""−log P̂ and its nats: a bound, or the estimate of a Gaussian where one was made."""


@dataclass
class Context:
    """What the targets of one micro-batch share, so that nothing is computed twice."""

    batch: Batch
    views: dict[int, Tensor]
    """Normalised images by view, from 0."""
    inputs: dict[str, Encoded]
    encoded_views: dict[tuple[str, int], Tokens]
    """Views as momentum backbone or teacher see them, by (encoder, view)."""
    text: PairTargets | None = None
    dense: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Standardised dense targets, by (encoder, view)."""
    correlation: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    watched: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What tells whether a group is alive, by group: `z` (…, E), `assignment` (B, K), `scale` (1)."""
    seen: dict[str, dict[tuple[str, int], Tensor]] = field(default_factory=dict)
    """Targets of this batch that a head remembers, by head and (encoder, view)."""


def has_target(target: TargetSpec, batch: Batch) -> Tensor:
    """Which samples have the target: bool (B)."""
    if target.modality == "text":
        return batch.has_text_B
    if target.modality == "category":
        return (batch.labels_B >= 0) & (batch.label_sets_B >= 0)
    return torch.ones_like(batch.has_text_B)


def group(objective: Objective, target: TargetSpec, context: Context, encoded: Encoded) -> Outcome:
    """−log P̂ of `target` from one input, and its nats: a bound, or the estimate of a Gaussian on logged steps."""
    return _GROUPS[kind_of(target)](objective, target, context, encoded)


def _pool(decoder: nn.Module, cls_B1D: Tensor, tokens_BLD: Tensor) -> Tensor:
    pooled_BD: Tensor = decoder(cls_B1D if isinstance(decoder, ClassToken) else tokens_BLD)
    return pooled_BD


# -------------------------------------------------------------------- category and text


def _text(objective: Objective, target: TargetSpec, context: Context, encoded: Encoded) -> tuple[Tensor, Tensor]:
    if context.text is None:
        raise ValueError("a text target without a text tower")
    pooled_BD = _pool(objective.decoders[target.decoder], encoded.cls_B1D, encoded.tokens_BLD)
    prediction_BE, scale, bias = objective.heads[target.name](pooled_BD)
    context.watched[target.name] = {"z": context.text.own_BE[context.batch.has_text_B], "scale": scale}
    if bias is not None:
        return bernoulli_pairs(prediction_BE, context.text, scale, bias, objective.ranks)
    symmetric = target.direction == "both"
    return boltzmann_pairs(prediction_BE, context.text, scale, objective.ranks, symmetric=symmetric)


def _category(objective: Objective, target: TargetSpec, context: Context, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The sum over label sets, weighted by their labelled samples: a mean over all labelled samples."""
    batch, ranks = context.batch, objective.ranks
    pooled_BD = _pool(objective.decoders[target.decoder], encoded.cls_B1D, encoded.tokens_BLD)
    labelled_B = has_target(target, batch)
    total = ranks.sum(labelled_B.sum().float()).clamp(min=1)
    loss, nats = torch.zeros((), device=total.device), torch.zeros((), device=total.device)
    for number, logits_BK in enumerate(objective.heads[target.name](pooled_BD)):
        valid_B = labelled_B & (batch.label_sets_B == number)
        share = ranks.sum(valid_B.sum().float()) / total
        labels_B = batch.labels_B.where(valid_B, 0)  # another set's label may be out of this set's range
        set_loss, set_nats = boltzmann_classes(logits_BK, labels_B, valid_B, target.label_smoothing, ranks)
        loss, nats = loss + share * set_loss, nats + share * set_nats
    return loss, nats


# -------------------------------------------------------------------- dense


def _dense(objective: Objective, target: TargetSpec, context: Context, encoded: Encoded) -> Outcome:
    if target.head is not None:
        return _dense_negatives(objective, target, context, encoded)
    view, ranks = (target.view or 1) - 1, objective.ranks
    query_BQ, decoded_BQD = _decode(objective, target, context, encoded, view)
    prediction_BQD = objective.heads[target.name](decoded_BQD)
    target_BND = _dense_target(objective, target, context, view)
    if target.modality == "image":
        context.watched[target.name] = {"z": target_BND}
    wanted_BQD = gather_tokens(target_BND, query_BQ)
    loss = gaussian(prediction_BQD, wanted_BQD, target.sigma2, ranks)
    if target.regularizer == "unigrad":
        key = (target.encoder, view)
        if key not in context.correlation:
            context.correlation[key] = target_correlation(target_BND, ranks)
        loss = loss + dense_unigrad(prediction_BQD, context.correlation[key], target.unigrad_lambda)
    return loss, _estimate(objective, prediction_BQD.flatten(0, 1), wanted_BQD.flatten(0, 1))


def _estimate(objective: Objective, prediction_ND: Tensor, target_ND: Tensor) -> Tensor | None:
    """Information of a Gaussian group, on steps that are logged: it costs an eigenvalue decomposition."""
    return gaussian_information(prediction_ND, target_ND, objective.ranks) if objective.measure_health else None


def _decode(
    objective: Objective, target: TargetSpec, context: Context, encoded: Encoded, view: int
) -> tuple[Tensor, Tensor]:
    """Which patches of the target view are asked for (B, Q), and the decoder's answers (B, Q, D)."""
    cls_B1D, tokens_BLD, where = encoded.cls_B1D, encoded.tokens_BLD, encoded.where
    if target.encoder == "momentum" and target.head is None and objective.projector is not None:
        tokens_BSD = objective.projector(torch.cat([cls_B1D, tokens_BLD], dim=1))
        cls_B1D, tokens_BLD = tokens_BSD[:, :1], tokens_BSD[:, 1:]
    grid = objective.student.grid
    if target.tokens == "masked":
        query_BQ = where.hidden_BM
    else:
        query_BQ = torch.arange(grid[0] * grid[1], device=tokens_BLD.device).expand(len(tokens_BLD), -1)
    decoder = objective.decoders[target.decoder]
    if isinstance(decoder, Pointwise):
        return query_BQ, decoder(tokens_BLD)
    own, other = _positions(decoder, context.batch, where.view, view, grid)
    return query_BQ, decoder(cls_B1D, tokens_BLD, where.visible_BL, query_BQ, grid, own, other)


def _dense_target(objective: Objective, target: TargetSpec, context: Context, view: int) -> Tensor:
    """z̄ of all patches of a view: (B, N, D)."""
    key = (target.encoder, view)
    if target.encoder == "patchify":
        return patchify(context.views[view], objective.student.patch_size, standardize=target.normalize_pixels)
    if key not in context.dense:
        tokens_BND = context.encoded_views[key][1]
        if target.encoder == "momentum" and objective.momentum is not None:
            with torch.no_grad():
                tokens_BND = objective.momentum.projector(tokens_BND)
        context.dense[key] = standardize_target(tokens_BND)
    return context.dense[key]


def _positions(
    decoder: nn.Module, batch: Batch, view: int, target_view: int, grid: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(decoder, TransformerDecoder) or decoder.position != "relative":
        return None, None

    def relative(to: int) -> Tensor:
        return relative_position(
            batch.crops_VB4[view],
            batch.crops_VB4[to],
            batch.flips_VB[view],
            batch.flips_VB[to],
            batch.sizes_B2[:, 1],
            grid,
            decoder.width,
        )

    own = relative(view)
    return own, own if target_view == view else relative(target_view)


def _dense_negatives(
    objective: Objective, target: TargetSpec, context: Context, encoded: Encoded
) -> tuple[Tensor, Tensor]:
    """Every patch against the patch it stands for and the means of earlier images (DenseCL)."""
    view, name = (target.view or 1) - 1, target.head or ""
    averaged, state = objective.momentum, objective.state(name)
    if averaged is None:
        raise ValueError("dense negatives without a momentum target")
    query_BQ, decoded_BQD = _decode(objective, target, context, encoded, view)
    prediction_BQE = objective.image_head(name)(decoded_BQD, predict=True)
    tokens_BND = context.encoded_views[(target.encoder, view)][1]
    with torch.no_grad():
        keys_BNE = averaged.head(name)(tokens_BND, predict=False)
        similar = target.match == "similarity"
        index_BQ = most_similar(encoded.tokens_BLD, tokens_BND) if similar else query_BQ
        matched_BQE = gather_tokens(keys_BNE, index_BQ)
    context.watched[target.name] = {"z": keys_BNE}
    context.seen.setdefault(name, {})[(target.encoder, view)] = unit(keys_BNE.float().mean(dim=1))
    return boltzmann_queue(
        prediction_BQE.flatten(0, 1),
        matched_BQE.flatten(0, 1),
        state.queue_QE.clone(),
        state.filled.clone(),
        target.temperature,
        objective.ranks,
    )


def most_similar(one_BQD: Tensor, other_BND: Tensor) -> Tensor:
    """For every token of `one`, the index of the token of `other` with the largest cosine: int64 (B, Q)."""
    return (unit(one_BQD.detach()) @ unit(other_BND.detach()).transpose(1, 2)).argmax(dim=-1)


# -------------------------------------------------------------------- pooled


def _pooled(objective: Objective, target: TargetSpec, context: Context, encoded: Encoded) -> Outcome:
    name, ranks = target.head or "", objective.ranks
    pooled_BD = _pool(objective.decoders[target.decoder], encoded.cls_B1D, encoded.tokens_BLD)
    prediction_BE = objective.image_head(name)(pooled_BD, predict=True)
    target_BE = _pooled_target(objective, target, context)
    context.watched[target.name] = {"z": target_BE}
    if target.distribution == "boltzmann":
        if target.regularizer == "negatives":
            return _negatives(objective, target, context, prediction_BE, target_BE)
        return _prototypes(objective, target, context, prediction_BE, target_BE)
    if target.regularizer == "cross_correlation":
        loss = cross_correlation(prediction_BE, target_BE, target.offdiagonal_weight, ranks)
        if not objective.measure_health:
            return loss, None
        with torch.no_grad():
            sides = [standardize(side.float(), ranks) for side in (prediction_BE, target_BE)]
        return loss, _estimate(objective, sides[0], sides[1])
    if target.regularizer == "variance_covariance":
        loss = gaussian(prediction_BE[:, None], target_BE[:, None], target.sigma2, ranks)
        for side_BE in (prediction_BE, target_BE):
            loss = loss + variance_covariance(side_BE, target.variance_weight, target.covariance_weight, ranks)
        return loss, _estimate(objective, prediction_BE, target_BE)
    loss = gaussian_unit(prediction_BE, target_BE, target.sigma2, ranks)
    if target.regularizer == "unigrad":
        state = objective.state(name)
        _remember(context, target, unit(target_BE))
        loss = loss + pooled_unigrad(unit(prediction_BE), state.correlation_EE.clone(), target.unigrad_lambda, ranks)
    return loss, _estimate(objective, unit(prediction_BE), unit(target_BE))


def _pooled_target(objective: Objective, target: TargetSpec, context: Context) -> Tensor:
    """z_y (B, E), with gradient only where the regulariser lets the target learn."""
    view, name = (target.view or 1) - 1, target.head or ""
    if target.encoder == "online":
        shown = context.inputs[objective.recipe.shows(view + 1) or ""]
        shown = objective.tap(target.name, shown)
        pooled_BD = _pool(objective.decoders[target.decoder], shown.cls_B1D, shown.tokens_BLD)
        z_BE: Tensor = objective.image_head(name)(pooled_BD, predict=False)
        return z_BE.detach() if target.regularizer == "stop_gradient" else z_BE
    cls_B1D, tokens_BND = context.encoded_views[(target.encoder, view)]
    if target.encoder == "teacher":
        decoder = objective.decoders[target.decoder]
        return cls_B1D[:, 0] if isinstance(decoder, ClassToken) else tokens_BND.mean(dim=1)
    averaged = objective.momentum
    if averaged is None:
        raise ValueError("a momentum target without its encoder")
    with torch.no_grad():
        pooled_BD = _pool(averaged.pools[target.decoder], cls_B1D, tokens_BND)
        averaged_BE: Tensor = averaged.head(name)(pooled_BD, predict=False)
    return averaged_BE


def _negatives(
    objective: Objective, target: TargetSpec, context: Context, prediction_BE: Tensor, target_BE: Tensor
) -> tuple[Tensor, Tensor]:
    state = objective.state(target.head)
    if len(state.queue_QE) == 0:
        both = target.candidates == "both"
        return boltzmann_samples(prediction_BE, target_BE, target.temperature, objective.ranks, both=both)
    _remember(context, target, unit(target_BE))
    return boltzmann_queue(
        prediction_BE, target_BE, state.queue_QE.clone(), state.filled.clone(), target.temperature, objective.ranks
    )


def _prototypes(
    objective: Objective, target: TargetSpec, context: Context, prediction_BE: Tensor, target_BE: Tensor
) -> tuple[Tensor, Tensor]:
    """A distribution over prototypes against that of the target."""
    name, ranks = target.head or "", objective.ranks
    prototypes = objective.image_head(name).cosines
    logits_BK = prototypes(prediction_BE) / target.temperature
    if target.regularizer == "centering":
        averaged = objective.momentum
        if averaged is None:
            raise ValueError("a momentum target without its encoder")
        with torch.no_grad():
            target_BK = averaged.head(name).cosines(target_BE)
        probabilities_BK = centered_probabilities(target_BK, objective.state(name).center_K, target.target_temperature)
        _remember(context, target, target_BK)
        context.watched[target.name] = {"assignment": probabilities_BK}
        return boltzmann_soft(logits_BK, probabilities_BK, ranks)
    with torch.no_grad():
        target_BK = prototypes(target_BE) / target.temperature
        probabilities_BK = sharpened_probabilities(target_BK, target.target_temperature)
    context.watched[target.name] = {"assignment": probabilities_BK}
    loss, nats = boltzmann_soft(logits_BK, probabilities_BK, ranks)
    return loss + target.entropy_weight * mean_entropy(logits_BK.softmax(dim=-1), ranks), nats


def _remember(context: Context, target: TargetSpec, value: Tensor) -> None:
    """Once per view, however many inputs predict it."""
    context.seen.setdefault(target.head or "", {})[(target.encoder, (target.view or 1) - 1)] = value.detach()


def update_states(objective: Objective, context: Context) -> None:
    """After all groups of a training batch: heads take over what they remember, the same on all ranks."""
    for name, by_view in context.seen.items():
        state, values = objective.state(name), torch.cat(list(by_view.values()))
        if len(state.center_K):
            state.update_center(values, objective.ranks)
        if len(state.correlation_EE):
            state.update_correlation(values, objective.ranks)
        if len(state.queue_QE):
            state.enqueue(values, objective.ranks)


_Group = Callable[["Objective", TargetSpec, Context, Encoded], Outcome]
_GROUPS: dict[str, _Group] = {
    "text": _text,
    "category": _category,
    "pixels": _dense,
    "dense": _dense,
    "pooled": _pooled,
}
