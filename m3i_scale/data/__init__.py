"""Training data as WebDataset streams: shards are made here, read in a fixed order, decoded, cut to views, tokenized.

Which sample a rank sees: rank → streams (`loader.py`), stream → source (`mixing.py`), source → sample (`order.py`).
"""
