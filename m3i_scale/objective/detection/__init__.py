"""Find objects: boxes, classes and masks, by parts of torchvision put together as detectron2 does.

What finds them is two files that an export carries along. They import nothing of this package.
"""

from pathlib import Path

from m3i_scale.objective.detection.configuration_mask_rcnn import MaskRcnnConfig
from m3i_scale.objective.detection.modeling_mask_rcnn import MaskRcnnForObjectDetection

SOURCE_FILES = tuple(Path(__file__).with_name(f"{stem}_mask_rcnn.py") for stem in ("configuration", "modeling"))
"""What a folder needs so that a `transformers` without this package loads it, with `trust_remote_code`."""
AUTO_MAP = {
    "AutoConfig": f"{SOURCE_FILES[0].stem}.{MaskRcnnConfig.__name__}",
    "AutoModelForObjectDetection": f"{SOURCE_FILES[1].stem}.{MaskRcnnForObjectDetection.__name__}",
}

__all__ = ["AUTO_MAP", "SOURCE_FILES", "MaskRcnnConfig", "MaskRcnnForObjectDetection"]
