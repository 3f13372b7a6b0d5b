"""I(z_x; z_y | t_x, t_y): the weighted sum of −log P̂_k over groups of targets (equations 2, 5 and 6).

One module, one forward pass: every rank runs the same submodules in the same order on every batch; what a sample lacks
is masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from m3i_scale.backbones.vit import Backbone
from m3i_scale.data.batch import Batch
from m3i_scale.objective.decoders import TransformerDecoder
from m3i_scale.objective.distributions import PairTargets, boltzmann_classes, boltzmann_pairs, gather_targets, gaussian
from m3i_scale.objective.health import feature_health
from m3i_scale.objective.inputs import EncodedInput, build_inputs, gather_tokens, normalize
from m3i_scale.objective.positions import relative_position
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.recipe import Recipe, TargetSpec
from m3i_scale.objective.regularizers import dense_unigrad, standardize_target, target_correlation
from m3i_scale.objective.targets import MomentumTarget, Projector, TextTower, patchify


@dataclass
class Encoded:
    """One encoded input, by image."""

    where: EncodedInput
    cls_B1D: Tensor
    tokens_BLD: Tensor
    """Visible tokens only."""


@dataclass
class Context:
    """What the targets of one micro-batch share, so that nothing is computed twice."""

    batch: Batch
    views: dict[int, Tensor]
    """Normalised images by view, from 0."""
    inputs: dict[str, Encoded]
    momentum: dict[int, Tensor]
    """Standardised momentum tokens by view."""
    correlation: dict[int, Tensor] = field(default_factory=dict)
    text: PairTargets | None = None


class Objective(nn.Module):
    """All modules of a recipe. Built by `m3i_scale.objective.build.build_objective`."""

    def __init__(
        self,
        recipe: Recipe,
        student: Backbone,
        decoders: nn.ModuleDict,
        heads: nn.ModuleDict,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        mixed_attention: bool,
        ranks: Ranks,
        projector: Projector | None = None,
        momentum: MomentumTarget | None = None,
        text: TextTower | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = student
        self.projector = projector
        self.momentum = momentum
        self.text = text
        self.decoders = decoders
        self.heads = heads
        self.mean, self.std = mean, std
        self.mixed_attention = mixed_attention
        self.ranks = ranks
        self.measure_health = False
        """Set on steps that are logged: the effective rank costs an eigenvalue decomposition."""
        self.token_count = 0
        """Visible patch tokens of the last forward pass."""
        self.squared_grad_norms: dict[str, list[Tensor]] = {}
        """Filled by the backward pass: per group, squared norms of the gradient at the encoder output."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch, and detached figures `<group>/loss`, `<group>/count`, `<group>/nats`, `health/…`.

        The mean over ranks of the loss, and of each figure, is that of the global batch.
        """
        context = self._encode(batch)
        self.token_count = sum(encoded.tokens_BLD.shape[:2].numel() for encoded in context.inputs.values())
        self.squared_grad_norms = {target.name: [] for target in self.recipe.targets}
        total = torch.zeros((), device=batch.seeds_B.device)
        figures: dict[str, Tensor] = {}
        for target in self.recipe.targets:
            losses, nats = zip(*[self._group(target, context, name) for name in target.inputs], strict=True)
            loss = torch.stack(losses).mean()
            total = total + target.weight * loss
            figures[f"{target.name}/loss"] = loss.detach()
            figures[f"{target.name}/count"] = self._has(target, batch).sum().float() * self.ranks.world_size
            if target.distribution == "boltzmann":
                figures[f"{target.name}/nats"] = torch.stack(nats).mean().detach()
        if self.measure_health:
            figures |= self._health(context)
        return total, figures

    # ---------------------------------------------------------------- inputs

    def _encode(self, batch: Batch) -> Context:
        used = sorted(
            {spec.view - 1 for spec in self.recipe.inputs} | {t.view - 1 for t in self.recipe.targets if t.view}
        )
        views = {view: normalize(batch.images_VBCHW[view], self.mean, self.std) for view in used}
        where = build_inputs(self.recipe, batch.seeds_B, self.student.grid)
        inputs = self._encode_mixed(where, views) if self._is_mixed else self._encode_own(where, views)
        momentum = {}
        if self.momentum is not None:
            wanted = sorted({t.view - 1 for t in self.recipe.targets if t.encoder == "momentum" and t.view})
            momentum = {view: standardize_target(self.momentum(views[view])) for view in wanted}
        context = Context(batch, views, inputs, momentum)
        if self.text is not None:
            text_BE = self.text(batch.text_ids_BT, batch.text_mask_BT)
            context.text = gather_targets(text_BE, batch.captions_B, batch.has_text_B, self.ranks)
        return context

    @property
    def _is_mixed(self) -> bool:
        return self.recipe.mix is not None and self.mixed_attention

    def _visible(self, where: list[EncodedInput], views: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Embedded class token and visible patch tokens of every input, in one call of the embedding per length."""
        names = sorted({spec.view for spec in where})
        cls_VB1D, tokens_VBND = self.student.embed(torch.cat([views[view] for view in names]))
        batch = len(where[0].visible_BL)
        cls = dict(zip(names, cls_VB1D.split(batch), strict=True))
        tokens = dict(zip(names, tokens_VBND.split(batch), strict=True))
        return [(cls[spec.view], gather_tokens(tokens[spec.view], spec.visible_BL)) for spec in where]

    def _encode_own(self, where: list[EncodedInput], views: dict[int, Tensor]) -> dict[str, Encoded]:
        """Tokens attend within their own image: every input is a sequence of its own.

        Inputs of one length go through the backbone together.
        """
        sequences = [torch.cat(pair, dim=1) for pair in self._visible(where, views)]
        encoded: dict[str, Encoded] = {}
        for length in sorted({sequence.shape[1] for sequence in sequences}):
            members = [k for k, sequence in enumerate(sequences) if sequence.shape[1] == length]
            output = self.student.encode(torch.cat([sequences[k] for k in members]))
            for k, part_BLD in zip(members, output.split(len(sequences[0])), strict=True):
                encoded[where[k].name] = Encoded(where[k], part_BLD[:, :1], part_BLD[:, 1:])
        return encoded

    def _encode_mixed(self, where: list[EncodedInput], views: dict[int, Tensor]) -> dict[str, Encoded]:
        """Tokens attend across the images of a mix: one sequence per row, with the class token of the first image."""
        visible = self._visible(where, views)
        rows = [tokens[spec.image_of_row_B] for spec, (_, tokens) in zip(where, visible, strict=True)]
        output_BSD = self.student.encode(torch.cat([visible[0][0], *rows], dim=1))
        parts = output_BSD[:, 1:].split([row.shape[1] for row in rows], dim=1)
        encoded = {}
        for spec, part_BLD in zip(where, parts, strict=True):
            row_B = spec.row_of_image_B
            encoded[spec.name] = Encoded(spec, output_BSD[row_B, :1], part_BLD[row_B])
        return encoded

    # ---------------------------------------------------------------- targets

    def _has(self, target: TargetSpec, batch: Batch) -> Tensor:
        """Which samples have the target: bool (B)."""
        if target.modality == "text":
            return batch.has_text_B
        if target.modality == "category":
            return (batch.labels_B >= 0) & (batch.label_sets_B >= 0)
        return torch.ones_like(batch.has_text_B)

    def _group(self, target: TargetSpec, context: Context, name: str) -> tuple[Tensor, Tensor]:
        """−log P̂ of one target from one input, and its nats (0 for a Gaussian)."""
        encoded = context.inputs[name]
        tokens_BLD = self._tap(target.name, encoded.tokens_BLD)
        if target.modality in ("pixels", "image"):
            return self._dense(target, context, encoded, tokens_BLD), torch.zeros(())
        pooled_BD = self.decoders[target.decoder](tokens_BLD)
        if target.modality == "text":
            return self._text(target, context, pooled_BD)
        return self._category(target, context.batch, pooled_BD)

    def _text(self, target: TargetSpec, context: Context, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        if context.text is None:
            raise ValueError("a text target without a text tower")
        prediction_BE, scale = self.heads[target.name](pooled_BD)
        return boltzmann_pairs(prediction_BE, context.text, scale, self.ranks)

    def _category(self, target: TargetSpec, batch: Batch, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over label sets, weighted by their labelled samples: a mean over all labelled samples."""
        labelled_B = self._has(target, batch)
        total = self.ranks.sum(labelled_B.sum().float()).clamp(min=1)
        loss, nats = torch.zeros((), device=total.device), torch.zeros((), device=total.device)
        for number, logits_BK in enumerate(self.heads[target.name](pooled_BD)):
            valid_B = labelled_B & (batch.label_sets_B == number)
            share = self.ranks.sum(valid_B.sum().float()) / total
            labels_B = batch.labels_B.where(valid_B, 0)  # another set's label may be out of this set's range
            set_loss, set_nats = boltzmann_classes(logits_BK, labels_B, valid_B, target.label_smoothing, self.ranks)
            loss, nats = loss + share * set_loss, nats + share * set_nats
        return loss, nats

    def _dense(self, target: TargetSpec, context: Context, encoded: Encoded, tokens_BLD: Tensor) -> Tensor:
        view = (target.view or 1) - 1
        batch, where = context.batch, encoded.where
        cls_B1D = encoded.cls_B1D
        if target.encoder == "momentum" and self.projector is not None:
            cls_B1D, tokens_BLD = self.projector(torch.cat([cls_B1D, tokens_BLD], dim=1)).split(
                [1, tokens_BLD.shape[1]], dim=1
            )
        if target.tokens == "masked":
            query_BQ = where.hidden_BM
        else:
            patches = self.student.grid[0] * self.student.grid[1]
            query_BQ = torch.arange(patches, device=tokens_BLD.device).expand(len(tokens_BLD), -1)
        decoder = self.decoders[target.decoder]
        own, other = self._positions(decoder, batch, where.view, view)
        decoded_BQD = decoder(cls_B1D, tokens_BLD, where.visible_BL, query_BQ, self.student.grid, own, other)
        prediction_BQD = self.heads[target.name](decoded_BQD)
        target_BND = self._dense_target(target, context, view)
        loss = gaussian(prediction_BQD, gather_tokens(target_BND, query_BQ), target.sigma2, self.ranks)
        if target.regularizer == "unigrad":
            if view not in context.correlation:
                context.correlation[view] = target_correlation(target_BND, self.ranks)
            loss = loss + dense_unigrad(prediction_BQD, context.correlation[view], target.unigrad_lambda)
        return loss

    def _dense_target(self, target: TargetSpec, context: Context, view: int) -> Tensor:
        if target.encoder == "momentum":
            return context.momentum[view]
        return patchify(context.views[view], self.student.patch_size, standardize=target.normalize_pixels)

    def _positions(
        self, decoder: nn.Module, batch: Batch, view: int, target_view: int
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
                self.student.grid,
                decoder.width,
            )

        own = relative(view)
        return own, own if target_view == view else relative(target_view)

    # ---------------------------------------------------------------- what is watched

    def _tap(self, name: str, tokens_BLD: Tensor) -> Tensor:
        """An alias of the encoder output for one group: the gradient that arrives through it is the group's own."""
        if not tokens_BLD.requires_grad:
            return tokens_BLD
        alias_BLD = tokens_BLD.view_as(tokens_BLD)
        norms = self.squared_grad_norms[name]
        alias_BLD.register_hook(lambda gradient: norms.append(gradient.detach().float().square().sum()))
        return alias_BLD

    def _health(self, context: Context) -> dict[str, Tensor]:
        first = context.inputs[self.recipe.inputs[0].name].tokens_BLD
        watched = {"dense": first.flatten(0, 1), "pooled": first.mean(dim=1)}
        for view, tokens_BND in context.momentum.items():
            watched[f"target_view{view + 1}"] = tokens_BND.flatten(0, 1)
        return {
            f"health/{name}_{figure}": value
            for name, features_ND in watched.items()
            for figure, value in feature_health(features_ND).items()
        }

    # ---------------------------------------------------------------- inference

    @torch.no_grad()
    def embed_images(self, images_BCHW: Tensor, target: str) -> Tensor:
        """Whole images (uint8) in the space of a global target: unit vectors of a text target, logits of a category.

        A category target with several label sets gives the logits of all sets side by side.
        """
        spec = next(item for item in self.recipe.targets if item.name == target)
        cls_B1D, tokens_BND = self.student.embed(normalize(images_BCHW, self.mean, self.std))
        encoded_BSD = self.student.encode(torch.cat([cls_B1D, tokens_BND], dim=1))
        output = self.heads[target](self.decoders[spec.decoder](encoded_BSD[:, 1:]))
        return output[0] if spec.modality == "text" else torch.cat(output, dim=1)

    @torch.no_grad()
    def embed_text(self, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Captions as unit vectors (B, E).

        Raises:
            ValueError: the recipe has no text target.
        """
        if self.text is None:
            raise ValueError("the recipe has no text target")
        embedded_BE: Tensor = self.text(text_ids_BT, text_mask_BT)
        return embedded_BE
