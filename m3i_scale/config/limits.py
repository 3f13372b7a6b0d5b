"""Set upper limits for sizes in a run file: far above any model that anyone trains, and low enough that a number with
three zeros too many is an error at once instead of a check without end."""

from __future__ import annotations

MAX_LAYERS = 1_000
"""Layers of a model or a head."""
MAX_VIEWS = 1_000
"""Views of an image, masks of a view, or blocks of a mask."""
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
"""Streams of samples."""
MAX_WORKERS = 1_024
"""Loader processes of a rank."""
MAX_WAIT_S = 1e9
"""Seconds, which are 31 years: as good as no limit."""
MAX_ASPECT = 20.0
"""The longer side over the shorter one, or how far scale jitter shrinks or enlarges an image."""
