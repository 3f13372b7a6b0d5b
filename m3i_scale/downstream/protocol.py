"""Check that a protocol is for the backbone that it is given."""

from __future__ import annotations

from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.backbones.presets import DEFAULT_PRESET, VisionConfig
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError

_NAMES = {"transformer": "a plain Transformer (ViT, DINOv2, CLIP)", "internimage": "InternImage"}


def check_family(run: RunConfig, config: VisionConfig) -> None:
    """Check that the run's backbone is of the kind that the numbers of its protocol are for.

    Args:
        run: the run file.
        config: of its backbone.

    Raises:
        ConfigError: it is of another kind.
    """
    backbone, protocol = run.backbone, run.protocol
    if protocol is None or protocol.family is None:
        return
    family = "internimage" if isinstance(config, InternImageConfig) else "transformer"
    if family != protocol.family:
        raise ConfigError(
            f"the protocol is for {_NAMES[protocol.family]}, and the backbone is {_NAMES[family]}",
            where=f"backbone: {backbone.from_pretrained or backbone.preset or DEFAULT_PRESET}",
            why="learning rates by layer and their decay are those of another model",
            fix="take a protocol for it, or protocol `finetune`, which is for any",
        )
