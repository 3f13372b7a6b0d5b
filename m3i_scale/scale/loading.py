"""Read weights from files into (partitioned) parameters, one at a time: no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from m3i_scale.scale.agree import from_rank_0
from m3i_scale.scale.partition import gathered


class WeightStream(Protocol):
    """Gives named values in an order that is known before they are read."""

    @property
    def names(self) -> list[str]:
        """Return the names of the parameters, in order."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield their whole values, read as they are asked for."""


def stream_into(module: nn.Module, prefix: str, open_stream: Callable[[], WeightStream]) -> None:
    """Write a stream into the parameters `prefix + name`. Every rank calls it; rank 0 alone opens and reads.

    Each parameter is gathered, written and partitioned again before the next value is read, so that beside its shards
    rank 0 holds one parameter and what the stream has open, and other ranks one parameter.

    Args:
        module: the model.
        prefix: where the named tensors belong.
        open_stream: called on rank 0; an error of it, or of its reading, ends all ranks.

    Raises:
        UserError: what `open_stream` or its stream raises.
        Exception: on rank 0, an error of another kind; on the other ranks it is a UserError that names it.
    """
    opened: list[WeightStream] = []

    def order() -> list[str]:
        opened.append(open_stream())
        return opened[0].names

    names: list[str] = from_rank_0(order)
    parameters = dict(module.named_parameters())
    tensors = opened[0].tensors() if opened else None
    fault: Exception | None = None
    for name in names:
        # The other ranks are inside the same gathers: an error waits until all are through.
        fault = _write(parameters[prefix + name], tensors if fault is None else None) or fault
    from_rank_0(lambda: _raise(fault))


@torch.no_grad()
def _write(parameter: nn.Parameter, tensors: Iterator[Tensor] | None) -> Exception | None:
    """Write the next value, where this rank has one; return the error of reading it.

    It is read before the parameter is gathered: a slow file does not hold the other ranks inside the collective.
    """
    value: Tensor | None = None
    fault: Exception | None = None
    if tensors is not None:
        value, fault = _attempt(lambda: next(tensors))
    with gathered([parameter], write=True):
        if value is not None:
            _, fault = _attempt(lambda: parameter.copy_(value))
    return fault


def _attempt(act: Callable[[], Tensor]) -> tuple[Tensor | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def _raise(fault: Exception | None) -> None:
    if isinstance(fault, StopIteration):
        raise RuntimeError("a stream of weights has fewer values than names") from fault
    if fault is not None:
        raise fault
