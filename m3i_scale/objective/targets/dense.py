"""Patch-level targets: pixels, features, and features contrasted with other images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.config.sections import MAX_LAYERS
from m3i_scale.objective.diagnostics import gaussian_moments
from m3i_scale.objective.distributions import Boltzmann, Density, Gaussian, Loss, unit
from m3i_scale.objective.regularizers import DenseRegularizer, NoRegularizer
from m3i_scale.objective.regularizers.pooled import QueuedNegatives
from m3i_scale.objective.targets.base import Context, Encoded, HeadTarget, Parts, Sizes, TargetModules
from m3i_scale.objective.targets.patches import PatchTarget, PredictedPatches, standardize_tokens


class Dense(PatchTarget):
    """Patch-level features, predicted under a density."""

    kind: ClassVar[str] = "dense"
    representation: ClassVar[str] = "patch features"
    encoder: Literal["ema", "teacher"]
    distribution: Density = Gaussian()
    regularizer: DenseRegularizer
    layers: int = Field(default=1, ge=1, le=MAX_LAYERS)
    """Number of last layers averaged into z_y (data2vec 2.0). The output of each layer is standardized per channel over
    the patches of the image. With 1, z_y is the backbone's output."""

    @property
    def projected(self) -> bool:
        """Return whether prediction and target use the residual projector."""
        return self.encoder == "ema" and self.layers == 1

    def build_head(self, sizes: Sizes) -> nn.Module:
        return DenseHead(sizes.decoded, sizes.encoded)

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        if self.projected and given.projector is not None:
            tokens_BSD = given.projector(torch.cat([encoded.cls_BND, encoded.tokens_BLD], dim=1))
            encoded = replace(encoded, cls_BND=tokens_BSD[:, :1], tokens_BLD=tokens_BSD[:, 1:])
        query_BQ, decoded_BQD = self.decode(given, context, encoded)
        prediction_BQD = given.head(decoded_BQD)
        target_BND = self._target(given, context)
        wanted_BQD = gather_tokens(target_BND, query_BQ)
        self.collect(given, context)
        statistics = context.statistics[self._statistics_key]
        value = self.regularizer.loss(self.distribution, prediction_BQD, wanted_BQD, statistics, given.ranks)
        encoded_by_model = (self.encoder_key, self.view) in context.encoded_views
        loss = Loss(value, watched={"z": target_BND} if encoded_by_model else {})  # pixels cannot collapse
        if context.measures:
            loss.moments = gaussian_moments(prediction_BQD.flatten(0, 1), wanted_BQD.flatten(0, 1), given.ranks)
        return loss

    @property
    def has_statistics(self) -> bool:
        return self.regularizer.has_statistics

    def collect(self, given: TargetModules, context: Context) -> None:
        key = self._statistics_key
        if key not in context.statistics:
            context.statistics[key] = self.regularizer.statistics(self._target(given, context), given.ranks)

    @property
    def _statistics_key(self) -> tuple[str, str, int, int]:
        return self.regularizer.model_dump_json(), self.encoder_key, self.view, self.layers

    def _target(self, given: TargetModules, context: Context) -> Tensor:
        key = (self.encoder_key, self.view, self.layers)
        if key not in context.dense:
            if self.layers > 1:
                tokens_BND = average_layers(context.layers[self.encoder_key, self.view][-self.layers :])
            else:
                cls_B1D, tokens_BND = context.encoded_views[self.encoder_key, self.view]
                if self.projected:
                    projector = given.momentum.projector
                    with torch.no_grad():
                        if projector.before_norm:  # its blocks attend to the class token
                            tokens_BND = projector(torch.cat([cls_B1D, tokens_BND], dim=1))[:, 1:]
                        else:
                            tokens_BND = projector(tokens_BND)
            context.dense[key] = standardize_tokens(tokens_BND.detach())
        return context.dense[key]

    def _errors(self, parts: Parts) -> Iterator[str]:
        yield from super()._errors(parts)
        if self.layers > 1 and self.encoder != "ema":
            yield f"`layers` are those of the averaged backbone: not with `encoder: {self.encoder}`"


class Pixels(Dense):
    """Pixels of every patch."""

    kind: ClassVar[str] = "pixels"
    modality: ClassVar[str] = "pixels"
    representation: ClassVar[str] = "dense pixels"
    encoder: Literal["patchify"] = "patchify"  # type: ignore[assignment]
    regularizer: DenseRegularizer = NoRegularizer()
    normalize_pixels: bool = True
    """Standardize the pixels of each patch (MAE)."""

    def build_head(self, sizes: Sizes) -> nn.Module:
        return DenseHead(sizes.decoded, 3 * sizes.backbone.patch_size**2)

    def _target(self, given: TargetModules, context: Context) -> Tensor:
        return patchify(context.views[self.view], given.patch_size, standardize=self.normalize_pixels)


class DenseNegatives(PatchTarget, HeadTarget):
    """Dense contrastive learning: every patch against its matching patch and the means of earlier images (DenseCL)."""

    kind: ClassVar[str] = "dense_negatives"
    representation: ClassVar[str] = "patch features"
    compares_tokens: ClassVar[bool] = True
    tokens: PredictedPatches = "all"
    encoder: Literal["ema"] = "ema"
    distribution: Boltzmann = Boltzmann()
    regularizer: QueuedNegatives
    match: Literal["position", "similarity"] = "position"
    """Matching patch in the target view: the one at the same position, or with the most similar backbone feature."""

    @property
    def finds_places(self) -> bool:
        return self.match == "similarity"

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        query_BQ, decoded_BQD = self.decode(given, context, encoded)
        prediction_BQE = given.head(decoded_BQD, predict=True)
        tokens_BND = context.encoded_views[self.encoder_key, self.view][1]
        with torch.no_grad():
            keys_BNE = given.momentum.heads[self.head](tokens_BND, predict=False)
            index_BQ = most_similar(encoded.tokens_BLD, tokens_BND) if self.finds_places else query_BQ
            matched_BQE = gather_tokens(keys_BNE, index_BQ)
        rows_NE, keys_NE = prediction_BQE.flatten(0, 1), matched_BQE.flatten(0, 1)
        loss = self.regularizer.loss(self.distribution, rows_NE, keys_NE, given.memory, given.ranks)
        loss.remember, loss.watched = unit(keys_BNE.float().mean(dim=1)), {"z": keys_BNE}
        return loss


def most_similar(one_BQD: Tensor, other_BND: Tensor) -> Tensor:
    """Return the index of the token in `other` with the largest cosine for every token in `one`: int64 (B, Q)."""
    return (unit(one_BQD.detach()) @ unit(other_BND.detach()).transpose(1, 2)).argmax(dim=-1)


def average_layers(layers: list[Tensor]) -> Tensor:
    """Average maps (B, D, H, W), each standardized per image and channel over its patches: fp32 (B, N, D), no gradient.
    Same as the targets of data2vec 2.0 (`instance_norm_target_layer`)."""
    normed = [F.instance_norm(map_BDHW.detach().float()) for map_BDHW in layers]
    return torch.stack(normed).mean(dim=0).flatten(2).transpose(1, 2)


class DenseHead(nn.Module):
    """Linear projection of every token to ẑ_y of a dense target."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(input_width, width)

    def forward(self, tokens_BQD: Tensor) -> Tensor:
        """Project tokens: (B, Q, D) → (B, Q, width)."""
        prediction_BQD: Tensor = self.projection(tokens_BQD)
        return prediction_BQD


def patchify(images_BCHW: Tensor, patch: int, *, standardize: bool) -> Tensor:
    """Split images into row-major patches, channel last (MAE): (B, N, patch²·3). With `standardize`, each patch has
    mean 0 and (unbiased) variance 1."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch, width // patch
    blocks = images_BCHW.reshape(batch, channels, rows, patch, columns, patch)
    pixels_BNP = blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)
    if standardize:
        mean_BN1, std_BN1 = patch_moments(pixels_BNP)
        pixels_BNP = (pixels_BNP - mean_BN1) / std_BN1
    return pixels_BNP


def patch_moments(pixels_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (unbiased) std of every patch: (B, N, 1) each."""
    return pixels_BNP.mean(dim=-1, keepdim=True), (pixels_BNP.var(dim=-1, keepdim=True) + 1e-6).sqrt()
