"""The paper's objective, equation by equation, in plain PyTorch. Only `ranks.py` communicates.

Equation (2), −log P̂(z_y | ẑ_y) plus the collapse prevention of z_y, is the `loss` of a regularizer: for vectors
`PooledRegularizer.loss` (`regularizers/pooled.py`), for patches `DenseRegularizer.loss` (`regularizers/__init__.py`),
in their subclasses. Both call P̂, a `Density` or `Boltzmann` of `distributions.py`. For texts and categories, it is the
`loss` of the distribution (`targets/text.py`, `targets/category.py`). Equation (5), inputs and targets: `inputs.py`,
`targets/`. Equation (6), the weighted sum of loss terms: `balance.py`. `Objective.forward`
(`information.py`) combines all parts.
"""
