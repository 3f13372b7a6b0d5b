"""Initialize parameters module by module, as a function of a seed and the module's name."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel

Initialize = Callable[[nn.Module, nn.Module], None]
"""Called with (owner, submodule). The owner is the nearest parent `transformers` model, or the submodule itself."""


def draw_first_values(
    module: nn.Module,
    initialize: Initialize,
    *,
    seed: int,
    skip: tuple[str, ...] = (),
    whole: Callable[[list[nn.Parameter]], AbstractContextManager[None]] = lambda parameters: contextlib.nullcontext(),
) -> None:
    """Initialize all parameters from (seed, name of the module). The state of all random generators is restored.

    Random numbers are drawn on the CPU in fp32, so they are the same on every device and in every dtype, up to
    rounding. Submodules with a prefix in `skip` are skipped. `whole` gathers partitioned parameters to their full
    shape.
    """
    owners = [(name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    # CPU only: by default, `fork_rng` copies the states of all GPUs of the machine.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, child in module.named_modules():
            parameters = list(child.parameters(recurse=False))
            if not parameters or name.startswith(skip):
                continue
            above = [owner for prefix, owner in owners if name == prefix or name.startswith(f"{prefix}.")]
            # `torch.manual_seed` would also seed GPUs. The CPU generator uses 32 bits of a seed.
            torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            with whole(parameters), _on_host_in_fp32(child):
                initialize(above[-1] if above else child, child)


@contextlib.contextmanager
def _on_host_in_fp32(module: nn.Module) -> Iterator[None]:
    """Replace the parameters of a module by fp32 copies on the CPU, and copy their values back at the end.

    Random numbers differ between CPU and GPU, and between GPU models. In bf16, torch maps uniform numbers that round to
    the upper bound to the lower bound: one weight in a thousand would have the wrong sign.
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
