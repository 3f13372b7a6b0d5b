"""f_φ of images: the EMA teacher with its projector, and the sections of a recipe for teachers."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from m3i_scale.backbones.base import Backbone, Tokens
from m3i_scale.backbones.families import VisionConfig
from m3i_scale.config import FixableError, Section
from m3i_scale.config.sections import MAX_HEADS, MAX_LAYERS
from m3i_scale.errors import ConfigError
from m3i_scale.objective.decoders import transformer_layers


class EmaSpec(Section):
    """Configuration of the EMA teacher for image targets."""

    start: float = Field(default=0.995, ge=0, lt=1)
    """EMA decay m at the first step; rises to `end` with a cosine schedule."""
    end: float = Field(default=1.0, gt=0, le=1)
    """EMA decay m at the last step."""
    projector: Literal["mlp", "transformer"] = "mlp"
    """Projector between backbone and dense targets, in student and EMA teacher. mlp: residual MLP blocks. transformer
    (SIM): a linear layer and Transformer blocks with batch norm, on tokens before the final norm of the backbone."""
    projector_depth: int = Field(default=2, ge=0, le=MAX_LAYERS)
    """Number of blocks of the projector; 0 for no projector."""
    projector_heads: int | None = Field(default=None, ge=1, le=MAX_HEADS)
    """Attention heads of `projector: transformer`; default: one per 64 channels."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.end < self.start:
            raise FixableError(
                f"end ({self.end:g}) is below start ({self.start:g}): the average would forget faster and faster",
                f"end: {self.start:g} for a constant one, or 1, the default",
            )
        return self

    @model_validator(mode="after")
    def _projects(self) -> Self:
        if self.projector == "transformer" and self.projector_depth == 0:
            raise FixableError("`projector: transformer` has no effect with projector_depth 0", "projector_depth: 2")
        if self.projector == "mlp" and self.projector_heads is not None:
            raise FixableError("projector_heads has no effect: MLP blocks have no attention", "projector: transformer")
        return self

    def build_projector(self, config: VisionConfig) -> Projector:
        """Return the projector for a backbone with this configuration, or raise a ConfigError."""
        width = config.hidden_size
        if self.projector == "mlp":
            return Projector(width, self.projector_depth)
        heads = self.projector_heads or max(width // 64, 1)
        if width % heads:
            raise ConfigError(
                f"projector_heads must divide the backbone's width {width}, got {heads}",
                where="recipe.ema.projector_heads",
                fix="set recipe.ema.projector_heads=null for one per 64 channels",
            )
        return TransformerProjector(width, self.projector_depth, heads, str(config._attn_implementation or "sdpa"))

    def decay_at(self, step: int, steps: int) -> float:
        """Return the EMA decay, a half cosine from `start` to `end` over the run. `step` counts from 0."""
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2


class TeacherSpec(Section):
    """A frozen vision model as encoder of image targets."""

    from_pretrained: str
    """A local `transformers` folder or a Hub id; `student` means the model in `backbone.from_pretrained`."""

    @property
    def is_start(self) -> bool:
        """Return whether the teacher is the backbone with its pretrained weights."""
        return self.from_pretrained == "student"


class Projector(nn.Module):
    """Residual MLP blocks in front of a dense target, so that the backbone features need not equal the target."""

    before_norm: ClassVar[bool] = False
    """Whether its input is the last layer's output, without the final norm of the backbone."""

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
        """Project tokens: (B, L, D) → (B, L, D)."""
        for block in self.blocks:
            tokens_BLD = tokens_BLD + block(tokens_BLD)
        return tokens_BLD


class TransformerProjector(Projector):
    """SIM's projector: a linear layer, and Transformer blocks with batch norm over the tokens of all ranks. It gets
    class token and patches."""

    before_norm = True

    def __init__(self, width: int, depth: int, heads: int, kernel: str) -> None:
        super().__init__(width, 0)
        self.embed = nn.Linear(width, width)
        self.blocks = transformer_layers(width, depth, heads, kernel, batch_norm=True)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        tokens_BLD = self.embed(tokens_BLD)
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD)
        return tokens_BLD


class EmaTeacher(nn.Module):
    """EMA teacher: EMA copies of the backbone, the projector, and the pools and heads of image targets. It is never
    trained. The owner of the parameters updates it."""

    def __init__(
        self,
        backbone: Backbone,
        projector: Projector,
        pools: nn.ModuleDict,
        heads: nn.ModuleDict,
        target_heads: nn.ModuleDict | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.kept = range(len(backbone.layers) - layers + 1, len(backbone.layers) + 1) if layers > 1 else range(0)
        """Numbers of the last layers that targets average, from 1."""
        self.projector = projector
        self.pools = pools
        self.heads = heads
        self.target_heads = target_heads or nn.ModuleDict()
        """By the name of a target with a separate head. A fine-tuning task uses EMA for all trained parameters."""
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> tuple[Tokens, list[Tensor]]:
        """Encode normalized images as class token (B, 1, D) and all patch tokens (B, N, D). Also returns the outputs of
        the last layers, (B, D, H, W) each, if targets average them."""
        if self.kept:
            return self.backbone.encode_maps(images_BCHW, self.kept)
        return self.backbone.encode_whole(images_BCHW, norm=not self.projector.before_norm), []
