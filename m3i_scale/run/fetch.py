"""Batches that all ranks get or none: a rank whose data fails must not leave the others in a collective for ever."""

from __future__ import annotations

from collections.abc import Iterator

from m3i_scale.data.batch import Batch
from m3i_scale.errors import UserError
from m3i_scale.scale.agree import agree, raise_together


class Fetcher(Iterator[Batch]):
    """The micro-batches of this rank, with a stand-in where one cannot be had, until the ranks next agree.

    A rank without data cannot leave: the forward and backward passes of the others gather and reduce with it. Asking
    all ranks before every pass would cost a collective and a wait for the device each time. So the rank goes through
    the rest of the step with the batch that it had before, and the vote that ends every step anyway, before the
    optimizer, carries its fault along. Only the first batch has nothing to stand in for it, and is voted on by itself.

    Args:
        batches: of this rank.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._last: Batch | None = None
        self._fault: UserError | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank's data failed since the ranks last agreed."""
        return self._fault is not None

    def __next__(self) -> Batch:
        """The next batch, or its stand-in; all ranks ask for the first one together.

        Raises:
            UserError: the first batch could not be had on some rank.
        """
        if self._fault is not None and self._last is not None:
            return self._last
        first, batch = self._last is None, None
        try:
            batch = next(self._batches, None)
        except UserError as fault:
            self._fault = fault
        if first and agree(self.failed)[0]:
            self.raise_together()
        if batch is not None:
            self._last = batch
        elif self._fault is None or self._last is None:
            raise StopIteration
        return self._last

    def raise_together(self) -> None:
        """End on every rank with the fault of one; called on all ranks once one of them has `failed`."""
        raise_together(self._fault)
