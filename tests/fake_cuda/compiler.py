"""Compile for an H100 without a GPU: Inductor's kernels become machine code (sm_90), and none is started."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch._inductor import async_compile, config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget

torch_compile = torch.compile
_TARGET = GPUTarget("cuda", 90, 32)
load_kernel = async_compile._load_triton_kernel_from_source
_kernels: dict[str, Any] = {}
"""By source code."""


@dataclass
class Graph:
    """A graph that was compiled."""

    layer: str
    is_backward: bool
    outputs: int
    """Of a forward graph, results and tensors that are saved for the backward graph."""
    kernels: int = 0


graphs: list[Graph] = []
"""In the order in which they were compiled."""


def clear() -> None:
    """Forget compiled kernels."""
    _kernels.clear()


class _Driver:
    """Stands for Triton's driver, which needs libcuda."""

    utils = types.SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 2**10})

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return 0


def _compile_kernel(_: Any, name: str, source: str, device_str: str = "cuda") -> Any:
    """Stand for `AsyncCompile.triton`: compile the first configuration that autotuning would try."""
    graphs[-1].kernels += 1
    if source not in _kernels:
        kernel = load_kernel(name, source)
        binary = kernel._precompile_config(kernel.configs[0]).kernel
        assert binary.metadata.target == _TARGET
        assert binary.asm["cubin"]
        _kernels[source] = kernel
    return _kernels[source]


def _lower(layer: str, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[[list[Any]], Any]:
    """Compile a graph, and return a function that runs the original graph on fake tensors."""
    (results,) = graph.graph.find_nodes(op="output")[0].args
    graphs.append(Graph(layer, bool(options.get("is_backward")), len(results)))
    compile_fx_inner(copy.deepcopy(graph), inputs, **options)

    def run(arguments: list[Any]) -> Any:
        result = graph(*arguments)
        arguments.clear()
        return result

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compile_function(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Stand for `torch.compile`: compile a method of a layer with Inductor down to machine code."""
    layer = function.__qualname__.partition(".")[0]

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=partial(_lower, layer))

    return torch_compile(function, backend=backend, **options)


def install() -> None:
    """Replace what asks for a GPU, for the rest of the process. Call it after `device_api.install`."""
    triton.runtime.driver.set_active(_Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0  # a separate function: Dynamo registers rules by function
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    async_compile.AsyncCompile.triton = _compile_kernel  # type: ignore[method-assign, assignment]
    config.use_static_cuda_launcher = False  # it keeps no metadata
    config.compile_threads = 1
    config.fx_graph_cache = False  # it would skip the kernels
    config.joint_graph_constant_folding = False  # it computes with real tensors
    config.shape_padding = False  # it measures kernels
