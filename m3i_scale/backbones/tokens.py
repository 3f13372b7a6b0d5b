"""Adapters of plain stock `transformers` models for any subset of patch tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from m3i_scale.backbones.base import Backbone, MaskedPatches, Tokens, Views, gather_tokens
from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.backbones.families.base import Angles


class Sequences(NamedTuple):
    """Embedded tokens of one length."""

    prefix_BPD: Tensor
    tokens_BLD: Tensor
    angles: Angles | None
    """Rotary angles, (B, 1, L, D / heads) each, or None for added position embeddings."""


class TokenBackbone(Backbone):
    """Adapter of a plain vision Transformer with the sequence [class token?, registers? | patches].

    `embed` and `encode` are separate, so that tokens can be masked or mixed in between. Registers are neither masked
    nor returned. Without class token, the mean of an image's patches replaces it. All parameters are used inside the
    forward of the stock module that owns them, as ZeRO-3 requires.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.family = token_family(config)
        with no_init_weights():  # initialized once, later, possibly after partitioning
            self.model = self.family.model_class(config, **self.family.options)
        self.has_class_token = self.family.has_class_token
        self.prefix = self.family.prefix(config)
        """Number of tokens before the patches."""
        for name in self.family.untrained:
            self.model.get_parameter(name).requires_grad_(False)

    @property
    def stage_widths(self) -> list[int]:
        return []

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.family.layers(self.model))

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Embed normalized images as prefix (B, P, D), with the class token first, and patch tokens (B, N, D). For the
        position embeddings see `TokenFamily.embed`."""
        tokens_BSD = self.family.embed(self.model, images_BCHW.to(self.dtype))
        return tokens_BSD[:, : self.prefix], tokens_BSD[:, self.prefix :]

    def angles(self, images_BCHW: Tensor) -> Angles | None:
        """Return the rotary angles of the patches, (N, D / heads) each, or None for added position embeddings."""
        return self.family.angles(self.model, images_BCHW)

    def encode(self, tokens_BSD: Tensor, angles: Angles | None = None) -> Tensor:
        """Encode embedded tokens [prefix | any patches] as normalized tokens. Angles: (L, D / heads) or (B, 1, L, D /
        heads)."""
        return self.normed(self._through_layers(tokens_BSD, angles))

    def normed(self, tokens_BLD: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.family.normed(self.model, tokens_BLD)

    def _through_layers(self, tokens_BSD: Tensor, angles: Angles | None) -> Tensor:
        for layer in self.layers:
            tokens_BSD = call_layer(layer, tokens_BSD, angles)
        return tokens_BSD

    def _visible(
        self, views: Views, view_of: Sequence[int], visible: Sequence[Tensor], masked: MaskedPatches | None = None
    ) -> list[Sequences]:
        """Embed prefix and visible patch tokens of every input, with one call of the embedding per image size."""
        shown: Sequence[Tensor | None] = masked.shown if masked is not None else [None] * len(visible)
        # A view is embedded once, and again for each input with mask tokens.
        keys = [(view, number if shown[number] is not None else -1) for number, view in enumerate(view_of)]
        embedded: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for side in sorted({views[view].shape[-1] for view in view_of}, reverse=True):
            members = sorted({key for key in keys if views[key[0]].shape[-1] == side})
            masks = [shown[number] if number >= 0 else None for _, number in members]
            images_SCHW = torch.cat([views[view] for view, _ in members])
            with self._with_mask_tokens(masked, masks, len(visible[0]), side):
                prefix_SPD, tokens_SND = self.embed(images_SCHW)
            parts = (part.split(len(visible[0])) for part in (prefix_SPD, tokens_SND))
            embedded |= {key: (prefix, tokens) for key, prefix, tokens in zip(members, *parts, strict=True)}
        angles = {view: self.angles(views[view]) for view in dict.fromkeys(view_of)}
        return [
            Sequences(embedded[key][0], gather_tokens(embedded[key][1], shown_BL), _chosen(angles[key[0]], shown_BL))
            for key, shown_BL in zip(keys, visible, strict=True)
        ]

    @contextmanager
    def _with_mask_tokens(
        self, masked: MaskedPatches | None, masks: Sequence[Tensor | None], batch: int, side: int
    ) -> Iterator[None]:
        """Insert mask tokens after the patch embedding, before position embeddings are added. `masks` are the visible
        patches per group of `batch` images: bool (batch, N), or None for all."""
        if masked is None or all(mask is None for mask in masks):
            yield
            return
        token, patches = masked.token, side // self.patch_size
        device = next(mask.device for mask in masks if mask is not None)
        every_BN = torch.ones(batch, patches**2, dtype=torch.bool, device=device)
        shown_SHW = torch.cat([every_BN if mask is None else mask for mask in masks]).unflatten(1, (patches, patches))

        def put_tokens(convolution: nn.Module, inputs: Any, map_SDHW: Tensor) -> Tensor:
            masked_SHWD: Tensor = token(map_SDHW.permute(0, 2, 3, 1), shown_SHW)
            return masked_SHWD.permute(0, 3, 1, 2)

        hook = self.model.get_submodule(self.family.parts["patch"]).register_forward_hook(put_tokens)
        try:
            yield
        finally:
            hook.remove()

    def encode_own(
        self,
        views: Views,
        view_of: Sequence[int],
        visible: Sequence[Tensor],
        masked: MaskedPatches | None = None,
        *,
        norm: bool = True,
    ) -> list[Tokens]:
        """Encode every input as a separate sequence; inputs of the same length are batched."""
        parts = self._visible(views, view_of, visible, masked)
        sequences = [torch.cat([part.prefix_BPD, part.tokens_BLD], dim=1) for part in parts]
        outputs: dict[int, Tensor] = {}
        for length in sorted({sequence.shape[1] for sequence in sequences}):
            members = [k for k, sequence in enumerate(sequences) if sequence.shape[1] == length]
            angles = _joined([parts[k].angles for k in members], dim=0)
            output = (self.encode if norm else self._through_layers)(torch.cat([sequences[k] for k in members]), angles)
            outputs |= dict(zip(members, output.split(len(sequences[0])), strict=True))
        return [self.read(outputs[k]) for k in range(len(sequences))]

    def encode_mixed(
        self, views: Views, view_of: Sequence[int], visible: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> list[Tokens]:
        shown = self._visible(views, view_of, visible)
        parts = [part.tokens_BLD[row_B] for row_B, part in zip(rows, shown, strict=True)]
        turned = [
            None if part.angles is None else (part.angles[0][row_B], part.angles[1][row_B])
            for row_B, part in zip(rows, shown, strict=True)
        ]
        output_BSD = self.encode(torch.cat([shown[0].prefix_BPD, *parts], dim=1), _joined(turned, dim=2))
        shares = output_BSD[:, self.prefix :].split([part.shape[1] for part in parts], dim=1)
        return [(self._first(output_BSD, share_BLD), share_BLD) for share_BLD in shares]

    def read(self, tokens_BSD: Tensor) -> Tokens:
        """Return class or mean token and patch tokens of a sequence."""
        patches_BLD = tokens_BSD[:, self.prefix :]
        return self._first(tokens_BSD, patches_BLD), patches_BLD

    def _first(self, tokens_BSD: Tensor, patches_BLD: Tensor) -> Tensor:
        return tokens_BSD[:, :1] if self.has_class_token else patches_BLD.mean(dim=1, keepdim=True)

    def embed_whole(self, images_BCHW: Tensor) -> tuple[Tensor, Angles | None]:
        """Return [prefix | patches] of normalized images as the first layer gets them, and their rotary angles."""
        return torch.cat(self.embed(images_BCHW), dim=1), self.angles(images_BCHW)

    def encode_whole(self, images_BCHW: Tensor, blocks: int = 1, *, norm: bool = True) -> Tokens:
        if blocks > 1 and not self.has_class_token:
            raise ValueError("the backbone has no class token")
        (tokens_BSD, angles), cls = self.embed_whole(images_BCHW), []
        for left, layer in zip(reversed(range(len(self.layers))), self.layers, strict=True):
            tokens_BSD = call_layer(layer, tokens_BSD, angles)
            if 0 < left < blocks:
                cls.append(self.normed(tokens_BSD[:, :1]))
        last_B1D, patches_BND = self.read(self.normed(tokens_BSD) if norm else tokens_BSD)
        return torch.cat([*cls, last_B1D], dim=1), patches_BND

    def encode_maps(self, images_BCHW: Tensor, layers: Sequence[int]) -> tuple[Tokens, list[Tensor]]:
        (tokens_BSD, angles), maps = self.embed_whole(images_BCHW), []
        for number, layer in enumerate(self.layers, start=1):
            tokens_BSD = call_layer(layer, tokens_BSD, angles)
            if number in layers:
                maps.append(tokens_BSD[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid_of(images_BCHW)))
        return self.read(self.normed(tokens_BSD)), maps

    def last_hidden_state(self, images_BCHW: Tensor) -> Tensor:
        """Return [class token?, registers? | patch tokens]: (B, P + N, D)."""
        tokens_BSD = self._through_layers(*self.embed_whole(images_BCHW))
        return self.normed(tokens_BSD) if self.family.norm_is_last else tokens_BSD


def call_layer(layer: Any, tokens_BSD: Tensor, angles: Angles | None, mask: Tensor | None = None) -> Tensor:
    """Run a stock layer. Angles are an input like tokens, so that activation checkpointing reuses them."""
    output_BSD: Tensor = layer(tokens_BSD, mask) if angles is None else layer(tokens_BSD, mask, angles)
    return output_BSD


def _chosen(angles: Angles | None, index_BL: Tensor) -> Angles | None:
    return None if angles is None else (angles[0][index_BL][:, None], angles[1][index_BL][:, None])


def _joined(parts: Sequence[Angles | None], dim: int) -> Angles | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    cos, sin = (torch.cat(side, dim=dim) for side in zip(*known, strict=True))
    return cos, sin
