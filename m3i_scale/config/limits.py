"""Upper limits of sizes in a config file. They are far above any real model, but low enough that a number with three
extra zeros fails at once instead of blocking validation."""

from __future__ import annotations

MAX_LAYERS = 1_000
"""Layers of a model or a head."""
MAX_VIEWS = 1_000
"""Crops of an image, masks of a crop, or blocks of a mask."""
MAX_HEADS = 1_024
"""Attention heads, or groups of channels."""
MAX_WIDTH = 2**18
"""Channels."""
MAX_SIDE = 2**14
"""Pixels, patches or cells along a side of an image."""
MAX_CANDIDATES = 2**24
"""Prototypes, clusters, queries, regions, or vectors in a queue."""
MAX_BATCH = 2**24
"""Samples in a step or a micro-batch."""
MAX_CAPTION_TOKENS = 2**16
"""Tokens of a caption."""
MAX_STREAMS = 2**20
"""Logical data shards."""
MAX_WORKERS = 1_024
"""Data loader processes per rank."""
MAX_WAIT_S = 1e9
"""Seconds; about 31 years, effectively no limit."""
MAX_ASPECT = 20.0
"""Aspect ratio (longer side / shorter side), or maximum factor by which scale jitter shrinks or enlarges an image."""
