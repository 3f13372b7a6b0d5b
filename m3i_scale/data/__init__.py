"""WebDataset streams: making shards, a fixed order of samples, decoding, views, tokens.

Which sample a rank sees: rank → streams (`loader.py`), stream → source (`mixing.py`), source → sample (`order.py`).
"""
