"""What ranks tell one another before a step, on one rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from m3i_scale.engine.agree import agree_and_average


def test_what_the_host_knows_goes_to_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Tensor] = []

    def pin_memory(values: Tensor) -> Tensor:
        copied.append(values)
        return values

    accelerator = SimpleNamespace(Stream=object, current_device_name=lambda: "cpu")
    for module in ("agree", "device"):
        monkeypatch.setattr(f"m3i_scale.engine.{module}.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    flags, mean, counts = agree_and_average(
        torch.tensor(True), False, True, value=torch.tensor(2.5, dtype=torch.bfloat16), counts=(7, 0, 9)
    )
    assert (flags, mean, counts) == ((True, False, True), 2.5, [7, 0, 9])
    assert len(copied) == 1
