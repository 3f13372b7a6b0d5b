"""The paper's objective, equation by equation, in plain PyTorch. Only `ranks.py` communicates.

Equation (2), −log P̂(z_y | ẑ_y) and the collapse prevention of z_y: `distributions.py` and `regularizers/`. For vectors
and patches, the `loss` of a regularizer combines both. For texts and categories, the `loss` of the distribution does
(`targets/text.py`, `targets/category.py`). Equation (5), inputs and targets: `inputs.py`, `targets/`. Equation
(6), the weighted sum of loss terms: `balance.py`. `information.py` combines all parts.
"""
