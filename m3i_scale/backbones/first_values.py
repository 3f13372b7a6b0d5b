"""Draw the first values of parameters, one module at a time, as a function of a seed and the module's name."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel

Initialize = Callable[[nn.Module, nn.Module], None]
"""Called with (owner, submodule); the owner is the nearest `transformers` model above, else the submodule."""


def draw_first_values(
    module: nn.Module,
    initialize: Initialize,
    *,
    seed: int,
    skip: tuple[str, ...] = (),
    whole: Callable[[list[nn.Parameter]], AbstractContextManager[None]] = lambda parameters: contextlib.nullcontext(),
) -> None:
    """Initialize all parameters from (seed, name of the module) and leave the state of all random generators unchanged.

    The numbers are drawn on the CPU in fp32, then copied to the parameter. They are the same on every device and in
    every dtype, up to the rounding of the dtype.

    Args:
        module: the model.
        initialize: fills the parameters of one module.
        seed: of the run.
        skip: prefixes of submodules that get their values elsewhere.
        whole: has parameters at full shape inside; the default is for those that always are.
    """
    owners = [(name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    # No device but the CPU: by default `fork_rng` copies the states of every GPU of the machine.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, child in module.named_modules():
            parameters = list(child.parameters(recurse=False))
            if not parameters or name.startswith(skip):
                continue
            above = [owner for prefix, owner in owners if name == prefix or name.startswith(f"{prefix}.")]
            # `torch.manual_seed` would seed GPUs too. The CPU's generator reads 32 bits of a seed.
            torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            with whole(parameters), _on_host_in_fp32(child):
                initialize(above[-1] if above else child, child)


@contextlib.contextmanager
def _on_host_in_fp32(module: nn.Module) -> Iterator[None]:
    """Replace the parameters of one module by fp32 copies on the CPU, and copy their values back at the end.

    Random numbers of a GPU are not the ones of a CPU, and depend on the model of the GPU. In bf16, a uniform number
    that rounds to the upper bound becomes the lower one in torch: one weight of a thousand would have the wrong sign.
    """
    originals = dict(module.named_parameters(recurse=False))
    for name, parameter in originals.items():
        setattr(module, name, nn.Parameter(parameter.data.to("cpu", torch.float32), requires_grad=False))
    try:
        yield
    finally:
        drawn = dict(module.named_parameters(recurse=False))
        for name, parameter in originals.items():
            setattr(module, name, parameter)
    for name, parameter in originals.items():
        parameter.data.copy_(drawn[name])
