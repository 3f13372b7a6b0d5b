"""Defaults of `data` shared with the shard commands: importing `config` would take half the time of `--help`."""

from __future__ import annotations

STREAMS = 8
SHUFFLE_SHARDS = 8
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's default limit against decompression bombs."""
MAX_CAPTION_BYTES = 2**16
MAX_SAMPLE_BYTES = 2**29
"""Larger than any image of `MAX_IMAGE_PIXELS`."""
MAX_TOKENS = 64
"""Per caption, including special tokens."""
NO_CLASS = 255
"""Mask value of ignored pixels."""
MASK_SIDE = 112
"""Resolution (pixels per side) of object masks within their boxes: four times the training resolution of Mask R-CNN."""
