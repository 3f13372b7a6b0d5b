"""Apply `torch.compile` layer by layer: layers of one class share their kernels, and the code between them stays eager.

Full recomputation is decided outside the compiled layer; under `selective` the compiler chooses the saved tensors.
ZeRO-3 gathers and releases also stay outside: a compiled layer is a leaf module, gathered and released as a unit.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from m3i_scale.engine.activations import read_policy, stacks
from m3i_scale.errors import ConfigError

_WHERE = "backbone.compile"
_VARIANTS = 64
"""Limit of compiled variants per class: widths, numbers of visible tokens, with and without gradient, training and
validation. torch's default limit is 8. Beyond it, a layer with `fullgraph` raises an error."""
_KEPT_SHARE = 0.5


def check_compile() -> None:
    """Raise ConfigError if this machine lacks a tool that the compiler needs. Call it before any start."""
    missing = _missing_tools()
    if missing:
        raise ConfigError(
            f"`compile` needs {' and '.join(missing)}, not installed on this machine",
            where=_WHERE,
            fix=f"run `{' && '.join(dict.fromkeys(missing.values()))}`, or set backbone.compile=false",
        )


def _missing_tools() -> dict[str, str]:
    """Return name and install command of each missing tool. torch builds CPU kernels with `CXX` or g++; Triton builds
    its launchers with `CC`, gcc or clang. Both include Python.h."""
    cuda = get_accelerator().device_name() == "cuda"
    variable, defaults = ("CC", ["gcc", "clang"]) if cuda else ("CXX", ["g++"])
    compilers = [os.environ[variable]] if os.environ.get(variable) else defaults
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    missing = {}
    if not any(map(shutil.which, compilers)):
        missing[f"a C{'' if cuda else '++'} compiler ({' or '.join(compilers)})"] = "apt-get install g++"
    if not headers.is_file():
        missing[f"the headers of Python ({headers})"] = "apt-get install python3-dev"
    if cuda and importlib.util.find_spec("triton") is None:
        missing["Triton"] = "pip install triton"
    return missing


def compile_layers(module: nn.Module, policy: str = "none") -> list[str]:
    """Compile every layer that runs its full forward, trained or not; return the names. Call it before the engine
    starts.

    Under the `selective` policy (`backbone.activation_checkpointing`) the compiler keeps half of the activations that
    it would keep otherwise, chosen to minimize recomputation.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._functorch.config.activation_memory_budget = _KEPT_SHARE if read_policy(policy).kind == "selective" else 1.0
    compiled: dict[type, Callable[..., Any]] = {}
    names = []
    for layers in stacks(module):
        for name, layer in layers:
            if getattr(layer, "communicates", False):  # collectives are no part of a graph
                continue
            kind = type(layer)
            if kind not in compiled:
                compiled[kind] = torch.compile(_arithmetic(kind), fullgraph=True)
            layer.forward = partial(_run, layer, compiled[kind])
            names.append(name)
    if not names:
        raise ConfigError(
            "`compile` has no effect: the model has no `transformers` layers",
            where=_WHERE,
            fix="set backbone.compile=false",
        )
    return names


def _arithmetic(kind: type) -> Callable[..., Any]:
    """Return `forward` without the `transformers` wrapper for activation checkpointing."""
    forward: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]
    return getattr(forward, "__wrapped__", forward)


def _run(layer: Any, compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if getattr(layer, "varies_in_length", False):
        _mark_lengths([*inputs, *named.values()])
    run = partial(compiled, layer, **named)
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(run, *inputs)
    return run(*inputs)


def _mark_lengths(inputs: list[Any]) -> None:
    """Mark the lengths of states (B, L, D) and of their mask (B, 1, L or 1, L) as dynamic, so that one graph serves
    all. Caption lengths differ between ranks; a rank that recompiles during a run makes all others wait."""
    for value in inputs:
        if isinstance(value, Tensor):
            for dim in (1,) if value.dim() == 3 else (2, 3):
                if value.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(value, dim)
