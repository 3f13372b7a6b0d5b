"""Model folder with random weights and the architecture of an export, as a baseline for the export."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from m3i_scale.backbones.build import backbone_config, backbone_source, build_backbone
from m3i_scale.backbones.first_values import draw_first_values
from m3i_scale.config import BackboneConfig
from m3i_scale.files import atomic_dir, sha256_of_json
from m3i_scale.objective.build import initialize_module

_PROCESSOR = "preprocessor_config.json"


def random_start(start: str, folder: Path, seed: int) -> Path:
    """Return a model folder with the architecture of `start` and random weights, initialized as for pre-training from
    scratch. The weights depend only on architecture and seed; an existing folder is reused.

    Args:
        start: an export, or any other value of `backbone.from_pretrained`.
        folder: parent of the new folder.
        seed: of the weights.
    """
    section = BackboneConfig(from_pretrained=start)
    config, source = backbone_config(section), backbone_source(section)
    shape = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    made = folder / f"random-{sha256_of_json(shape)[:12]}-{seed}"
    if made.is_dir():
        return made
    backbone = build_backbone(config)
    draw_first_values(backbone, initialize_module, seed=seed)
    with atomic_dir(made) as unfinished:
        config.save_pretrained(unfinished)
        save_file(backbone.model.state_dict(), unfinished / "model.safetensors", {"format": "pt"})
        if (source.folder / _PROCESSOR).is_file():
            shutil.copy(source.folder / _PROCESSOR, unfinished)  # has mean and std of the images
    return made
