"""Training data from WebDataset shards: reading in a fixed order, decoding, cropping and tokenization.

Which sample a rank reads: rank → streams (`share_of` in `mixing.py`), stream → dataset (`Mix` in `mixing.py`), dataset
→ sample (`StreamOrder.locate` in `order.py`). With S = data.streams, W ranks and a global batch of B, rank r has the
streams r·S/W to (r + 1)·S/W − 1, and step k takes the valid samples (k − 1)·B/S to k·B/S − 1 of each, counted from 0.
After a rollback to an earlier step, the data position is kept: the repeated steps read later samples.
`loader.py` computes the samples of a stream per micro-batch, `stream.py` takes the next valid sample.
"""
