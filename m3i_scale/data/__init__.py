"""Training data from WebDataset shards: reading in a fixed order, decoding, cropping and tokenization.

Which sample a rank reads: rank → streams (`loader.py`), stream → dataset (`mixing.py`), dataset → sample (`order.py`).
"""
