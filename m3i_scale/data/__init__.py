"""Training data from WebDataset shards: reading in a fixed order, decoding, cropping and tokenization.

Which sample a rank reads: rank → streams (`loader.py`), stream → dataset (`mixing.py`), dataset → sample (`order.py`).
`stream.py` takes the next valid sample, `parts.py` says how many samples of each stream make a micro-batch.
"""
