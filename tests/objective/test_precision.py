"""In a bf16 model, what decides about losses is computed in fp32: norms of targets, softmaxes, temperatures, sums."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from tiny import RECIPES, random_batch, tiny_objective
from torch.utils._python_dispatch import TorchDispatchMode

DELICATE = {
    "_log_softmax",
    "_softmax",
    "nll_loss_forward",
    "logsumexp",
    "log_sigmoid_forward",
    "binary_cross_entropy_with_logits",
    "linalg_vector_norm",
    "exp",
    "log",
    "sigmoid",
    "var",
    "native_batch_norm",
}
"""Operations that stock layers do not use here (attention is fused, activations are GELU)."""


class Watch(TorchDispatchMode):
    """Types that go into delicate operations, and into a layer norm without parameters, which only targets have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in DELICATE or (name == "native_layer_norm" and args[2] is None):
            tensors = [value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point()]
            self.seen[name] |= {tensor.dtype for tensor in tensors}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_of_a_bf16_model_are_computed_in_fp32(recipe: str) -> None:
    objective = tiny_objective(recipe).bfloat16().train()
    with Watch() as watch:
        loss, figures = objective(random_batch(8))
    if recipe == "multi_teacher":  # the attention pool of SigLIP is torch's, and part of a frozen stock model
        watch.seen["_softmax"] -= {torch.bfloat16}
    assert {name: dtypes for name, dtypes in watch.seen.items() if dtypes - {torch.float32}} == {}
    assert loss.dtype == torch.float32
    assert {value.dtype for value in figures.values()} <= {torch.float32, torch.int64}
    loss.backward()
    assert {p.grad.dtype for p in objective.parameters() if p.grad is not None} == {torch.bfloat16}


def test_the_watch_sees_what_it_should() -> None:
    """The recipes together use most of it, so the test above does not pass for want of anything to see."""
    seen: set[str] = set()
    for recipe in ("m3i", "siglip", "global_distillation", "barlow"):
        with Watch() as watch:
            tiny_objective(recipe).bfloat16().train()(random_batch(8))
        seen |= watch.seen.keys()
    assert {"_log_softmax", "native_layer_norm", "linalg_vector_norm", "exp"} <= seen
    with Watch() as watch:
        torch.ones(2, dtype=torch.bfloat16).exp()
    assert watch.seen["exp"] == {torch.bfloat16}
