"""Hold defaults of `data` that commands on shards share: importing `config` takes half of the time of `--help`."""

from __future__ import annotations

STREAMS = 8
SHUFFLE_SHARDS = 8
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's own limit against images that unpack to gigabytes."""
MAX_CAPTION_BYTES = 2**16
MAX_SAMPLE_BYTES = 2**29
"""No image of `MAX_IMAGE_PIXELS` is so large."""
MAX_TOKENS = 64
"""Of a caption, special tokens included."""
NO_CLASS = 255
"""Pixels of a mask that are ignored."""
MASK_SIDE = 112
"""Masks of objects are kept in their boxes at so many pixels a side: four times what a Mask R-CNN learns from."""
