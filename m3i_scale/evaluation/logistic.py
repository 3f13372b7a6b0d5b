"""Logistic regression by L-BFGS on any device, with the objective of scikit-learn's `LogisticRegression`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

MAX_ITERATIONS = 300
TOLERANCE = 1e-3
"""A fit has converged once no element of the gradient of the mean loss is larger."""
_ROWS = 65_536
"""Samples in one matrix product; limits the memory of the logits."""
_HISTORY = 10
_SERIAL_WORK = 10**8
"""Number of multiply-adds below which one CPU thread computes a matrix product. L-BFGS computes thousands of products,
and each waits for its slowest thread: on busy cores for a time slice, though the product takes a millisecond."""


class LogisticRegression:
    """Linear classifier of standardized features; repeated fits are warm-started.

    Minimizes mean cross-entropy + |W|² / (2·C·N) over weights W and biases, which are not regularized.

    Args:
        features_ND: the data to fit on; their mean and standard deviation standardize all features.
        labels_N: at least two different classes.
    """

    def __init__(self, features_ND: NDArray[np.float32], labels_N: NDArray[np.int64], device: torch.device) -> None:
        self._classes, targets_N = np.unique(labels_N, return_inverse=True)
        features = torch.from_numpy(features_ND).to(device, copy=True)  # standardized in place
        self._mean_D, std_D = features.mean(dim=0), features.std(dim=0, correction=0)
        # A constant feature has rounding noise in place of a deviation.
        self._std_D = torch.where(std_D > 1e-6 * self._mean_D.abs(), std_D, torch.ones_like(std_D))
        self._features_ND = self._standardized(features)
        self._targets_N = torch.from_numpy(targets_N).to(device)
        # Two classes need one weight vector: the logit of the first class is 0, as in scikit-learn.
        rows = len(self._classes) if len(self._classes) > 2 else 1
        self.weights = torch.zeros(rows, features.shape[1] + 1, dtype=torch.float64, device=device)
        """(R, D + 1): the bias is the last column."""

    def fit(self, strength: float) -> bool:
        """Fit with C = `strength`; return whether the fit converged."""
        flat = self.weights.view(-1)
        optimizer = torch.optim.LBFGS(
            [flat],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=TOLERANCE,
            tolerance_change=1e-12,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient_RE = self._loss(strength)
            flat.grad = gradient_RE.view(-1)
            return loss

        with self._threads():
            optimizer.step(closure)
            _, gradient_RE = self._loss(strength)
        return bool(gradient_RE.abs().max() <= TOLERANCE)

    def predict(self, features_MD: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the most likely classes (M)."""
        parts = [
            self._logits(self._standardized(part_BD.to(self._mean_D.device, copy=True))).argmax(dim=1).cpu().numpy()
            for part_BD in torch.split(torch.from_numpy(features_MD), _ROWS)
        ]
        return np.asarray(self._classes[np.concatenate(parts)], dtype=np.int64)

    def _standardized(self, features_BD: Tensor) -> Tensor:
        """Standardize in place."""
        return features_BD.sub_(self._mean_D).div_(self._std_D)

    def _logits(self, features_BD: Tensor) -> Tensor:
        weights_RE = self.weights.float()
        logits_BR = torch.addmm(weights_RE[:, -1], features_BD, weights_RE[:, :-1].T)
        return functional.pad(logits_BR, (1, 0)) if len(weights_RE) == 1 else logits_BR

    def _loss(self, strength: float) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient (R, D + 1)."""
        count, weights_RD = len(self._features_ND), self.weights[:, :-1]
        loss = torch.zeros((), dtype=torch.float64, device=weights_RD.device)
        gradient_RE = torch.zeros_like(self.weights)
        for features_BD, targets_B in zip(self._features_ND.split(_ROWS), self._targets_N.split(_ROWS), strict=True):
            log_BK = functional.log_softmax(self._logits(features_BD), dim=1)
            loss -= log_BK.gather(1, targets_B[:, None]).sum(dtype=torch.float64)
            residual_BK = log_BK.exp_()
            residual_BK[torch.arange(len(targets_B), device=targets_B.device), targets_B] -= 1
            residual_BR = residual_BK[:, -len(weights_RD) :]
            gradient_RE[:, :-1] += residual_BR.T @ features_BD
            gradient_RE[:, -1] += residual_BR.sum(dim=0)
        penalty = 1 / (strength * count)
        gradient_RE /= count
        gradient_RE[:, :-1] += penalty * weights_RD
        return loss / count + penalty / 2 * weights_RD.square().sum(), gradient_RE

    @contextmanager
    def _threads(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        if self._features_ND.numel() * len(self.weights) < _SERIAL_WORK:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
