"""Adapt plain stock `transformers` models, ViT, DINOv2 and CLIP: tokens in, tokens out, any subset of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)
from transformers.initialization import no_init_weights
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from m3i_scale.backbones.attention import split_heads
from m3i_scale.backbones.base import Backbone, MaskedPatches, Tokens, gather_tokens

TokenConfig: TypeAlias = ViTConfig | Dinov2Config | CLIPVisionConfig


def token_class(config: TokenConfig) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """Return the stock class, and the arguments that leave out the pooling layer, which nothing here trains."""
    if isinstance(config, ViTConfig):
        return ViTModel, {"add_pooling_layer": False}
    return (CLIPVisionModel if isinstance(config, CLIPVisionConfig) else Dinov2Model), {}


def last_norm(model: PreTrainedModel, hidden_BLD: Tensor) -> Tensor:
    """Return what the objective reads of a stock model's last hidden state: that of CLIP comes before its last norm."""
    normed_BLD: Tensor = model.post_layernorm(hidden_BLD) if isinstance(model, CLIPVisionModel) else hidden_BLD
    return normed_BLD


class TokenBackbone(Backbone):
    """Adapts a plain vision Transformer with a class token. `embed` and `encode` are separate, so that tokens can be
    hidden or mixed between them.

    All parameters are used inside the forward of the stock module that owns them, which ZeRO-3 relies on.
    """

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        with no_init_weights():  # initialised once, later, where the parameters may already be partitioned
            kind, options = token_class(config)
            self.model = kind(config, **options)

    has_class_token = True
    own_attention = True

    @property
    def stage_widths(self) -> list[int]:
        """Return nothing: there are no stages."""
        return []

    @property
    def layers(self) -> list[nn.Module]:
        """Return the Transformer layers, in order."""
        model = self.model
        if isinstance(model, ViTModel):
            return list(model.layers)
        return list(model.encoder.layers if isinstance(model, CLIPVisionModel) else model.encoder.layer)

    def embed(self, images_BCHW: Tensor) -> Tokens:
        """Embed normalised images as class token (B, 1, D) and patch tokens (B, N, D), positions added: interpolated as
        the stock model does it, where the images have another size."""
        options = {}
        if images_BCHW.shape[-1] != self.image_size and not isinstance(self.model, Dinov2Model):
            options["interpolate_pos_encoding"] = True  # that of Dinov2 does so by itself
        tokens_BND = self.model.embeddings(images_BCHW.to(self.dtype), **options)
        if isinstance(self.model, CLIPVisionModel):  # a norm of each token, so it may come before tokens are hidden
            tokens_BND = self.model.pre_layrnorm(tokens_BND)
        return tokens_BND[:, :1], tokens_BND[:, 1:]

    def encode(self, tokens_BLD: Tensor) -> Tensor:
        """Encode embedded tokens as the last layer's normalised tokens, same shape."""
        return self._normed(self._through_layers(tokens_BLD))

    def _normed(self, tokens_BLD: Tensor) -> Tensor:
        if isinstance(self.model, CLIPVisionModel):
            return last_norm(self.model, tokens_BLD)
        output_BLD: Tensor = self.model.layernorm(tokens_BLD)
        return output_BLD

    def _through_layers(self, tokens_BLD: Tensor) -> Tensor:
        for layer in self.layers:
            tokens_BLD = layer(tokens_BLD, None)
        return tokens_BLD

    def _visible(
        self,
        views: dict[int, Tensor],
        view_of: Sequence[int],
        visible: Sequence[Tensor],
        masked: MaskedPatches | None = None,
    ) -> list[Tokens]:
        """Embed class token and visible patch tokens of every input, in one call of the embedding for every size."""
        shown: Sequence[Tensor | None] = masked.shown if masked is not None else [None] * len(visible)
        # A view is embedded once, and once more for each input that has mask tokens in it.
        keys = [(view, number if shown[number] is not None else -1) for number, view in enumerate(view_of)]
        embedded: dict[tuple[int, int], Tokens] = {}
        for side in sorted({views[view].shape[-1] for view in view_of}, reverse=True):
            members = sorted({key for key in keys if views[key[0]].shape[-1] == side})
            masks = [shown[number] if number >= 0 else None for _, number in members]
            images_SCHW = torch.cat([views[view] for view, _ in members])
            with self._with_mask_tokens(masked, masks, len(visible[0]), side):
                cls_S1D, tokens_SND = self.embed(images_SCHW)
            parts = (part.split(len(visible[0])) for part in (cls_S1D, tokens_SND))
            embedded |= {key: (cls, tokens) for key, cls, tokens in zip(members, *parts, strict=True)}
        return [
            (embedded[key][0], gather_tokens(embedded[key][1], shown_BL))
            for key, shown_BL in zip(keys, visible, strict=True)
        ]

    @contextmanager
    def _with_mask_tokens(
        self, masked: MaskedPatches | None, masks: Sequence[Tensor | None], batch: int, side: int
    ) -> Iterator[None]:
        """Put mask tokens into what the patch embedding gives, before positions are added.

        Args:
            masked: what has the token.
            masks: by `batch` images, which of their patches are shown: bool (batch, N); None: all.
            batch: images that have one mask each.
            side: of the images in pixels.
        """
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

        embeddings = self.model.embeddings
        clip = isinstance(self.model, CLIPVisionModel)
        convolution = embeddings.patch_embedding if clip else embeddings.patch_embeddings.projection
        hook = convolution.register_forward_hook(put_tokens)
        try:
            yield
        finally:
            hook.remove()

    def encode_own(
        self,
        views: dict[int, Tensor],
        view_of: Sequence[int],
        visible: Sequence[Tensor],
        masked: MaskedPatches | None = None,
    ) -> list[Tokens]:
        """Encode every input as a sequence of its own; those of one length go through the layers together."""
        sequences = [torch.cat(pair, dim=1) for pair in self._visible(views, view_of, visible, masked)]
        outputs: dict[int, Tensor] = {}
        for length in sorted({sequence.shape[1] for sequence in sequences}):
            members = [k for k, sequence in enumerate(sequences) if sequence.shape[1] == length]
            output = self.encode(torch.cat([sequences[k] for k in members]))
            outputs |= dict(zip(members, output.split(len(sequences[0])), strict=True))
        return [(outputs[k][:, :1], outputs[k][:, 1:]) for k in range(len(sequences))]

    def encode_mixed(
        self, views: dict[int, Tensor], view_of: Sequence[int], visible: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> list[Tokens]:
        """Encode one sequence a row, with the class token of its first image."""
        shown = self._visible(views, view_of, visible)
        parts = [tokens[row_B] for row_B, (_, tokens) in zip(rows, shown, strict=True)]
        output_BSD = self.encode(torch.cat([shown[0][0], *parts], dim=1))
        outputs = output_BSD[:, 1:].split([part.shape[1] for part in parts], dim=1)
        return [(output_BSD[:, :1], output) for output in outputs]

    def encode_whole(self, images_BCHW: Tensor, blocks: int = 1) -> Tokens:
        """Encode normalised images, nothing hidden: class tokens of the last layers, and the patch tokens."""
        tokens_BSD, cls = torch.cat(self.embed(images_BCHW), dim=1), []
        for left, layer in zip(reversed(range(len(self.layers))), self.layers, strict=True):
            tokens_BSD = layer(tokens_BSD, None)
            if 0 < left < blocks:
                cls.append(self._normed(tokens_BSD[:, :1]))
        last_BSD = self._normed(tokens_BSD)
        return torch.cat([*cls, last_BSD[:, :1]], dim=1), last_BSD[:, 1:]

    def encode_attending(self, images_BCHW: Tensor) -> tuple[Tokens, Tensor | None]:
        """Encode as `encode_whole` does, and return how the class token attends to the patches in the last layer, by
        head: fp32 (B, H, N); the rest of 1 is what it gives itself."""
        attention: list[Tensor] = []
        # Inside the layer's call, before any other hook: under ZeRO-3 its parameters are there, and a compiled layer
        # need not know of it.
        hook = self.layers[-1].register_forward_hook(
            lambda layer, inputs, output: attention.append(_class_attention(layer, inputs[0])), prepend=True
        )
        try:
            tokens = self.encode_whole(images_BCHW)
        finally:
            hook.remove()
        return tokens, attention[0]

    def encode_maps(self, images_BCHW: Tensor, layers: Sequence[int]) -> tuple[Tokens, list[Tensor]]:
        """Encode as `encode_whole` does, and return the patch tokens after some layers too, as maps (B, D, H, W)."""
        tokens_BSD = torch.cat(self.embed(images_BCHW), dim=1)
        maps = []
        for number, layer in enumerate(self.layers, start=1):
            tokens_BSD = layer(tokens_BSD, None)
            if number in layers:
                maps.append(tokens_BSD[:, 1:].transpose(1, 2).unflatten(2, self.grid))
        last_BSD = self._normed(tokens_BSD)
        return (last_BSD[:, :1], last_BSD[:, 1:]), maps

    def encode_in_windows(self, images_BCHW: Tensor, windows: int, layers: Sequence[int]) -> list[Tensor]:
        """Encode normalised images within windows, each with the class token, as RF-DETR does.

        Args:
            images_BCHW: normalised.
            windows: along a side of the image, which they divide.
            layers: by number from 1, that are read; the layer behind each sees all windows and their class tokens.

        Returns:
            The maps (B, D, H, W) of those layers, through the last norm.
        """
        cls_B1D, tokens_BND = self.embed(images_BCHW)
        batch, (rows, columns) = len(tokens_BND), (side // windows for side in self.grid)
        parted = tokens_BND.unflatten(1, (windows, rows, windows, columns)).transpose(2, 3)
        tokens = torch.cat(
            [cls_B1D.repeat_interleave(windows**2, dim=0), parted.reshape(-1, rows * columns, self.width)], 1
        )
        maps = []
        for number, layer in enumerate(self.layers):
            across = tokens.reshape(batch, -1, self.width) if number in layers else tokens
            tokens = layer(across, None).reshape(tokens.shape)
            if number + 1 in layers:
                read = self._normed(tokens)[:, 1:].unflatten(0, (batch, windows, windows)).unflatten(3, (rows, columns))
                maps.append(read.transpose(2, 3).reshape(batch, *self.grid, self.width).permute(0, 3, 1, 2))
        return maps

    def encode_beside(
        self,
        images_BCHW: Tensor,
        others_BQD: Tensor,
        blocks: int,
        attend: Callable[[Tensor, int], Tensor | None] | None = None,
    ) -> Tensor:
        """Encode normalised images with further tokens before theirs in the last layers.

        Args:
            images_BCHW: normalised.
            others_BQD: the further tokens.
            blocks: so many layers, from the last, have them.
            attend: called before each of those with the normalised tokens (B, S, D) and its number from 0; returns what
                is added to attention.

        Returns:
            The last layer's normalised tokens [others | class token | patches].
        """
        tokens_BSD = torch.cat(self.embed(images_BCHW), dim=1)
        first = len(self.layers) - blocks
        for number, layer in enumerate(self.layers):
            if number == first:
                tokens_BSD = torch.cat([others_BQD.to(tokens_BSD.dtype), tokens_BSD], dim=1)
            mask = attend(self._normed(tokens_BSD), number - first) if attend is not None and number >= first else None
            tokens_BSD = layer(tokens_BSD, mask)
        return self._normed(tokens_BSD)

    def last_hidden_state(self, images_BCHW: Tensor) -> Tensor:
        """Return [class token | patch tokens]: (B, 1 + N, D)."""
        tokens_BSD = torch.cat(self.embed(images_BCHW), dim=1)
        return self._through_layers(tokens_BSD) if isinstance(self.model, CLIPVisionModel) else self.encode(tokens_BSD)


def _class_attention(layer: Any, tokens_BSD: Tensor) -> Tensor:
    """Return softmax(QKᵀ/√D) of the first token of a layer's input, for all others: fp32 (B, H, S − 1)."""
    if isinstance(layer, ViTLayer):
        norm, attention, heads = layer.layernorm_before, layer.attention, layer.attention.num_attention_heads
    elif isinstance(layer, Dinov2Layer):
        norm, attention, heads = layer.norm1, layer.attention, layer.attention.num_attention_heads
    else:
        norm, attention, heads = layer.layer_norm1, layer.self_attn, layer.self_attn.num_heads
    normed_BSD = norm(tokens_BSD)
    query_BH1D = split_heads(attention.q_proj(normed_BSD[:, :1]), heads).float()
    key_BHSD = split_heads(attention.k_proj(normed_BSD), heads).float()
    scores_BH1S = query_BH1D @ key_BHSD.transpose(2, 3) * query_BH1D.shape[-1] ** -0.5
    attention_BHS: Tensor = scores_BH1S.softmax(dim=-1)[:, :, 0]
    return attention_BHS[:, :, 1:]
