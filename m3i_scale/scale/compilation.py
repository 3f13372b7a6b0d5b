"""Use `torch.compile` layer by layer: layers of one class share their kernels, and code between them stays as it is.

What is compiled is the arithmetic of a layer alone. Whether a whole layer recomputes is decided outside it; what it
keeps under `selective`, the compiler chooses. Under ZeRO-3 gathers and releases are outside too: there a compiled layer
is a leaf, whose parameters come and go together.
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

from m3i_scale.errors import ConfigError
from m3i_scale.scale.activations import read_policy, stacks

_WHERE = "backbone.compile"
_VARIANTS = 64
"""Of one class: widths, numbers of visible tokens, with and without gradient, training and validation. torch's own
limit is 8, and beyond it a layer that must be one graph ends the run."""
_KEPT_SHARE = 0.5


def check_compile() -> None:
    """Check that this machine has what the compiler needs. Call it before any start."""
    missing = _missing_tools()
    if missing:
        raise ConfigError(
            f"`compile` needs {' and '.join(missing)}, which this machine does not have",
            where=_WHERE,
            fix=f"{' && '.join(dict.fromkeys(missing.values()))}, or backbone.compile=false",
        )


def explain_auto() -> str | None:
    """Return the log line for `backbone.compile: auto`; None on CPUs, for which compiling is not recommended."""
    if get_accelerator().device_name() == "cpu":
        return None
    missing = _missing_tools()
    needs = f" (first install {' and '.join(missing)})" if missing else ""
    return (
        f"{_WHERE}: auto does not compile layers, because no GPU has shown equal losses yet. Compiled layers are "
        f"expected to be faster: {_WHERE}=true{needs}"
    )


def _missing_tools() -> dict[str, str]:
    """Return what the compiler needs at run time on the device of this process and does not find: name and remedy.

    torch builds kernels for CPUs by `CXX` or g++, Triton its launchers by `CC`, gcc or clang. Both include Python.h.
    """
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
    """Compile every layer that is called as a whole, trained or not; return their names. Call it before the engine is
    started.

    Args:
        module: holds the layers.
        policy: `backbone.activation_checkpointing`. Under `selective` the compiler chooses what a layer keeps: half of
            what it would keep otherwise, so that as little as possible is computed again.
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
