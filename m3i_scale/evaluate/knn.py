"""k-nearest-neighbor classification by cosine similarity: evaluates features without training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_scale.evaluate import NotMeasuredError
from m3i_scale.evaluate.features import unit_rows

TEMPERATURE = 0.07
_CHUNK = 1_024


def knn_predict(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    *,
    neighbours: tuple[int, ...],
    classes: int,
    temperature: float = TEMPERATURE,
) -> dict[int, NDArray[np.int64]]:
    """Predict classes (M) by k. Each neighbor votes with exp(cosine / temperature), so lower temperatures weight close
    neighbors more."""
    if len(train_ND) < max(neighbours):
        raise NotMeasuredError(f"{len(train_ND)} labelled training samples for {max(neighbours)} neighbours")
    train = torch.from_numpy(unit_rows(train_ND))
    labels = torch.from_numpy(train_labels_N)
    test = torch.from_numpy(unit_rows(test_MD))
    predicted: dict[int, list[NDArray[np.int64]]] = {k: [] for k in neighbours}
    for part in torch.split(test, _CHUNK):
        cosine, index = (part @ train.T).topk(max(neighbours), dim=1)
        # cosine − 1 ≤ 0 prevents overflow of exp and scales all votes equally
        weights = ((cosine - 1) / temperature).exp()
        for k in neighbours:
            votes = torch.zeros(len(part), classes).scatter_add_(1, labels[index[:, :k]], weights[:, :k])
            predicted[k].append(votes.argmax(dim=1).numpy())
    return {k: np.concatenate(parts) for k, parts in predicted.items()}
