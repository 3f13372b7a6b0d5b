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
    """Give all parameters their first values: a function of (seed, name of the module), whatever their type but for its
    rounding, which leaves the global generator as it was.

    Args:
        module: the model.
        initialize: fills the parameters of one module.
        seed: of the run.
        skip: prefixes of submodules that get their values elsewhere.
        whole: has parameters at full shape inside; the default is for those that always are.
    """
    owners = [(name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    for name, child in module.named_modules():
        parameters = list(child.parameters(recurse=False))
        if not parameters or name.startswith(skip):
            continue
        above = [owner for prefix, owner in owners if name == prefix or name.startswith(f"{prefix}.")]
        with whole(parameters), torch.random.fork_rng(), torch.no_grad():
            # One number of 32 bits: torch's generator on the host drops the upper half of a seed.
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            with _drawn_in_fp32(parameters):
                initialize(above[-1] if above else child, child)


@contextlib.contextmanager
def _drawn_in_fp32(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Have the parameters in fp32 inside, and round them to their own type at the end.

    A uniform number that rounds to the upper bound becomes the lower one in torch: in bf16 one weight of a thousand
    would have the wrong sign, at its largest.
    """
    originals = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    yield
    for parameter, values in zip(parameters, originals, strict=True):
        parameter.data = values.copy_(parameter.data)
