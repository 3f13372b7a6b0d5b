"""Faults that are planted in the code to see each of them found, at its line."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from run_case import Case
from simulated_cases import CARRIER

from m3i_scale.checkpoint.saver import HostCopies, Saver
from m3i_scale.data.batch import Batch
from m3i_scale.engine import averages, engine_state, partition
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.engine import keep_gradients_until_reduced
from m3i_scale.run.data_supply import DeviceCopies
from m3i_scale.run.trainer import Trainer


@dataclass(frozen=True)
class Sabotage:
    """A change of a function, and the line that a fault must name."""

    case: Case
    function: Callable[..., Any]
    old: str
    new: str
    kind: str
    """How the fault begins; `wait` for one more wait of a step."""
    named: tuple[Callable[..., Any], str]
    """The function and the text of the line."""

    def plant(self) -> None:
        """Change the function, wherever it is referred to."""
        function: Any = inspect.unwrap(self.function)
        path = Path(inspect.getsourcefile(function) or "")
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.old!r} is {source.count(self.old)} times in {path}")
        changed = compile(source.replace(self.old, self.new), str(path), "exec", dont_inherit=True)
        name = function.__code__.co_qualname
        function.__code__ = next(code for code in _codes(changed) if code.co_qualname == name)

    def place(self) -> str:
        """Return `file.py:line` of the line that a fault must name."""
        function, text = self.named
        function = inspect.unwrap(function)
        lines, first = inspect.getsourcelines(function)
        (number,) = (first + number for number, line in enumerate(lines) if text in line)
        return f"{Path(inspect.getsourcefile(function) or '').name}:{number}"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


_COPIED = (DeviceCopies.__call__, "copy = batch.to(")
_SMALL, _TWICE = Case(CARRIER, "zero1_bf16"), Case(CARRIER, "zero1_bf16", accumulation=2)

SABOTAGES = {
    "copies of batches are not waited for": Sabotage(
        _SMALL, DeviceCopies.__call__, "current.wait_stream(self._stream)", "pass", "race", _COPIED
    ),
    "batches are freed while they are read": Sabotage(
        _TWICE, DeviceCopies.__call__, "tensor.record_stream(current)", "pass", "lifetime", _COPIED
    ),
    "weights are gathered before they are written": Sabotage(
        Case(CARRIER, "zero3_bf16_all_reduce", ("checkpoint.every_steps=9",)),  # a save waits for the device
        partition.order_gathers,
        "stream.wait_stream(get_accelerator().current_stream())",
        "pass",
        "race",
        (averages._write, "split(ema, copy, remainder)"),
    ),
    "gathered averages are not waited for": Sabotage(
        _SMALL,
        ShardedEma.wait,
        "gather.wait()",
        "pass",
        "race",
        (ShardedEma.publish, "dist.all_gather_into_tensor(flat.gathered"),
    ),
    "copies of a save are not waited for": Sabotage(
        _SMALL,
        Saver._work,
        "get_accelerator().synchronize()",
        "pass",
        "race",
        (HostCopies.copy, "place.copy_(tensor, non_blocking=True)"),
    ),
    "averages are saved before they are gathered": Sabotage(
        _SMALL,
        ShardedEma.parts,
        "        self.wait()\n        place = self._places[name]",
        "        place = self._places[name]",
        "race",
        (HostCopies.copy, "place.copy_(tensor, non_blocking=True)"),
    ),
    "stored samples are read before they are there": Sabotage(
        Case(CARRIER, "zero1_bf16", ("checkpoint.probe=true",)),
        Batch.to,
        'queued = torch.device(device).type != "cpu"',
        "queued = True",
        "race",
        (Batch.to, "copies: dict[str, Any] = {name: value.to("),
    ),
    "the optimizer counts its steps on the host": Sabotage(
        Case(CARRIER, "zero1_bf16", long=True),
        engine_state.make_moments,
        "place = flat.device if counts_on_device else None",
        "place = None",
        "device",
        (engine_state.make_moments, 'moments["step"] = torch.tensor('),
    ),
    "gradients are freed while they are reduced": Sabotage(
        Case(CARRIER, "zero2_bf16"),
        keep_gradients_until_reduced,
        "optimizer._record_gradient_stream = lambda gradient, stream: gradient.record_stream(stream)",
        "pass",
        "lifetime",
        (DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks, "allreduced = self.allreduce_bucket("),
    ),
    "the loss is read in every micro-batch": Sabotage(
        _SMALL,
        Trainer._micro_batch,
        "state.engine.backward(spread_nonfinite(loss))",
        "state.engine.backward(spread_nonfinite(loss)), float(loss)",
        "wait",
        (Trainer._micro_batch, "state.engine.backward(spread_nonfinite(loss))"),
    ),
}
"""By name."""
