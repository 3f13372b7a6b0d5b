"""Base classes of backbone families: configuration, published sizes, names of modules, layer-wise learning-rate decay,
and resized position embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from m3i_scale.config.sections import MAX_CAPTION_TOKENS, MAX_HEADS, MAX_LAYERS, MAX_SIDE, MAX_WIDTH
from m3i_scale.errors import ConfigError

VisionConfig: TypeAlias = PretrainedConfig
Angles: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles of the patches' queries and keys."""


class Family(ABC):
    """Backbones of one configuration class."""

    config_class: ClassVar[Any]
    model_class: ClassVar[type[PreTrainedModel]]
    """Class of the exported model."""
    options: ClassVar[dict[str, Any]] = {}
    """Constructor arguments that disable the pooling layer, which would not be trained."""
    name: ClassVar[str]
    first_preset: ClassVar[str]
    """Preset of sections without paths."""
    shape_fields: ClassVar[tuple[str, ...]]
    training_fields: ClassVar[tuple[str, ...]]
    """Fields that change the training but not the modules. A config may set these and `shape_fields`; other fields of
    `PretrainedConfig` have no effect here or break the export."""
    derives: ClassVar[bool] = True
    """Whether creating the config computes fields from other fields."""
    parts: ClassVar[dict[str, str]] = {}
    """Name of every part of a plain Transformer in `transformers`; `{}` is the number of the layer."""
    has_class_token: ClassVar[bool] = True
    """Whether a class token represents the image. Otherwise, the mean of its patches does."""

    @property
    def positions(self) -> str | None:
        """Return the name of the position embeddings for a fixed image size, or None."""
        return None

    @abstractmethod
    def presets(self) -> dict[str, dict[str, Any]]:
        """Return the fields of published sizes by name, at 224 pixels."""

    def adapt(self, config: Any) -> None:  # noqa: B027  most have nothing to change
        """Convert a published configuration to a backbone configuration, in place."""

    @abstractmethod
    def check(self, config: Any, where: str) -> None:
        """Reject a configuration that is invalid for a backbone."""

    @abstractmethod
    def lr_scales(self, model: Any, decay: float, *, dense: bool = False, dcn: float = 1.0) -> dict[str, float]:
        """Return the multipliers of layer-wise learning-rate decay by parameter name. Heads have the full rate.

        Args:
            decay: factor from one layer to the previous one.
            dense: use InternImage's rule for detection and segmentation, which assigns `post_norms.K` to block K. Its
                rule for classification gives them the full learning rate.
            dcn: additional factor for InternImage's offsets of deformable convolutions (`DCN_LR_MUL`).
        """


class TokenFamily(Family):
    """Plain vision Transformers with the sequence [prefix | patches]."""

    mlp_field: ClassVar[str] = "intermediate_size"
    untrained: ClassVar[tuple[str, ...]] = ()
    """Unused parameters that the stock class always creates."""
    norm_is_last: ClassVar[bool] = True
    """Whether the stock model's last hidden state is after the final norm."""
    asks_to_interpolate: ClassVar[bool] = False
    """Whether the stock model needs an argument to interpolate position embeddings for other image sizes."""
    antialias: ClassVar[bool] = False
    """Whether the stock model uses an antialiasing filter when downsampling position embeddings."""

    @property
    def positions(self) -> str | None:
        return self.parts.get("positions")

    def prefix(self, config: Any) -> int:
        """Return the number of tokens before the patches: class token, if any, and registers."""
        return self.has_class_token + int(getattr(config, "num_register_tokens", 0))

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the Transformer layers, in order."""
        return cast(nn.ModuleList, model.get_submodule(self._layers))

    @property
    def _layers(self) -> str:
        return self.parts["norm1"].partition(".{}.")[0]

    def embed(self, model: Any, images_BCHW: Tensor) -> Tensor:
        """Return the input tokens of the first layer, (B, P + N, D). For other image sizes, position embeddings are
        interpolated as in the stock model, up to rounding."""
        if images_BCHW.shape[-1] == model.config.image_size:
            return cast(Tensor, model.embeddings(images_BCHW))
        options = {"interpolate_pos_encoding": True} if self.asks_to_interpolate else {}
        with BicubicByMatrix():
            return cast(Tensor, model.embeddings(images_BCHW, **options))

    def angles(self, model: Any, images_BCHW: Tensor) -> Angles | None:
        """Return the rotary angles of all patches, (N, D / heads) each, or None for added position embeddings."""
        return None

    def normed(self, model: PreTrainedModel, tokens_BLD: Tensor) -> Tensor:
        """Apply the final norm to the last layer's tokens."""
        output_BLD: Tensor = model.get_submodule(self.parts["norm"])(tokens_BLD)
        return output_BLD

    def check(self, config: Any, where: str) -> None:
        for key in ("image_size", "patch_size"):
            if not isinstance(getattr(config, key), int):
                raise ConfigError(
                    f"'{key}' must be one number: images and patches are square",
                    where=f"{where}.config",
                    fix=f"set {where}.config.{key} to one number",
                )
        counts = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", self.mlp_field)
        check_counts({key: getattr(config, key) for key in counts}, f"{where}.config")
        if config.num_channels != 3:
            raise ConfigError(
                f"'num_channels' must be 3, got {config.num_channels}",
                where=f"{where}.config.num_channels",
                fix=f"leave out {where}.config.num_channels",
            )
        check_side(config.image_size, config.patch_size, f"patch size {config.patch_size}", where)
        if config.hidden_size % config.num_attention_heads or config.hidden_size % 4:
            raise ConfigError(
                f"'hidden_size' must be a multiple of 4 and of the {config.num_attention_heads} heads, got "
                f"{config.hidden_size}",
                where=f"{where}.config.hidden_size",
                fix="change hidden_size or num_attention_heads; 64 channels per head are usual",
            )
        if "registers" in self.parts:
            check_counts({"num_register_tokens": config.num_register_tokens}, f"{where}.config")

    def lr_scales(self, model: Any, decay: float, *, dense: bool = False, dcn: float = 1.0) -> dict[str, float]:
        """See `Family`. Layers as in MAE (`util/lr_decay.py`) and BEiT (`optim_factory.py`)."""
        depth, layers = int(model.config.num_hidden_layers), f"{self._layers}."

        def layer_of(name: str) -> int:
            """Return 0 for embeddings and the norm directly after them, depth + 1 for parameters after all layers."""
            if name.startswith(layers):
                return int(name.removeprefix(layers).partition(".")[0]) + 1
            return 0 if name.startswith(("embeddings.", "pre_layrnorm.")) else depth + 1

        return {name: decay ** (depth + 1 - layer_of(name)) for name, _ in model.named_parameters()}


MAX_COUNTS = {
    "image_size": MAX_SIDE,
    "patch_size": MAX_SIDE,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "mlp_ratio": MAX_HEADS,
    "channels": MAX_WIDTH,
    "fusion_width": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_register_tokens": MAX_SIDE,
    "max_position_embeddings": MAX_CAPTION_TOKENS,
    "type_vocab_size": MAX_CAPTION_TOKENS,
}
"""Upper limits by field, for all families and the text tower."""


def check_counts(counts: dict[str, Any], where: str) -> None:
    """Check that sizes in a `transformers` configuration are numbers within `MAX_COUNTS`."""
    for key, value in counts.items():
        most = MAX_COUNTS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= most:
            raise ConfigError(
                f"'{key}' must be from 1 to {most:,}, got {value!r}",
                where=f"{where}.{key}",
                fix=f"set {where}.{key} to a number in this range",
            )


def check_side(side: int, divisor: int, what: str, where: str) -> None:
    """Check that the divisor, such as the patch size, divides the image size."""
    if side % divisor:
        raise ConfigError(
            f"the image size must be a multiple of {what}, got {side}",
            where=f"{where}.config",
            fix=f"set {where}.config.image_size={max(round(side / divisor), 1) * divisor}",
        )


class BicubicByMatrix(TorchFunctionMode):
    """A mode that replaces bicubic `F.interpolate` calls, such as in the embeddings of `transformers` models, by
    products of matrices. On CUDA, the gradient of torch's kernel sums in no fixed order, so
    `torch.use_deterministic_algorithms` raises an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is F.interpolate and options.get("mode") == "bicubic" and isinstance(options["size"], tuple):
            antialias, corners = options.get("antialias", False), options.get("align_corners")
            return resize_bicubic(args[0], options["size"], antialias=antialias, align_corners=corners)
        return func(*args, **options)


def resize_bicubic(
    maps_NCHW: Tensor, size: tuple[int, int], *, antialias: bool = False, align_corners: bool | None = None
) -> Tensor:
    """Compute `F.interpolate(mode="bicubic")`, up to rounding, as two matrix products in at least fp32. Return the
    input's dtype."""
    wide_NCHW = maps_NCHW.to(torch.promote_types(maps_NCHW.dtype, torch.float32))
    rows_OH, columns_PW = (
        _weights(old, new, wide_NCHW, antialias, align_corners)
        for old, new in zip(maps_NCHW.shape[2:], size, strict=True)
    )
    resized_NCOP = torch.einsum("nchw,oh,pw->ncop", wide_NCHW, rows_OH, columns_PW)
    return resized_NCOP.to(maps_NCHW.dtype)


@torch.no_grad()
def _weights(old: int, new: int, like: Tensor, antialias: bool, align_corners: bool | None) -> Tensor:
    """Return the weight of every old row in every new one, (new, old), in dtype and device of `like`."""
    units_11HH = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    # Bicubic weights are separable. A dimension of unchanged size is not resized.
    resized_11OH = F.interpolate(
        units_11HH, size=(new, old), mode="bicubic", antialias=antialias, align_corners=align_corners
    )
    return resized_11OH[0, 0]
