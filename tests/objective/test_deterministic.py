"""No recipe reaches an operator that raises an error under `torch.use_deterministic_algorithms` on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import DINOV2, RECIPES, REGISTERS, random_batch, tiny_objective, tiny_teacher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NONDETERMINISTIC = {
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("avg_pool3d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "nll_loss2d_forward", "_ctc_loss_backward", "histc", "put_"),
    *("upsample_linear1d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
    *("_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
}
"""See the list at `torch.use_deterministic_algorithms`. Of `interpolate` with plain bilinear weights torch itself takes
another form on a CUDA device, and `cumsum` is on the list for floating-point numbers alone."""
OTHER_SIDE = "backbone.config.image_size=64"
"""Batches have 32 pixels, so that positions are interpolated, as in a stage of small images."""


class Operators(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args))
        self.names.add("cumsum of floats" if name == "cumsum" and floats else name)
        return func(*args, **(kwargs or {}))


def operators(recipe: str, *overrides: str) -> set[str]:
    """Return the operators of a forward and a backward pass."""
    objective = tiny_objective(recipe, *overrides)
    with Operators() as seen:
        loss, _ = objective(random_batch(4))
        loss.backward()
    return seen.names


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_deterministic_operators_alone(recipe: str) -> None:
    tiny_teacher()
    seen = operators(recipe)
    assert seen & {*NONDETERMINISTIC, "cumsum of floats"} == set()
    assert "mm" in seen


@pytest.mark.parametrize(
    "overrides",
    [
        (OTHER_SIDE,),
        ("backbone.preset=clip-b/16", OTHER_SIDE),
        ("backbone.preset=siglip-b/16", OTHER_SIDE),
        (*DINOV2, OTHER_SIDE),
        (*REGISTERS, OTHER_SIDE),
    ],
    ids=["vit", "clip", "siglip", "dinov2", "registers"],
)
def test_so_do_backbones_that_interpolate_positions(overrides: tuple[str, ...]) -> None:
    seen = operators("m3i", *overrides)
    assert seen & {*NONDETERMINISTIC, "cumsum of floats"} == set()
