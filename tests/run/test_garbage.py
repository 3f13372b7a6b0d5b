"""When Python's cyclic garbage goes, and that the collector is given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest

from m3i_scale.errors import DataError
from m3i_scale.run.hooks import Garbage, give_back_collector
from m3i_scale.run.trainer import Trainer


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def hook() -> Iterator[Garbage]:
    hook = Garbage()
    yield hook
    give_back_collector()


def test_garbage_goes_by_steps(hook: Garbage) -> None:
    kept = Knot()
    enabled = []
    for _ in range(2):
        hook.post_step()
        enabled.append(gc.isenabled())
    assert enabled == [True, False]
    assert not any(thing is kept for thing in gc.get_objects())  # what stays is not looked at again
    gone = []
    for step in range(3, 301):
        if step % 7 == 0:
            reference = weakref.ref(Knot())
        hook.post_step()
        if step > 7 and reference() is None:
            gone.append(step)
            reference = weakref.ref(kept)
    assert gone
    assert all(step % gone[0] == 0 for step in gone)
    assert len(gone) == 300 // gone[0]


def test_the_collector_is_given_back_after_an_error_of_one_rank(hook: Garbage) -> None:
    def loop() -> None:
        for _ in range(2):
            hook.post_step()
        assert not gc.isenabled()
        raise DataError("of this rank alone")

    trainer = MagicMock(_loop=loop)
    with pytest.raises(DataError):
        Trainer.fit(trainer)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
