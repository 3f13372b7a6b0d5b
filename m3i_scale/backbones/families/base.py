"""Define what is known of a family of backbones: its configuration, its published sizes, and the parts of its model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from m3i_scale.backbones.interpolation import BicubicByMatrix
from m3i_scale.config.limits import MAX_CAPTION_TOKENS, MAX_HEADS, MAX_LAYERS, MAX_SIDE, MAX_WIDTH
from m3i_scale.errors import ConfigError

VisionConfig: TypeAlias = PretrainedConfig
"""The configuration of a family here."""
Angles: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which attention rotates queries and keys of patches."""


class Family(ABC):
    """Describes backbones of one configuration class."""

    config_class: ClassVar[Any]
    name: ClassVar[str]
    """As messages spell it."""
    first_preset: ClassVar[str]
    """What a section that needs no folder begins with."""
    shape_fields: ClassVar[tuple[str, ...]]
    """Fields of the configuration that shape the modules."""
    training_fields: ClassVar[tuple[str, ...]]
    """Fields that change the training and not the modules: dropout, initialization. A run file sets these and
    `shape_fields`; the other fields of `PretrainedConfig` have no effect here, or break the export."""
    derives: ClassVar[bool] = True
    """Whether fields follow from others when a configuration is made."""
    has_class_token: ClassVar[bool] = True
    """Whether a token stands for the whole image; where not, the mean of its patches does."""

    @property
    def positions(self) -> str | None:
        """Return the parameter that is a table of positions, for images of one size; None where there is none."""
        return None

    @abstractmethod
    def presets(self) -> dict[str, dict[str, Any]]:
        """Return the fields of published sizes by name, at 224 pixels."""

    def adapt(self, config: Any) -> None:  # noqa: B027  most have nothing to change
        """Change a published configuration to that of a backbone."""

    @abstractmethod
    def check(self, config: Any, where: str) -> None:
        """Refuse a configuration of which no backbone can be made."""


class TokenFamily(Family):
    """Describes plain vision Transformers, whose sequence is [prefix | patches]."""

    model_class: ClassVar[type[PreTrainedModel]]
    options: ClassVar[dict[str, Any]] = {}
    """Arguments that leave out the pooling layer, which nothing here trains."""
    parts: ClassVar[dict[str, str]]
    """The stock name of every part; `{}` is the number of the layer."""
    mlp_field: ClassVar[str] = "intermediate_size"
    untrained: ClassVar[tuple[str, ...]] = ()
    """Parameters that no input here reads, and that the stock class cannot leave out: they stay as they are."""
    norm_is_last: ClassVar[bool] = True
    """Whether the last hidden state of the stock model has passed the last norm."""
    asks_to_interpolate: ClassVar[bool] = False
    """Whether the stock model interpolates positions of images of another size only where it is told to."""
    antialias: ClassVar[bool] = False
    """Whether the stock model filters a table of positions that becomes smaller."""

    @property
    def positions(self) -> str | None:
        """Return the table of positions; None where they are angles."""
        return self.parts.get("positions")

    def prefix(self, config: Any) -> int:
        """Return the tokens before the patches: that of the class, if there is one, and registers."""
        return self.has_class_token + int(getattr(config, "num_register_tokens", 0))

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the Transformer layers, in order."""
        return cast(nn.ModuleList, model.get_submodule(self.parts["norm1"].partition(".{}.")[0]))

    def embed(self, model: Any, images_BCHW: Tensor) -> Tensor:
        """Return tokens as the first layer reads them, (B, P + N, D); if images have another size than the
        configuration's, positions are interpolated as in the stock model, up to rounding."""
        if images_BCHW.shape[-1] == model.config.image_size:
            return cast(Tensor, model.embeddings(images_BCHW))
        options = {"interpolate_pos_encoding": True} if self.asks_to_interpolate else {}
        with BicubicByMatrix():
            return cast(Tensor, model.embeddings(images_BCHW, **options))

    def angles(self, model: Any, images_BCHW: Tensor) -> Angles | None:
        """Return the angles of all patches, (N, D / heads) each; None where positions are added to tokens."""
        return None

    def rotated(self, key_BHSD: Tensor, angles: Angles) -> Tensor:
        """Return keys with those of the patches rotated, as attention does it."""
        raise NotImplementedError

    def patch_projection(self, model: PreTrainedModel) -> nn.Module:
        """Return the convolution that makes tokens of patches."""
        projection: nn.Module = model.get_submodule(self.parts["patch"])
        return projection

    def normed(self, model: PreTrainedModel, tokens_BLD: Tensor) -> Tensor:
        """Return the last layer's tokens through the last norm."""
        output_BLD: Tensor = model.get_submodule(self.parts["norm"])(tokens_BLD)
        return output_BLD

    def attention(self, layer: nn.Module) -> tuple[nn.Module, Any]:
        """Return of a layer the norm before attention, and attention (with `q_proj` and `k_proj`)."""
        norm, query = (self.parts[part].partition(".{}.")[2] for part in ("norm1", "q"))
        return layer.get_submodule(norm), layer.get_submodule(query.rpartition(".")[0])

    def check(self, config: Any, where: str) -> None:
        """Refuse sizes that no backbone can have; see `Family`."""
        for key in ("image_size", "patch_size"):
            if not isinstance(getattr(config, key), int):
                raise ConfigError(f"'{key}' must be one number: images and patches are square", where=f"{where}.config")
        counts = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", self.mlp_field)
        check_counts({key: getattr(config, key) for key in counts}, f"{where}.config")
        if config.num_channels != 3:
            raise ConfigError("images have 3 channels", where=f"{where}.config.num_channels: {config.num_channels}")
        check_side(config.image_size, config.patch_size, f"patch size {config.patch_size}", where)
        if config.hidden_size % config.num_attention_heads or config.hidden_size % 4:
            raise ConfigError(
                f"width {config.hidden_size} must be a multiple of 4 and of its {config.num_attention_heads} heads",
                where=f"{where}.config",
            )
        if "registers" in self.parts:
            check_counts({"num_register_tokens": config.num_register_tokens}, f"{where}.config")


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
"""Upper limits by field, over all families and the text tower."""


def check_counts(counts: dict[str, Any], where: str) -> None:
    """Check that the sizes in a `transformers` configuration are numbers that a model can have.

    Args:
        counts: value by field.
        where: the section that they stand in.
    """
    for key, value in counts.items():
        most = MAX_COUNTS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= most:
            raise ConfigError(f"'{key}' must be from 1 to {most:,}, got {value!r}", where=f"{where}.{key}")


def check_side(side: int, divisor: int, what: str, where: str) -> None:
    """Check that patches fill the image."""
    if side % divisor:
        raise ConfigError(
            f"{what} does not divide image size {side}",
            where=f"{where}.config",
            fix=f"image_size: {max(round(side / divisor), 1) * divisor}",
        )
