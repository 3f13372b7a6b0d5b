"""Use `torch.compile` layer by layer: layers of one class share their kernels, and code between them stays as it is.

What is compiled is the arithmetic of a layer alone. Recomputation is decided outside it, and under ZeRO-3 gathers and
releases are too: there a compiled layer is a leaf, whose parameters come and go together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from m3i_scale.errors import ConfigError
from m3i_scale.scale.activations import read_policy, trained_stacks

_WHERE = "backbone.compile"
_VARIANTS = 64
"""Of one class: widths, lengths of captions and of what is visible, training and validation. torch's own limit is 8,
and beyond it a layer that must be one graph ends the run."""


def check_compile(policy: str) -> None:
    """Refuse to compile where it cannot be done, or would undo what the run file asks for. Call it before any start.

    Args:
        policy: `backbone.activation_checkpointing`.

    Raises:
        ConfigError: no compiler, or `selective`, which has to see the single operations of a layer.
    """
    if read_policy(policy).kind == "selective":
        raise ConfigError(
            "`compile` and activation checkpointing 'selective' exclude each other",
            where=_WHERE,
            why="selective keeps the outputs of single operations, which a compiled layer has not",
            fix="backbone.activation_checkpointing=full or none, or backbone.compile=false",
        )
    device = get_accelerator().device_name()
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(
            "`compile` needs a C++ compiler on a CPU, and there is none",
            where=_WHERE,
            fix="apt-get install g++, or backbone.compile=false",
        )


def compile_layers(module: nn.Module) -> list[str]:
    """Compile every trained layer that is called as a whole; return their names. Call it before the engine is started.

    Raises:
        ConfigError: there is no such layer.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    compiled: dict[type, Callable[..., Any]] = {}
    names = []
    for layers in trained_stacks(module):
        for name, layer in layers:
            kind = type(layer)
            if kind not in compiled:
                compiled[kind] = torch.compile(_arithmetic(kind), fullgraph=True)
            set_z3_leaf_module(layer, True)
            layer.forward = partial(_run, layer, compiled[kind])
            names.append(name)
    if not names:
        raise ConfigError(
            "`compile` has no effect: this model has no trained layers of `transformers`' kind",
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
    run = partial(compiled, layer, **named)
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(run, *inputs)
    return run(*inputs)
