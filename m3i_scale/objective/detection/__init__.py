"""Object detection: boxes, classes and masks, with modules of torchvision assembled as in detectron2.

The model consists of two files that are copied into exports. They import nothing from this package.
"""

from pathlib import Path

from m3i_scale.objective.detection.configuration_mask_rcnn import MaskRcnnConfig
from m3i_scale.objective.detection.modeling_mask_rcnn import MaskRcnnForObjectDetection

SOURCE_FILES = tuple(Path(__file__).with_name(f"{stem}_mask_rcnn.py") for stem in ("configuration", "modeling"))
"""Files that `transformers` needs to load the model without this package, with `trust_remote_code`."""
AUTO_MAP = {
    "AutoConfig": f"{SOURCE_FILES[0].stem}.{MaskRcnnConfig.__name__}",
    "AutoModelForObjectDetection": f"{SOURCE_FILES[1].stem}.{MaskRcnnForObjectDetection.__name__}",
}

__all__ = ["AUTO_MAP", "SOURCE_FILES", "MaskRcnnConfig", "MaskRcnnForObjectDetection"]
