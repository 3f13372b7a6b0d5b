"""InternImage as a `transformers` model. Exports contain its two files, which import nothing from this package."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from m3i_scale.backbones.internimage.configuration_internimage import InternImageConfig
from m3i_scale.backbones.internimage.modeling_internimage import (
    InternImageForImageClassification,
    InternImageModel,
)

AutoConfig.register(InternImageConfig.model_type, InternImageConfig, exist_ok=True)
AutoModel.register(InternImageConfig, InternImageModel, exist_ok=True)
AutoModelForImageClassification.register(InternImageConfig, InternImageForImageClassification, exist_ok=True)

SOURCE_FILES = tuple(Path(__file__).with_name(f"{stem}_internimage.py") for stem in ("configuration", "modeling"))
"""Files that `transformers` needs to load the model without this package, with `trust_remote_code`."""
AUTO_MAP = {
    "AutoConfig": f"{SOURCE_FILES[0].stem}.{InternImageConfig.__name__}",
    "AutoModel": f"{SOURCE_FILES[1].stem}.{InternImageModel.__name__}",
    "AutoModelForImageClassification": f"{SOURCE_FILES[1].stem}.{InternImageForImageClassification.__name__}",
}

__all__ = ["AUTO_MAP", "SOURCE_FILES", "InternImageConfig", "InternImageForImageClassification", "InternImageModel"]
