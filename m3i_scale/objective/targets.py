"""f_φ: what is predicted (category, text, pixels, momentum image) and the small heads that go with it."""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_bidirectional_mask

from m3i_scale.backbones.attention import attend, split_heads
from m3i_scale.backbones.base import Backbone
from m3i_scale.objective.heads import ImageHead
from m3i_scale.objective.inputs import normalize


class TextTower(nn.Module):
    """A BERT-shaped Transformer, trained jointly; z_y is the projected first token, on the unit sphere."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        with no_init_weights():
            self.model = BertModel(config, add_pooling_layer=False)
        self.model.encoder.layer[-1].called_in_parts = True  # has no use for a policy of recomputation
        self.projection = nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Tokens (B, T) and their mask → unit vectors, fp32 (B, E)."""
        hidden_BTD = self.model.embeddings(input_ids=text_ids_BT)
        mask = create_bidirectional_mask(self.model.config, hidden_BTD, text_mask_BT.long())
        *layers, last = self.model.encoder.layer
        for layer in layers:
            hidden_BTD = layer(hidden_BTD, mask)
        return F.normalize(self.projection(_read_first(last, hidden_BTD, text_mask_BT)).float(), dim=-1)


def _read_first(layer: Any, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The first token after a BERT layer: exactly `layer(hidden, mask)[:, 0]`.

    Nobody reads the other tokens of the last layer, so their queries and MLP are not computed.
    """
    attention: Any = layer.attention
    own: Any = attention.self
    heads = own.num_attention_heads
    mixed_BH1D = attend(
        split_heads(own.query(hidden_BTD[:, :1]), heads),
        split_heads(own.key(hidden_BTD), heads),
        split_heads(own.value(hidden_BTD), heads),
        own.config._attn_implementation,
        mask_B11L=mask_BT[:, None, None],
        dropout=own.dropout.p if own.training else 0.0,
    )
    tokens_B1D = attention.output(mixed_BH1D.transpose(1, 2).flatten(2), hidden_BTD[:, :1])
    output_B1D: Tensor = layer.feed_forward_chunk(tokens_B1D)
    return output_B1D[:, 0]


class TextHead(nn.Module):
    """ẑ_y of a text target: a projection onto the unit sphere, and the temperature of its softmax."""

    max_scale = 100.0

    def __init__(self, input_width: int, width: int, temperature: float, bias: float | None = None) -> None:
        super().__init__()
        self.projection = nn.Linear(input_width, width, bias=False)
        self.first_temperature, self.first_bias = temperature, bias
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1)) if bias is not None else None

    def reset_parameters(self) -> None:
        """First temperature, and first bias of a Bernoulli target."""
        nn.init.constant_(self.log_scale, math.log(1 / self.first_temperature))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, D) → unit vectors fp32 (B, E), 1/τ (1), at most 100, and the bias (1) of a Bernoulli target."""
        prediction_BE = F.normalize(self.projection(pooled_BD).float(), dim=-1)
        log_scale = self.log_scale.float()
        # Straight through: a hard clamp has no gradient above the limit, and one overshoot would freeze τ for good.
        bounded = log_scale + (log_scale.clamp(max=math.log(self.max_scale)) - log_scale).detach()
        # The parameter is what is added to the first bias: bf16 has steps of 1/16 near −10.
        bias = None if self.bias is None or self.first_bias is None else self.bias.float() + self.first_bias
        return prediction_BE, bounded.exp(), bias


class Classifier(nn.Linear):
    """Logits over one label set. Small at first, so that no class is preferred before anything was seen."""

    def reset_parameters(self) -> None:
        """First values: a deviation of 0.02, no bias."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class CategoryHead(nn.Module):
    """Logits over each label set: ẑ_y against the category embeddings, which are the rows of a linear classifier."""

    def __init__(self, input_width: int, classes: list[int]) -> None:
        super().__init__()
        self.sets = nn.ModuleList([Classifier(input_width, count) for count in classes])

    def forward(self, pooled_BD: Tensor) -> list[Tensor]:
        """(B, D) → for every label set, logits (B, K)."""
        return [classifier(pooled_BD) for classifier in self.sets]


class DenseHead(nn.Module):
    """ẑ_y of a dense target: one linear map per token."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(input_width, width)

    def forward(self, tokens_BQD: Tensor) -> Tensor:
        """(B, Q, D) → (B, Q, width)."""
        prediction_BQD: Tensor = self.projection(tokens_BQD)
        return prediction_BQD


class Projector(nn.Module):
    """Residual MLP blocks between the backbone and a dense target, so that the backbone need not be its own target."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
                )
                for _ in range(depth)
            ]
        )

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        for block in self.blocks:
            tokens_BLD = tokens_BLD + block(tokens_BLD)
        return tokens_BLD


class MomentumTarget(nn.Module):
    """The averaged copy of backbone, projector, and of what pools and projects image targets. Never trained; whoever
    owns the parameters moves them."""

    def __init__(
        self, backbone: Backbone, projector_depth: int, pools: nn.ModuleDict | None, heads: nn.ModuleDict | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = Projector(self.backbone.width, projector_depth)
        self.pools = pools or nn.ModuleDict()
        """By the name of the decoder that they follow."""
        self.heads = heads or nn.ModuleDict()
        """By the name of the head that they follow."""
        self.requires_grad_(False)

    def head(self, name: str) -> ImageHead:
        """The copy of a head."""
        return cast(ImageHead, self.heads[name])

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images → class token (B, 1, D) and all patch tokens (B, N, D) of the whole view."""
        return self.backbone.encode_whole(images_BCHW)


class FrozenTeacher(nn.Module):
    """Any `transformers` vision model with patch tokens, as it was trained elsewhere."""

    def __init__(self, config: Any, mean: tuple[float, ...], std: tuple[float, ...], grid: tuple[int, int]) -> None:
        super().__init__()
        with no_init_weights():
            self.model = AutoModel.from_config(config, trust_remote_code=False)
        self.mean, self.std, self.grid = mean, std, grid
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images → class token (B, 1, D), or the mean token where the model has none, and patch tokens (B, N, D).

        The model normalises as it was trained to, and stays in evaluation mode.
        """
        self.model.eval()
        first = next(self.model.parameters())
        pixels_BCHW = normalize(images_BCHW, self.mean, self.std).to(first.dtype)
        options = {"interpolate_pos_encoding": True} if self.interpolates else {}
        hidden_BSD = self.model(pixel_values=pixels_BCHW, **options).last_hidden_state
        tokens_BND = hidden_BSD[:, -self.grid[0] * self.grid[1] :]
        has_cls = hidden_BSD.shape[1] > tokens_BND.shape[1]
        return (hidden_BSD[:, :1] if has_cls else tokens_BND.mean(dim=1, keepdim=True)), tokens_BND


def patchify(images_BCHW: Tensor, patch: int, *, standardize: bool) -> Tensor:
    """Pixels of every patch: (B, N, patch²·3), row-major patches, channel last (MAE).

    With `standardize`, each patch has mean 0 and (unbiased) variance 1.
    """
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch, width // patch
    blocks = images_BCHW.reshape(batch, channels, rows, patch, columns, patch)
    pixels_BNP = blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)
    if standardize:
        mean_BN1 = pixels_BNP.mean(dim=-1, keepdim=True)
        pixels_BNP = (pixels_BNP - mean_BN1) / (pixels_BNP.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return pixels_BNP
