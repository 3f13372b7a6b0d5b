"""Translate the names of the parts of a plain vision Transformer between code bases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import CLIPVisionConfig, Dinov2Config, ViTConfig

OURS: dict[type, dict[str, str]] = {
    ViTConfig: {
        "patch": "embeddings.patch_embeddings.projection",
        "class": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "norm1": "layers.{}.layernorm_before",
        **{part: f"layers.{{}}.attention.{part}_proj" for part in "qkvo"},
        "norm2": "layers.{}.layernorm_after",
        **{part: f"layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
        "norm": "layernorm",
    },
    Dinov2Config: {
        "patch": "embeddings.patch_embeddings.projection",
        "class": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "norm1": "encoder.layer.{}.norm1",
        **{part: f"encoder.layer.{{}}.attention.{part}_proj" for part in "qkvo"},
        "scale1": "encoder.layer.{}.layer_scale1.lambda1",
        "norm2": "encoder.layer.{}.norm2",
        **{part: f"encoder.layer.{{}}.mlp.{part}" for part in ("fc1", "fc2", "gate_proj", "up_proj", "down_proj")},
        "scale2": "encoder.layer.{}.layer_scale2.lambda1",
        "norm": "layernorm",
    },
    CLIPVisionConfig: {
        "patch": "embeddings.patch_embedding",
        "class": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",
        "norm1": "encoder.layers.{}.layer_norm1",
        **{part: f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"},
        "o": "encoder.layers.{}.self_attn.out_proj",
        "norm2": "encoder.layers.{}.layer_norm2",
        **{part: f"encoder.layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
        "norm": "post_layernorm",
    },
}
"""By configuration, the stock name of every part; `{}` is the number of the layer."""


@dataclass(frozen=True)
class Placed:
    """Says where a tensor goes: to one parameter, or in equal parts along its first dimension to several."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """Marks a tensor that is no part of a backbone."""

    reason: str


@dataclass(frozen=True)
class NameMap:
    """Holds the names of one code base."""

    prefix: str
    """Of the vision tower; what does not have it is `outside`."""
    outside: str
    """What lies outside the tower, in words."""
    block: str
    """Before the number of a layer."""
    outer: Mapping[str, str]
    """Part of `OURS` by name or stem (name without .weight or .bias), outside of layers."""
    inner: Mapping[str, tuple[str, ...]]
    """The same within a layer; several parts share one tensor in equal shares."""
    left_out: tuple[tuple[str, str], ...]
    """(pattern, reason) of what is no part of a backbone; patterns match from the start of the name."""

    def place(self, name: str, ours: Mapping[str, str]) -> Placed | LeftOut | None:
        """Return what becomes of a tensor; None where nothing is known of it.

        Args:
            name: in the file.
            ours: one of `OURS`.
        """
        if not name.startswith(self.prefix):
            return LeftOut(self.outside)
        name = name.removeprefix(self.prefix)
        for pattern, reason in self.left_out:
            if re.match(pattern, name):
                return LeftOut(reason)
        number, stem = "", name
        table: Mapping[str, tuple[str, ...]] = {key: (part,) for key, part in self.outer.items()}
        if match := re.fullmatch(re.escape(self.block) + r"(\d+)\.(.+)", name):
            (number, stem), table = match.groups(), self.inner
        for suffix in ("", ".weight", ".bias"):
            parts = table.get(stem.removesuffix(suffix)) if stem.endswith(suffix) else None
            if parts is not None:
                targets = [_spelt(part, number, ours, suffix) for part in parts]
                return None if None in targets else Placed(tuple(target for target in targets if target))
        return None


def _spelt(part: str, number: str, ours: Mapping[str, str], suffix: str) -> str | None:
    """Return our name of a part: `q.bias`, 3 → layers.3.attention.q_proj.bias; None where our model has none."""
    stem, dot, rest = part.partition(".")
    return None if stem not in ours else ours[stem].format(number) + dot + rest + suffix
