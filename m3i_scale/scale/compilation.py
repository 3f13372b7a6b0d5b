"""Use `torch.compile` layer by layer: layers of one class share their kernels, and code between them stays as it is.

What is compiled is the arithmetic of a layer alone. Whether a whole layer recomputes is decided outside it; what it
keeps under `selective`, the compiler chooses. Under ZeRO-3 gathers and releases are outside too: there a compiled layer
is a leaf, whose parameters come and go together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from m3i_scale.errors import ConfigError
from m3i_scale.scale.activations import read_policy, stacks

_WHERE = "backbone.compile"
_VARIANTS = 64
"""Of one class: widths, numbers of visible tokens, with and without gradient, training and validation. torch's own
limit is 8, and beyond it a layer that must be one graph ends the run."""
_KEPT_SHARE = 0.5


def check_compile() -> None:
    """Refuse to compile where it cannot be done. Call it before any start.

    Raises:
        ConfigError: there is no compiler.
    """
    device = get_accelerator().device_name()
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(
            "`compile` needs a C++ compiler on a CPU, and there is none",
            where=_WHERE,
            fix="apt-get install g++, or backbone.compile=false",
        )


def compile_layers(module: nn.Module, policy: str = "none") -> list[str]:
    """Compile every layer that is called as a whole, trained or not; return their names. Call it before the engine is
    started.

    Args:
        module: holds the layers.
        policy: `backbone.activation_checkpointing`. Under `selective` the compiler chooses what a layer keeps: half of
            what it would keep otherwise, so that as little as possible is computed again.

    Raises:
        ConfigError: there is no such layer.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._functorch.config.activation_memory_budget = _KEPT_SHARE if read_policy(policy).kind == "selective" else 1.0
    compiled: dict[type, Callable[..., Any]] = {}
    names = []
    for layers in stacks(module):
        for name, layer in layers:
            kind = type(layer)
            if kind not in compiled:
                compiled[kind] = torch.compile(_arithmetic(kind), fullgraph=True)
            layer.forward = partial(_run, layer, compiled[kind])
            names.append(name)
    if not names:
        raise ConfigError(
            "`compile` has no effect: this model has no layers of `transformers`' kind",
            where=_WHERE,
            fix="backbone.compile=false",
        )
    return names


def _arithmetic(kind: type) -> Callable[..., Any]:
    """Return `forward` without the switch for recomputation that `transformers` wraps round it."""
    forward: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]
    return getattr(forward, "__wrapped__", forward)


def _run(layer: Any, compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Do what the wrapped `forward` does, with the compiled arithmetic."""
    if getattr(layer, "varies_in_length", False):
        _mark_lengths([*inputs, *named.values()])
    run = partial(compiled, layer, **named)
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(run, *inputs)
    return run(*inputs)


def _mark_lengths(inputs: list[Any]) -> None:
    """Have one graph serve all lengths of states (B, L, D) and their mask (B, 1, L or 1, L). Captions are of another
    length on every rank, and a rank that compiles for its own in the middle of a run has all others wait.
    """
    for value in inputs:
        if isinstance(value, Tensor):
            for dim in (1,) if value.dim() == 3 else (2, 3):
                if value.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(value, dim)
