"""Stream weights from files into (partitioned) parameters, one at a time; no rank ever materializes the full model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from m3i_scale.engine.agree import from_rank_0
from m3i_scale.engine.partition import gathered


class WeightStream(Protocol):
    """A stream of named values; the order is known before they are read."""

    @property
    def names(self) -> list[str]:
        """Return the names of the parameters, in order."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield the full values, reading each lazily."""


def stream_into(module: nn.Module, prefix: str, open_stream: Callable[[], WeightStream]) -> None:
    """Write a stream into the parameters `prefix + name`. Every rank calls it; only rank 0 opens and reads the stream.

    Each parameter is gathered, written and partitioned again before the next value is read. In addition to its shards,
    each rank holds one parameter, and rank 0 the open files of the stream. An error of rank 0 is raised on all ranks: a
    UserError as it is, any other as a UserError that names it on the other ranks.
    """
    opened: list[WeightStream] = []

    def order() -> list[str]:
        opened.append(open_stream())
        return opened[0].names

    names: list[str] = from_rank_0(order)
    parameters = dict(module.named_parameters())
    tensors = opened[0].tensors() if opened else None
    error: Exception | None = None
    for name in names:
        # The other ranks take part in the same gathers, so an error is raised only after all of them.
        error = _write(parameters[prefix + name], tensors if error is None else None) or error
    from_rank_0(lambda: _raise(error))


@torch.no_grad()
def _write(parameter: nn.Parameter, tensors: Iterator[Tensor] | None) -> Exception | None:
    """Write the next value, if this rank reads the stream; return the error. The value is read before the parameter is
    gathered, so a slow file does not block the other ranks in the collective."""
    value: Tensor | None = None
    failed: Exception | None = None
    try:
        value = None if tensors is None else next(tensors)
    except Exception as error:
        failed = error
    with gathered([parameter], write=True):
        try:
            if value is not None:
                parameter.copy_(value)
        except Exception as error:
            failed = error
    return failed


def _raise(error: Exception | None) -> None:
    if isinstance(error, StopIteration):
        raise RuntimeError("a stream of weights has fewer values than names") from error
    if error is not None:
        raise error
