"""I(z_x; z_y | t_x, t_y): inputs → one backbone → loss terms (equations 2, 5 and 6).

One module with one forward pass: every rank runs the same submodules in the same order on every batch. Samples without
a target are masked out of its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from m3i_scale.backbones.base import Backbone, MaskedPatches, MaskToken
from m3i_scale.data.batch import Batch
from m3i_scale.objective.balance import GroupWeights
from m3i_scale.objective.decoders import blocks_read, pool
from m3i_scale.objective.diagnostics import HostFigures, health_figures, mean_information
from m3i_scale.objective.encoders import EmaTeacher, Projector
from m3i_scale.objective.heads import BackboneReader, BatchNorm
from m3i_scale.objective.inputs import EncodedInput, PixelNorm, build_inputs
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.regularizers import Memory
from m3i_scale.objective.schedule import settled
from m3i_scale.objective.step_features import Features, StepFeatures, without_images
from m3i_scale.objective.targets.base import Context, Encoded, HeadTarget, ImageTarget, Target, TargetModules
from m3i_scale.objective.targets.text import gather_targets
from m3i_scale.objective.text_tower import TextTower

EMA_PREFIX, TEACHERS_PREFIX = "momentum.", "teachers."
"""Prefixes of the parameter names of an `Objective`'s EMA teacher and of its frozen teachers."""
Role = Literal["trained", "ema", "teacher", "frozen"]


class Objective(nn.Module):
    """All modules of a recipe. `m3i_scale.objective.build.build_objective` builds it."""

    def __init__(
        self,
        recipe: Recipe,
        student: Backbone,
        decoders: nn.ModuleDict,
        heads: nn.ModuleDict,
        *,
        pixel_norm: PixelNorm,
        mixed_attention: bool,
        ranks: Ranks,
        weights: GroupWeights,
        image_heads: nn.ModuleDict,
        states: nn.ModuleDict,
        projector: Projector | None,
        ema_teacher: EmaTeacher | None,
        teachers: nn.ModuleDict,
        text: TextTower | None,
        mask_token: MaskToken | None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = student
        self.projector = projector
        self.momentum = ema_teacher
        """EMA teacher. Its name is part of the file format: checkpoints have its parameters as `average/momentum.…`."""
        self.teachers = teachers
        self.text = text
        self.mask_token = mask_token
        """Replaces the masked patches of inputs with `masked: mask_token`."""
        self.decoders = decoders
        self.heads = heads
        """Heads by target."""
        self.image_heads = image_heads
        """Heads by their name in the recipe."""
        self.states = states
        """Memories of these heads, by `HeadTarget.memory_name`."""
        self.weights = weights
        self.pixel_norm = pixel_norm
        self.mixed_attention = mixed_attention
        self.ranks = ranks
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.ranks = ranks
        self.measure_health = False
        """Set on logged steps only: effective ranks and Gaussian information cost eigenvalue decompositions."""
        self.host_figures = HostFigures()
        """Metrics of the last forward pass that measured health: `<target>/nats` of Gaussian loss terms, and `_std`,
        `_rank` and `_spread` of `health/`."""
        self.progress = 0.0
        """Fraction of the training that is done. The trainer sets it before every step."""
        self.mix_labelled: Callable[[Batch], Batch] = lambda batch: batch
        """Mixes labeled images (e.g. MixUp) during training if a task asks for it."""
        self.token_count = 0
        """Visible patch tokens in the last forward pass."""
        self.outputs: dict[str, dict[str, Any]] = {}
        """`Loss.outputs` of the last forward pass in evaluation mode, by target."""
        self.squared_grad_norms: dict[str, list[Tensor]] = {target.name: [] for target in recipe.targets}
        """Squared gradient norms at the encoder output per loss term. The backward pass fills the lists."""
        self.span: Callable[[str], AbstractContextManager[Any]] = nullcontext
        """Context manager around each part of a forward pass, for profilers: `forward` (inputs), `teacher` (f_φ of
        images and texts), `heads` (decoders, heads, losses)."""

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. A frozen backbone or text encoder stays in evaluation mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            self.student.eval()
        if self.text is not None and not any(parameter.requires_grad for parameter in self.text.parameters()):
            self.text.eval()
        return self

    def forward(self, batch: Batch, step: StepFeatures | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch and its metrics, such as `<target>/loss`, `<target>/count`, `<target>/nats`
        and `health/…`.

        The mean of the loss and of each metric over ranks equals its value for the global batch. `host_figures` returns
        further metrics; for dense features they cover only the tokens of this rank.

        With `step`, image-level losses and statistics of patches cover all micro-batches of the step. Call it first
        without gradient for all micro-batches but the first, which only caches their features in `step`.
        """
        ahead = step is not None and not torch.is_grad_enabled()
        if self.measure_health and not ahead:
            self.host_figures.clear()
        context = self._encode(self.mix_labelled(batch) if self.training else batch, step, ahead=ahead)
        with self.span("heads"):
            if step is None:
                return self._predict(context, context)
            if step.present is None:
                step.present = self._features(context)
            if ahead:
                return torch.zeros((), device=batch.images_VBCHW.device), {}
            context = joint = step.with_statistics(context)
            if self.recipe.has_image_level:
                targets = (target for target in self.recipe.image_targets if target.is_image_level)
                joint = step.join(context, {(target.encoder_key, target.view) for target in targets})
                self._pair_texts(joint)
            return self._predict(context, joint, remembers=step.is_last)

    def _predict(
        self, of_batch: Context, joint: Context, *, remembers: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics. Image-level targets use `joint`, which may cover several micro-batches."""
        self.token_count = sum(
            part.tokens_BLD.shape[:2].numel() for parts in of_batch.inputs.values() for part in parts
        )
        self.squared_grad_norms = {target.name: [] for target in self.recipe.targets}
        self.outputs = {}
        figures: dict[str, Tensor] = {}
        watched: dict[str, dict[str, Tensor]] = {}
        remember: dict[str, dict[tuple[str, int], Tensor]] = {}  # once per view, for all inputs
        losses = []
        counts: dict[str, Tensor] = {}
        grid = self.student.grid_of(of_batch.batch.images_VBCHW)
        for described in self.recipe.targets:
            target = settled(described, self.progress)
            context = joint if target.is_image_level else of_batch
            given = self.target_modules(target, grid)
            parts = [part.tapped(given.squared_norms) for part in target.sources(context)]
            by_input = target.losses(given, context, parts)
            for loss in by_input:
                watched[target.name] = loss.watched
                if loss.top_1 is not None:
                    figures[f"{target.name}/top_1"] = loss.top_1
                figures |= {f"{target.name}/{name}": term.detach() for name, term in loss.terms.items()}
                if loss.outputs:
                    self.outputs[target.name] = loss.outputs
                if isinstance(target, HeadTarget) and loss.remember is not None:
                    by_view = remember.setdefault(target.memory_name, {})
                    by_view[target.encoder_key, target.view] = loss.remember.detach()
            losses.append(torch.stack([loss.value for loss in by_input]).mean())
            figures[f"{target.name}/loss"] = losses[-1].detach()
            figures[f"{target.name}/count"] = counts[target.name] = context.counts[target.name]
            nats = [loss.nats for loss in by_input if loss.nats is not None]
            if nats:
                figures[f"{target.name}/nats"] = torch.stack(nats).mean().detach()
            if moments := [loss.moments for loss in by_input if loss.moments is not None]:
                information = partial(mean_information, f"{target.name}/nats", [one.components for one in moments])
                matrices = [matrix_DD for one in moments for matrix_DD in (one.covariance_DD, one.error_DD)]
                self.host_figures.add(information, *matrices)
        present_K = torch.stack(list(counts.values())) > 0
        self.weights.set_progress(self.progress)
        total, factors_K = self.weights(torch.stack(losses), present_K)
        for target, factor in zip(self.recipe.targets, factors_K, strict=True):
            figures[f"{target.name}/weight"] = factor.detach()
        if self.training and torch.is_grad_enabled() and remembers:
            for name, by_view in remember.items():
                cast(Memory, self.states[name]).update(torch.cat(list(by_view.values())), self.ranks)
        if self.measure_health:
            figures |= self._health(of_batch, watched)
        return total, figures

    def target_modules(self, target: Target, grid: tuple[int, int]) -> TargetModules:
        """Return the modules that compute a target for views of `grid` (rows, columns) patches."""
        shared = target.head if isinstance(target, HeadTarget) else None
        return TargetModules(
            self.ranks,
            grid,
            self.student.patch_size,
            decoder=self.decoders[target.decoder],
            head=self.image_heads[shared] if shared else self.heads[target.name],
            memory=self.states[target.memory_name] if isinstance(target, HeadTarget) else None,
            projector=self.projector,
            momentum=self.momentum,
            squared_norms=self.squared_grad_norms[target.name],
        )

    @property
    def reader(self) -> BackboneReader | None:
        """Return the head that reads layers of the backbone, or None if the recipe has none."""
        return next((head for head in self.heads.values() if isinstance(head, BackboneReader)), None)

    @property
    def text_modules(self) -> list[nn.Module]:
        """Return the modules with compute cost proportional to the number of caption tokens."""
        by_token = [target for target in self.recipe.targets if target.by_token]
        decoders = [self.decoders[name] for name in dict.fromkeys(target.decoder for target in by_token)]
        heads = [self.heads[target.name] for target in by_token]
        towers = [] if self.text is None or self.text.family.fixed_length else [self.text]
        return [*towers, *decoders, *heads]

    @torch.no_grad()
    def after_backward(self, scale: float = 1.0) -> None:
        """Pass the gradient norm of every loss term to the loss weighting. Call it after every backward pass. `scale`
        is the loss scale, by which the computed gradients exceed the true ones."""
        if not self.weights.needs_gradients:
            return
        device = next(iter(self.parameters())).device
        norms = [sum(parts, torch.zeros((), device=device)) for parts in self.squared_grad_norms.values()]
        self.weights.observe(torch.stack(norms) / scale**2, self.ranks)

    # ---------------------------------------------------------------- inputs

    def inputs_of(self, batch: Batch) -> list[EncodedInput]:
        """Return the visible patches of each view that the student encodes for a batch."""
        sides = [side // self.student.patch_size for side in batch.small_VBCHW.shape[-2:]]
        own, every = len(batch.images_VBCHW), len(batch.crops_VB4)
        small = dict.fromkeys(range(own + 1, every + 1), (sides[0], sides[1]))
        grid = self.student.grid_of(batch.images_VBCHW)
        specs, cell, device = self.recipe.inputs, self.student.cell, batch.images_VBCHW.device
        return build_inputs(specs, self.recipe.mix, batch.seeds_B, grid, cell, small, device)

    def views_of(self, batch: Batch) -> dict[int, Tensor]:
        """Return the views that inputs and targets use, normalized, by view from 1."""
        used = {view for spec in self.recipe.inputs for view in spec.seen}
        used |= {target.view for target in self.recipe.image_targets}
        return {view: self.pixel_norm(batch.view(view)) for view in sorted(used)}

    def _encode(self, batch: Batch, step: StepFeatures | None = None, *, ahead: bool = False) -> Context:
        """Encode a micro-batch, except what `step` has of it. With `ahead`, encode only what `step` caches."""
        views, where = self.views_of(batch), self.inputs_of(batch)
        cached = None if step is None else step.present
        inputs: dict[str, list[Encoded]] = {}
        if not ahead or self.recipe.has_image_level:
            with self.span("forward"):
                inputs = self.encode_inputs(where, views)
        # Collectives run in order. This one ends after the gather of the EMA weights, which overlaps with the student.
        counts = self._count(batch) if cached is None else cached.counts
        whole = {
            view: next(part for part in inputs[name] if part.where.view == view - 1)
            for view in views
            if (name := self.recipe.shows(view)) in inputs
        }
        context = Context(batch, views, inputs, whole, {}, counts, measures=self.measure_health)
        if cached is not None:
            context.encoded_views, context.layers = dict(cached.encoded_views), dict(cached.layers)
        with self.span("teacher"):
            if self.text is not None:  # before teachers, which may draw random numbers and run once
                context.text_BE = self.text(batch.text_ids_BT, batch.text_mask_BT)
            self._encode_targets(context, ahead=ahead)
            if step is None:
                self._pair_texts(context)
        return context

    def _count(self, batch: Batch) -> dict[str, Tensor]:
        here_K = torch.stack([target.present(batch).sum(dtype=torch.float32) for target in self.recipe.targets])
        return dict(zip((target.name for target in self.recipe.targets), self.ranks.sum(here_K), strict=True))

    def _pair_texts(self, context: Context) -> None:
        if context.text_BE is not None:
            batch = context.batch
            context.text = gather_targets(context.text_BE, batch.captions_B, batch.has_text_B, self.ranks)

    def _encode_targets(self, context: Context, *, ahead: bool) -> None:
        """Add the views that the EMA teacher and frozen teachers encode."""
        wanted = {(target.encoder_key, target.view): target for target in self.recipe.image_targets}
        for key, target in (self._views_ahead if ahead else wanted).items():
            if key in context.encoded_views:
                continue
            if target.encoder == "ema" and self.momentum is not None:
                context.encoded_views[key], context.layers[key] = self.momentum(context.views[target.view])
            elif target.encoder == "teacher":
                context.encoded_views[key] = self.teachers[target.teacher](context.batch.view(target.view))

    @property
    def _views_ahead(self) -> dict[tuple[str, int], ImageTarget]:
        """Return the encoded views that losses over several micro-batches use, each with a target of it."""
        targets = (target for target in self.recipe.image_targets if target.is_image_level or target.has_statistics)
        return {(target.encoder_key, target.view): target for target in targets}

    @torch.no_grad()
    def _features(self, context: Context) -> Features:
        """Return the features of a micro-batch that losses over several micro-batches use."""
        grid = self.student.grid_of(context.batch.images_VBCHW)
        for described in self.recipe.targets:
            target = settled(described, self.progress)
            if target.has_statistics:
                target.collect(self.target_modules(target, grid), context)
        image_level = [target for target in self.recipe.targets if target.is_image_level]
        pools = [self.decoders[name] for name in dict.fromkeys(target.decoder for target in image_level)]
        keys = self._views_ahead
        return Features(
            without_images(context.batch),
            context.counts,
            [{pool: part.pooled(pool) for pool in pools} for parts in context.inputs.values() for part in parts],
            None if context.text_BE is None else context.text_BE.detach(),
            {key: tokens for key, tokens in context.encoded_views.items() if key in keys},
            {key: layers for key, layers in context.layers.items() if key in keys},
            context.statistics,
        )

    def encode_inputs(self, where: list[EncodedInput], views: dict[int, Tensor]) -> dict[str, list[Encoded]]:
        """Encode `inputs_of` a batch, given `views_of` it: the parts of every input, by name."""
        if self.reader is not None:
            (only,) = where
            tokens, maps = self.reader.encode_view(self.student, views[only.view + 1], self.progress)
            return {only.name: [Encoded(only, *tokens, maps=maps)]}
        if (blocks := blocks_read(self.decoders)) > 1:
            (only,) = where
            return {only.name: [Encoded(only, *self.student.encode_whole(views[only.view + 1], blocks))]}
        view_of, visible = [spec.view + 1 for spec in where], [spec.visible_BL for spec in where]
        norm = self.student.normed if self.recipe.reads_before_norm else None
        if self.recipe.mix is None or not self.mixed_attention:
            masked = None
            if self.recipe.uses_mask_tokens:  # fail without the module: masked patches must never be visible instead
                masked = MaskedPatches(cast(MaskToken, self.mask_token), [spec.shown_BN for spec in where])
            encoded = self.student.encode_own(views, view_of, visible, masked, norm=norm is None)
        else:
            by_row = self.student.encode_mixed(views, view_of, visible, [spec.image_of_row_B for spec in where])
            encoded = [
                (cls_B1D[spec.row_of_image_B], tokens_BLD[spec.row_of_image_B])
                for spec, (cls_B1D, tokens_BLD) in zip(where, by_row, strict=True)
            ]
        parts: dict[str, list[Encoded]] = {}
        for spec, tokens in zip(where, encoded, strict=True):
            parts.setdefault(spec.name, []).append(Encoded(spec, *tokens, norm=norm))
        return parts

    def _health(self, context: Context, watched: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        first = context.inputs[self.recipe.inputs[0].name][0].tokens_BLD
        features = {"dense": first.flatten(0, 1), "pooled": self.ranks.gather(first.detach().mean(dim=1))}
        for (encoder, view, _), tokens_BND in context.dense.items():
            if encoder == "ema":
                features.setdefault(f"target_view{view}", tokens_BND.flatten(0, 1))
        return health_figures(features, watched, self.ranks, self.host_figures)

    # ---------------------------------------------------------------- inference

    @torch.no_grad()
    def embed_images(self, images_BCHW: Tensor, target: str) -> Tensor:
        """Encode full images (uint8) as a global target does: unit vectors of a text target, or logits of a category
        target. A category target with several label sets returns the logits of all sets, concatenated."""
        spec = next(item for item in self.recipe.targets if item.name == target)
        output = self.heads[target](self.pooled(spec.decoder, self.pixel_norm(images_BCHW)))
        return output[0] if spec.modality == "text" else torch.cat(output, dim=1)

    @torch.no_grad()
    def pooled(self, decoder: str, pixels_BCHW: Tensor) -> Tensor:
        """Return the output of a pooling decoder for full, normalized images: (B, F)."""
        module, blocks = self.decoders[decoder], blocks_read(self.decoders)
        norm = not getattr(module, "before_norm", False)
        return pool(module, *self.student.encode_whole(pixels_BCHW, blocks, norm=norm))

    @torch.no_grad()
    def embed_text(self, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Encode captions as unit vectors (B, E). Raise a ValueError if the recipe has no text target."""
        if self.text is None:
            raise ValueError("the recipe has no text target")
        embedded_BE: Tensor = self.text(text_ids_BT, text_mask_BT)
        return embedded_BE


def role_of(name: str, parameter: nn.Parameter) -> Role:
    """Return the role of a parameter of an `Objective`."""
    if name.startswith(EMA_PREFIX):
        return "ema"
    if name.startswith(TEACHERS_PREFIX):
        return "teacher"
    return "trained" if parameter.requires_grad else "frozen"
