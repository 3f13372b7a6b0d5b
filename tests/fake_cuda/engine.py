"""Run DeepSpeed's engine on the simulated GPU: where the modules are built, and stand-ins for the host's own work.

Left out are the values: files of checkpoints hold zeros, parameters have no first values, and ranks agree on lengths.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from answers import TRUTH, without_values
from clocks import Timeline, machine
from deepspeed.ops.adam import cpu_adam
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero import utils as zero_utils
from memory import host_access
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from tracer import Tracer

from m3i_scale.checkpoint import load, stream, tensors
from m3i_scale.checkpoint.saver import BackgroundCall
from m3i_scale.checkpoint.tensors import Index
from m3i_scale.data.batch import Batch
from m3i_scale.engine import agree
from m3i_scale.engine.device import compute_dtype
from m3i_scale.run import setup
from m3i_scale.run.hooks import checkpointing, metrics
from m3i_scale.run.setup import ResolvedRun

_build = setup._build


def _built_on_device(resolved: ResolvedRun, ranks: Any) -> Any:
    """Build the modules on the device, in the type that they compute in: a fake tensor keeps both."""
    torch.set_default_dtype(compute_dtype(resolved.deepspeed.config))
    try:
        with torch.device("cuda"):
            return _build(resolved, ranks)
    finally:
        torch.set_default_dtype(torch.float32)


def _bytes_of(written: Any, metadata: Any) -> Iterator[bytes]:
    """Stand for the bytes of a checkpoint's file: read the tensors, and give zeros."""
    yield stream._header_of(written, metadata)
    for tensor in written:
        for block in tensor.blocks():
            host_access(block)
            yield bytes(block.numel() * block.element_size())


def _read_file(saved: Any, file: str, position: int, dtype: torch.dtype, out: Tensor) -> None:
    """Stand for reading a range of a checkpoint's file: a fresh tensor of the host, copied where it belongs."""
    out.copy_(torch.zeros(out.numel(), dtype=dtype))


def _load_file(path: Path) -> dict[str, Tensor]:
    """Stand for safetensors' `load_file`."""
    with _disable_current_modes():
        loaded = _REAL_LOAD_FILE(path)
    return {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in loaded.items()}


def _read_probe(folder: Path) -> Batch:
    """Stand for reading the samples of a checkpoint."""
    with _disable_current_modes():
        probe = _REAL_READ_PROBE(folder)
    values = {name: value for name, value in vars(probe).items() if isinstance(value, Tensor)}
    return replace(probe, **{name: torch.zeros(value.shape, dtype=value.dtype) for name, value in values.items()})


_REAL_LOAD_FILE, _REAL_READ_PROBE, _REAL_SQUARES = load.load_file, load.read_probe, stream.sum_of_squares
_REAL_TAKE = BackgroundCall.take


def _sum_of_squares(flat: Tensor) -> float:
    """Stand for the sum that checks a loaded tensor; 0, as of the zeros that were saved."""
    _REAL_SQUARES(flat) if flat.is_cuda else host_access(flat)
    return 0.0


class _Thread:
    """Stands for the thread of a save: it begins with what the host knows by then, and reads as late as it can."""

    @staticmethod
    def start(call: Any) -> None:
        """Begin, and do nothing yet."""
        call.timeline = Timeline(f"the {call.name} thread")
        call.timeline.follow(machine.host.clock)

    @staticmethod
    def take(call: Any) -> Any:
        """Do the work, if it is not done; return its result."""
        timeline, call.timeline = getattr(call, "timeline", None), None
        if timeline is not None:
            with machine.thread(timeline):
                call.run()
        return _REAL_TAKE(call)


class _LateFigures:
    """Stands for the thread that computes eigenvalues, and for its result: it reads as late as it can."""

    def __init__(self, threads: int) -> None:
        self._begun: tuple[Callable[[], dict[str, float]], Timeline] | None = None

    def submit(self, compute: Callable[[], dict[str, float]]) -> _LateFigures:
        """Begin with what the host knows by now, and do nothing yet."""
        timeline = Timeline("the thread of late figures")
        timeline.follow(machine.host.clock)
        self._begun = compute, timeline
        return self

    def done(self) -> bool:
        """Return False: the thread is slow."""
        return False

    def result(self) -> dict[str, float]:
        """Do the work."""
        assert self._begun is not None
        compute, timeline = self._begun
        with machine.thread(timeline):
            return compute()


class _CPUAdam:
    """Stands for DeepSpeed's extension of the optimizer on the host."""

    def create_adam(self, *_: object) -> None:
        """Do nothing."""

    def destroy_adam(self, *_: object) -> None:
        """Do nothing."""

    def adam_update(self, *arguments: object) -> None:
        """Read the gradient, and write the weights and moments."""
        weights, gradient, *moments = (argument for argument in arguments if isinstance(argument, Tensor))
        host_access(gradient)
        for tensor in (weights, *moments):
            host_access(tensor, writes=True)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Run what is inside on the simulated GPU."""
    replaced: list[tuple[Any, str, Any]] = [
        (setup, "_build", _built_on_device),
        (setup, "initialize_sharded", lambda *_, **__: None),
        (setup, "stream_into", lambda *_, **__: None),
        (setup, "from_rank_0", lambda work: None),
        (agree, "_reduced", lambda values, operation: [float(value) for value in values]),
        (stream, "_bytes_of", _bytes_of),
        (tensors.SavedTensors, "_read_file", _read_file),
        (stream, "sum_of_squares", _sum_of_squares),
        (load, "sum_of_squares", _sum_of_squares),
        (load, "load_file", _load_file),
        (load, "read_probe", _read_probe),
        (Index, "error", lambda index: None),  # the pieces of other ranks are missing
        (load, "_restore_random_states", lambda folder: None),
        (checkpointing, "merge_states", lambda states: {}),
        (metrics, "ThreadPoolExecutor", _LateFigures),
        (BackgroundCall, "start", _Thread.start),
        (BackgroundCall, "take", _Thread.take),
        (gc, "collect", lambda *_: 0),  # DeepSpeed and the loop collect again and again
        (cpu_adam.CPUAdamBuilder, "load", lambda builder, verbose=True: _CPUAdam()),
    ]
    for module in (zero_utils, partitioned_param_coordinator, partition_parameters, stage3):
        for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, name):
                replaced.append((module, name, lambda *_, **__: None))
    TRUTH[0] = False
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(without_values())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(Tracer(memory=True))
        yield
