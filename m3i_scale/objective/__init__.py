"""Compute the paper, equation by equation, in plain PyTorch: no DeepSpeed here, and other ranks only in `ranks.py`.

Equation (2), −log P̂(z_y | ẑ_y) and what keeps z_y from collapsing: `distributions/` and `regularizers/`. For vectors
they meet in the `loss` of a regulariser; for texts and categories, where other candidates keep z_y apart, in that of
the distribution (`distributions/pairs.py`, `targets/category.py`). Equation (5), inputs and targets: `inputs.py`,
`targets/`. Equation (6), the weighted sum over groups: `balance.py`. `information.py` puts them together.
"""
