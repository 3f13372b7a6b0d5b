"""Compile for an H100 without having one: Inductor's kernels become machine code (sm_90), and none is started."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch._inductor import async_compile, config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget

_TARGET = GPUTarget("cuda", 90, 32)
_PROPERTIES = types.SimpleNamespace(
    name="H100 80GB HBM3",
    total_memory=80 * 2**30,
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

load_kernel = async_compile._load_triton_kernel_from_source

asked_for: list[str] = []
"""Names of kernels, as often as a graph asked for one."""
_compiled: dict[str, Any] = {}


class _Driver:
    """Stands for Triton's driver, which needs libcuda."""

    utils = types.SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 2**10})

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return 0


def _compile_kernel(_: Any, name: str, source: str, device_str: str = "cuda") -> Any:
    """Stand for `AsyncCompile.triton`: compile the first configuration that autotuning would try."""
    asked_for.append(name)
    if source not in _compiled:
        kernel = load_kernel(name, source)
        binary = kernel._precompile_config(kernel.configs[0]).kernel
        assert binary.metadata.target == _TARGET
        assert binary.asm["cubin"]
        _compiled[source] = kernel
    return _compiled[source]


def _lower(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[[list[Any]], Any]:
    """Compile a graph, and return what runs it as it was, on fake tensors."""
    compile_fx_inner(copy.deepcopy(graph), inputs, **options)

    def run(given: list[Any]) -> Any:
        result = graph(*given)
        given.clear()
        return result

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Be a backend of `torch.compile`: Inductor up to its machine code."""
    return compile_fx(graph, inputs, inner_compile=_lower)


def install() -> None:
    """Replace what asks for a card, for the rest of the process. Call it after `device_api.install`."""
    triton.runtime.driver.set_active(_Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    torch.cuda._get_device_properties = lambda device=None: _PROPERTIES  # type: ignore[attr-defined]
    torch.cuda.get_device_properties = lambda device=None: _PROPERTIES  # type: ignore[assignment]
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0  # a function of its own: the compiler keeps rules by function
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    async_compile.AsyncCompile.triton = _compile_kernel  # type: ignore[method-assign, assignment]
    config.use_static_cuda_launcher = False
    config.compile_threads = 1
    config.fx_graph_cache = False  # it would skip the kernels
    config.joint_graph_constant_folding = False  # computes with real tensors
    config.shape_padding = False  # measures kernels
