"""Set how the device of this process computes: what products may round to, and whether sums have one order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch._inductor.config
import torch.utils.deterministic

from m3i_scale.errors import ConfigError

_WHERE = "hardware.deterministic"
_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}
"""What torch asks for (`torch.use_deterministic_algorithms`), and sums over ranks that no switch adds up. The list is
that of torchtitan (`distributed/utils.py`)."""


def allow_tf32(dtype: torch.dtype) -> None:
    """Let GPUs round the factors of fp32 products and convolutions to TF32 if a run computes in bf16 or fp16: those
    factors have fewer digits anyway. Runs in fp32 compute in fp32, which cuDNN's convolutions do not do by default.
    CPUs are not affected.

    Args:
        dtype: that the run computes in.
    """
    # Not `fp32_precision`, which torch has from 2.9 on: torch raises errors if both interfaces are in use, and its
    # compiler reads this one.
    torch.backends.cuda.matmul.allow_tf32 = dtype != torch.float32
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def check_deterministic() -> None:
    """Refuse an environment that undoes `compute_deterministically`."""
    for name, value in _VARIABLES.items():
        if os.environ.get(name, value) != value:
            raise ConfigError(
                f"a deterministic run needs {name}={value}, and it is {os.environ[name]}",
                where=_WHERE,
                fix=f"unset {name}, or hardware.deterministic=false",
            )


def compute_deterministically() -> None:
    """Have every operation give the same bits whenever it gets the same, also on GPUs, or raise. Call it before the
    ranks meet: cuBLAS and NCCL read their variables once.
    """
    os.environ.update(_VARIABLES)
    torch.use_deterministic_algorithms(True)
    # For finding faults; it costs a kernel a tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._inductor.config.deterministic = True  # kernels are not chosen by how long they take


@contextlib.contextmanager
def nondeterminism_explained() -> Iterator[None]:
    """Say of an operation that has no deterministic form which setting it contradicts."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise ConfigError(
            str(error).partition(",")[0],
            where=_WHERE,
            why="this model, or its loss, adds up in an order that differs from run to run on this device",
            fix="hardware.deterministic=false",
        ) from error
