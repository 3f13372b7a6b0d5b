"""f_ψ: decoders that predict ẑ_y from the dense representation of the input."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.activations import ACT2FN
from transformers.models.vit.modeling_vit import ViTLayer

from m3i_scale.backbones.base import attend, gather_tokens, split_heads
from m3i_scale.backbones.families import VisionConfig
from m3i_scale.config.sections import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Kind
from m3i_scale.objective.heads import BatchNorm
from m3i_scale.objective.positions import grid_position
from m3i_scale.objective.ranks import SingleProcess


def transformer_layers(width: int, depth: int, heads: int, kernel: str, *, batch_norm: bool = False) -> nn.ModuleList:
    """Return ViT layers, with batch norm in place of LayerNorm as in SIM. `Objective` sets `BatchNorm.ranks`."""
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        attn_implementation=kernel,
    )
    layers = nn.ModuleList([ViTLayer(config) for _ in range(depth)])
    layer: Any
    for layer in layers if batch_norm else ():
        layer.communicates = True  # is not compiled
        for norm in ("layernorm_before", "layernorm_after"):
            setattr(layer, norm, BatchNorm(width, SingleProcess(), affine=True))
    return layers


class TransformerDecoder(nn.Module):
    """A Transformer over [class token | visible tokens | mask tokens]; the mask tokens become the prediction. Position
    embeddings of visible and target patches are relative to the input view (paper), or on a fixed grid (MAE)."""

    partial_layers: ClassVar[slice] = slice(-1, None)
    """Layers of which `_run` calls the parts."""
    batch_norm: ClassVar[bool] = False
    """Whether the norms of the layers are batch norms."""

    def __init__(
        self, input_width: int, width: int, depth: int, heads: int, position: str, kernel: str = "sdpa"
    ) -> None:
        super().__init__()
        self.width, self.position = width, position
        self.embed: nn.Module = nn.Linear(input_width, width)
        self.position_embed = nn.Linear(2 * width, width) if position == "relative" else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = transformer_layers(width, depth, heads, kernel, batch_norm=self.batch_norm)
        layer: Any
        for layer in self.layers[self.partial_layers]:
            layer.called_in_parts = True  # runs without activation checkpointing
        self.norm: nn.Module = nn.LayerNorm(width, eps=1e-6)

    def reset_parameters(self) -> None:
        """Initialize the mask token; the layers initialize themselves."""
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        cls_B1D: Tensor,
        tokens_BLD: Tensor,
        visible_BL: Tensor,
        query_BQ: Tensor,
        grid: tuple[int, int],
        own_position_BNP: Tensor | None,
        query_position_BNP: Tensor | None,
    ) -> Tensor:
        """Predict the patches `query_BQ` of the target view: (B, Q, width).

        `visible_BL` are the indices of the visible patches in the input view, `query_BQ` of the predicted ones in the
        target view. A relative decoder needs the position features of both views' patches relative to the input view.
        """
        x_BLD = self.embed(torch.cat([cls_B1D, tokens_BLD], dim=1))
        table_ND = grid_position(grid, self.width, x_BLD.device).to(x_BLD.dtype)
        position_BSD = self._positions(table_ND, visible_BL, query_BQ, own_position_BNP, query_position_BNP)
        masks_BQD = self.mask_token.to(x_BLD.dtype).expand(len(x_BLD), query_BQ.shape[1], -1)
        body_BSD = torch.cat([x_BLD[:, 1:], masks_BQD], dim=1) + position_BSD
        sequence_BSD = torch.cat([x_BLD[:, :1], body_BSD], dim=1)
        output_BQD: Tensor = self.norm(self._run(sequence_BSD, query_BQ.shape[1]))
        return output_BQD

    def _positions(
        self, table_ND: Tensor, visible_BL: Tensor, query_BQ: Tensor, own_BNP: Tensor | None, target_BNP: Tensor | None
    ) -> Tensor:
        """Return the position embeddings of visible and predicted patches; `table_ND` is the fixed grid."""
        if self.position_embed is None:
            return table_ND[torch.cat([visible_BL, query_BQ], dim=1)]
        if own_BNP is None or target_BNP is None:
            raise ValueError("a relative decoder needs the positions of the input's and the target's patches")
        features_BSP = torch.cat([gather_tokens(own_BNP, visible_BL), gather_tokens(target_BNP, query_BQ)], dim=1)
        position_BSD: Tensor = self.position_embed(features_BSP.to(table_ND.dtype))
        return position_BSD

    def _run(self, sequence_BSD: Tensor, count: int) -> Tensor:
        """Return exactly the last `count` tokens, the mask tokens, after all layers."""
        for layer in self.layers[:-1]:
            sequence_BSD = layer(sequence_BSD)
        # Queries and MLP of the other tokens are not computed in the last layer, so it is called in parts, without
        # activation checkpointing, which would save least memory here.
        last: Any = self.layers[-1]
        normed_BSD: Tensor = last.layernorm_before(sequence_BSD)
        return _attend_to(last, sequence_BSD[:, -count:], normed_BSD[:, -count:], normed_BSD)


class SiameseDecoder(TransformerDecoder):
    """The predictor of SIM: batch norm over the tokens of all ranks, and visible patches on a fixed grid. It has no
    embedding and no final norm, since the projector embeds the tokens and the target has a linear head."""

    partial_layers = slice(0)
    batch_norm = True

    def __init__(self, width: int, depth: int, heads: int, kernel: str) -> None:
        super().__init__(width, width, depth, heads, "relative", kernel)
        self.embed, self.norm = nn.Identity(), nn.Identity()

    def _positions(
        self, table_ND: Tensor, visible_BL: Tensor, query_BQ: Tensor, own_BNP: Tensor | None, target_BNP: Tensor | None
    ) -> Tensor:
        relative_BSD = super()._positions(table_ND, visible_BL[:, :0], query_BQ, target_BNP, target_BNP)
        return torch.cat([table_ND[visible_BL], relative_BSD], dim=1)

    def _run(self, sequence_BSD: Tensor, count: int) -> Tensor:
        for layer in self.layers:  # all tokens count in the batch norms of the last layer too
            sequence_BSD = layer(sequence_BSD)
        return sequence_BSD[:, -count:]


class CrossAttentionDecoder(TransformerDecoder):
    """A decoder with cross-attention of mask tokens to class token and visible tokens in every layer (CAPI). Mask
    tokens do not attend to each other, so the prediction of a patch does not depend on the other queries."""

    partial_layers = slice(None)

    def _run(self, sequence_BSD: Tensor, count: int) -> Tensor:
        context_BLD, tokens_BQD = sequence_BSD[:, :-count], sequence_BSD[:, -count:]
        layer: Any
        for layer in self.layers:
            tokens_BQD = _attend_to(layer, tokens_BQD, layer.layernorm_before(tokens_BQD), context_BLD)
        return tokens_BQD


def _attend_to(layer: Any, tokens_BQD: Tensor, normed_BQD: Tensor, context_BSD: Tensor) -> Tensor:
    """Apply a ViT layer to tokens, `normed_BQD` after its first norm, that attend to a context: (B, Q, width)."""
    attention: Any = layer.attention
    heads = attention.num_attention_heads
    mixed_BHQD = attend(
        split_heads(attention.q_proj(normed_BQD), heads),
        split_heads(attention.k_proj(context_BSD), heads),
        split_heads(attention.v_proj(context_BSD), heads),
        attention.config._attn_implementation,
    )
    tokens_BQD = tokens_BQD + attention.o_proj(mixed_BHQD.transpose(1, 2).flatten(2))
    output_BQD: Tensor = tokens_BQD + layer.mlp(layer.layernorm_after(tokens_BQD))
    return output_BQD


class AttentionPool(nn.Module):
    """Attention pooling with the mean token as query; LayerNorm on q, k and v (head of InternImage-H)."""

    def __init__(self, input_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.norm_q = nn.LayerNorm(input_width, eps=1e-6)
        self.norm_k = nn.LayerNorm(input_width, eps=1e-6)
        self.norm_v = nn.LayerNorm(input_width, eps=1e-6)
        self.query = nn.Linear(input_width, input_width)
        self.key = nn.Linear(input_width, input_width)
        self.value = nn.Linear(input_width, input_width)
        self.output = nn.Linear(input_width, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Pool visible tokens into one vector: (B, L, D) → (B, width)."""
        query_BHID = split_heads(self.query(self.norm_q(tokens_BLD.mean(dim=1, keepdim=True))), self.heads)
        key_BHLD = split_heads(self.key(self.norm_k(tokens_BLD)), self.heads)
        value_BHLD = split_heads(self.value(self.norm_v(tokens_BLD)), self.heads)
        pooled_BHID = F.scaled_dot_product_attention(query_BHID, key_BHLD, value_BHLD)
        pooled_BD: Tensor = self.output(pooled_BHID.transpose(1, 2).flatten(2).squeeze(1))
        return pooled_BD


class MapHead(nn.Module):
    """Attention pooling of SigLIP (`SiglipMultiheadAttentionPoolingHead`): a learned query, then an MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.width = width
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        # Separate layers instead of nn.MultiheadAttention, which reads weights of a child outside of its forward: under
        # ZeRO-3 they are not gathered then.
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def reset_parameters(self) -> None:
        """Initialize the learned query."""
        nn.init.xavier_uniform_(self.probe)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Pool visible tokens into one vector: (B, L, D) → (B, D)."""
        query_BHID = split_heads(self.query(self.probe.to(tokens_BLD.dtype)), self.heads)
        key_BHLD, value_BHLD = (split_heads(layer(tokens_BLD), self.heads) for layer in (self.key, self.value))
        query_BHID = query_BHID.expand(len(tokens_BLD), -1, -1, -1)
        mixed_BHID = F.scaled_dot_product_attention(query_BHID, key_BHLD, value_BHLD)
        mixed_BD = self.output(mixed_BHID.transpose(1, 2).flatten(2).squeeze(1))
        pooled_BD: Tensor = mixed_BD + self.fc2(self.activation(self.fc1(self.norm(mixed_BD))))
        return pooled_BD


class Pointwise(nn.Module):
    """The identity: every patch token is the prediction for its position."""

    def __init__(self, input_width: int) -> None:
        super().__init__()
        self.width = input_width

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return all patch tokens (B, N, D) unchanged."""
        return tokens_BND


class ClassToken(nn.Module):
    """Class tokens of the last layers, after the backbone's final norm, and optionally the mean patch token."""

    def __init__(self, input_width: int, blocks: int, mean: bool) -> None:
        super().__init__()
        self.blocks, self.mean = blocks, mean
        self.width = input_width * (blocks + mean)

    def forward(self, cls_BND: Tensor, tokens_BLD: Tensor) -> Tensor:
        """Concatenate class tokens (B, N, D) and, if `mean` is set, the mean of (B, L, D): (B, width)."""
        read_BF = cls_BND[:, -self.blocks :].flatten(1)
        return torch.cat([read_BF, tokens_BLD.mean(dim=1)], dim=1) if self.mean else read_BF


class MeanPool(nn.Module):
    """Mean pooling with LayerNorm, the simplest global prediction."""

    def __init__(self, input_width: int, final_norm: bool = True) -> None:
        super().__init__()
        self.width = input_width
        self.before_norm = not final_norm
        self.norm = nn.LayerNorm(input_width, eps=1e-6)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Return the normalized mean of visible tokens: (B, L, D) → (B, D)."""
        pooled_BD: Tensor = self.norm(tokens_BLD.mean(dim=1))
        return pooled_BD


class DecoderSpec(Kind):
    """Configuration of the prediction f_ψ. Targets that name the same decoder share its weights."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    dense: ClassVar[bool] = False
    """Whether it returns one vector per patch instead of one per image."""
    by_token: ClassVar[bool] = False
    """Whether it returns one vector per caption token."""
    module: ClassVar[type[nn.Module]]

    def build(self, config: VisionConfig) -> nn.Module:
        """Return the module, which has a `width`, for a backbone with this configuration. Raise a ValueError if the
        backbone's width does not match the fields."""
        return self.module(config.hidden_size)


class LayeredSpec(DecoderSpec):
    """Shape of Transformer decoders."""

    width: int | None = Field(default=None, ge=8, le=MAX_WIDTH)
    """Hidden size; default: the backbone's."""
    heads: int | None = Field(default=None, ge=1, le=MAX_HEADS)
    """Attention heads; default: one per 64 channels."""
    depth: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Number of layers."""

    def shape(self, config: VisionConfig) -> tuple[int, int]:
        """Return width and number of heads. Raise a ValueError if 4 or the heads do not divide the width."""
        width = self.width or config.hidden_size
        heads = self.heads or max(width // 64, 1)
        _check_heads(width, heads)
        if width % 4:
            raise ValueError(f"width {width} is no multiple of 4, as codes of positions need it")
        return width, heads


class TransformerSpec(LayeredSpec):
    """A decoder that predicts any patch of any view with mask tokens."""

    kind: ClassVar[str] = "transformer"
    dense: ClassVar[bool] = True
    module: ClassVar[type[nn.Module]] = TransformerDecoder
    position: Literal["relative", "absolute"] = "relative"
    """Position embeddings of queries: relative to the input view (the paper), or on a fixed grid (MAE)."""

    def build(self, config: VisionConfig) -> nn.Module:
        width, heads = self.shape(config)
        kernel = str(config._attn_implementation or "sdpa")
        return self.module(config.hidden_size, width, self.depth, heads, self.position, kernel)


class CrossAttentionSpec(TransformerSpec):
    """A decoder that predicts any patch of any view with mask tokens, which do not attend to each other."""

    kind: ClassVar[str] = "cross_attention"
    module: ClassVar[type[nn.Module]] = CrossAttentionDecoder


class SiameseSpec(TransformerSpec):
    """The predictor of SIM, after `recipe.ema.projector: transformer`. It has the backbone's width."""

    kind: ClassVar[str] = "siamese"
    position: Literal["relative"] = "relative"

    def build(self, config: VisionConfig) -> nn.Module:
        width, heads = self.shape(config)
        if width != config.hidden_size:
            raise ValueError(f"width must be {config.hidden_size}, the backbone's, got {width}")
        return SiameseDecoder(width, self.depth, heads, str(config._attn_implementation or "sdpa"))


class PointwiseSpec(DecoderSpec):
    """A decoder without weights: every patch token is the prediction for its position."""

    kind: ClassVar[str] = "pointwise"
    dense: ClassVar[bool] = True
    module: ClassVar[type[nn.Module]] = Pointwise


class AttentionPoolSpec(DecoderSpec):
    """A decoder that pools the image into one vector by attention with the mean token as query."""

    kind: ClassVar[str] = "attention_pool"
    width: int | None = Field(default=None, ge=8, le=MAX_WIDTH)
    """Width of the vector; default: the backbone's."""
    heads: int | None = Field(default=None, ge=1, le=MAX_HEADS)
    """Attention heads, which divide the backbone's width; default: one per 64 channels."""

    def build(self, config: VisionConfig) -> nn.Module:
        heads = self.heads or max(config.hidden_size // 64, 1)
        _check_heads(config.hidden_size, heads)
        return AttentionPool(config.hidden_size, self.width or config.hidden_size, heads)


class MapHeadSpec(DecoderSpec):
    """A decoder that pools the image as SigLIP does: attention with a learned query, then an MLP."""

    kind: ClassVar[str] = "map_head"

    def build(self, config: VisionConfig) -> nn.Module:
        if not hasattr(config, "intermediate_size"):
            raise ValueError(
                f"map_head needs a vision Transformer, not {config.model_type}; use attention_pool or mean_pool"
            )
        return MapHead(config)


class MeanPoolSpec(DecoderSpec):
    """A decoder that returns the mean of the visible tokens."""

    kind: ClassVar[str] = "mean_pool"
    final_norm: bool = True
    """Whether the tokens pass the final norm of the backbone. The mean is normalized in any case (MAE, SIM: only the
    mean)."""

    def build(self, config: VisionConfig) -> nn.Module:
        if not (self.final_norm or hasattr(config, "num_attention_heads")):
            raise ValueError(f"final_norm has no effect, since {config.model_type} has no final norm; leave it out")
        return MeanPool(config.hidden_size, self.final_norm)


class ClassTokenSpec(DecoderSpec):
    """A decoder that returns the class token; for linear heads also several layers and the mean patch token."""

    kind: ClassVar[str] = "class_token"
    blocks: int = Field(default=1, ge=1, le=MAX_LAYERS)
    """Number of last layers. Their class tokens are normalized by the backbone's final norm and concatenated."""
    mean: bool = False
    """Append the mean patch token of the last layer."""

    @property
    def alone(self) -> bool:
        """Return whether the output is only the class token of the last layer."""
        return self.blocks == 1 and not self.mean

    def build(self, config: VisionConfig) -> nn.Module:
        if self.blocks > getattr(config, "num_hidden_layers", self.blocks):
            raise ValueError(f"it reads {self.blocks} layers, and the backbone has {config.num_hidden_layers}")
        return ClassToken(config.hidden_size, self.blocks, self.mean)


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is no multiple of its {heads} heads")


def width_of(decoder: nn.Module) -> int:
    """Return the output width of a decoder."""
    width = decoder.width
    if not isinstance(width, int):
        raise TypeError(f"{type(decoder).__name__} does not define its width")
    return width


def blocks_read(decoders: nn.ModuleDict) -> int:
    """Return the number of last layers from which decoders read class tokens, at least 1."""
    return max((decoder.blocks for decoder in decoders.values() if isinstance(decoder, ClassToken)), default=1)


def pool(decoder: nn.Module, cls_BND: Tensor, tokens_BLD: Tensor) -> Tensor:
    """Pool an encoded input into one vector per image: (B, F). The final layer comes last in `cls_BND`."""
    pooled_BF: Tensor = decoder(cls_BND, tokens_BLD) if isinstance(decoder, ClassToken) else decoder(tokens_BLD)
    return pooled_BF
