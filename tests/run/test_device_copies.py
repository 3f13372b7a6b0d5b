"""Batches go to an accelerator beside its work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import random_batch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.engine import device
from m3i_scale.engine.device import pinning
from m3i_scale.run import data_supply
from m3i_scale.run.data_supply import DeviceCopies


class Accelerator:
    """Notes what is done, and in which stream. Its memory is torch's that holds nothing."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []
        self.work, self.active = self.Stream(), None

    def Stream(self) -> Any:  # noqa: N802  the name is DeepSpeed's
        done = self.done

        class Stream:
            def wait_stream(self, other: Any) -> None:
                done.append(("wait", (self, other)))

        return Stream()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.active = self.active, stream
        yield
        self.active = before

    def current_stream(self) -> Any:
        return self.active or self.work

    def current_device_name(self) -> str:
        return "meta"


class Copies(TorchDispatchMode):
    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._to_copy.default:
            assert kwargs["non_blocking"]
            self.accelerator.done.append(("copy", self.accelerator.current_stream()))
        return operator(*args, **(kwargs or {}))


def test_a_copy_is_made_beside_the_work_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    for module in (data_supply, device):
        monkeypatch.setattr(module, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: accelerator.done.append(("keep", stream)))
    batch = random_batch(2)
    copies = DeviceCopies()
    with Copies(accelerator):
        arrived = copies(batch)
    fields = len(batch.tensors)
    assert {tensor.device.type for tensor in arrived.tensors.values()} == {"meta"}
    assert arrived.seeds_B is batch.seeds_B
    (_, (waits, copied)) = accelerator.done[fields]
    assert waits is accelerator.work is not copied
    expected = [*[("copy", copied)] * fields, ("wait", (waits, copied)), *[("keep", waits)] * fields]
    assert accelerator.done == expected
    assert pinning() is not None


def test_a_copy_to_the_host_is_complete_when_it_is_returned() -> None:
    """Torch would queue one that is not to block, and return memory that holds no values yet."""
    queued: list[bool] = []

    class Queued(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.aten._to_copy.default:
                queued.append(bool((kwargs or {}).get("non_blocking")))
            return operator(*args, **(kwargs or {}))

    batch = random_batch(2)
    with FakeTensorMode(allow_non_fake_inputs=True), Queued():
        back = batch.to("cuda:0").to("cpu")
    fields = len(batch.tensors)
    assert queued == [True] * fields + [False] * fields
    assert {tensor.device.type for tensor in back.tensors.values()} == {"cpu"}


def test_seeds_are_pinned_with_the_rest_of_a_batch() -> None:
    """They are sent when masks are drawn: out of ordinary memory the driver would copy them first."""
    batch, pinned = random_batch(2), []
    batch.changed(lambda tensor: pinned.append(tensor) or tensor)
    every = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in every}


def test_where_the_host_computes_nothing_is_pinned_or_copied() -> None:
    batch = random_batch(2)
    arrived = DeviceCopies()(batch)
    assert pinning() is None
    assert all(tensor is batch.tensors[name] for name, tensor in arrived.tensors.items())
