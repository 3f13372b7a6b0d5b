"""Record one micro-batch of a module without computing it: live bytes, gradients, parameter uses and FLOPs. The module
and its input are on the `meta` device, where tensors have sizes and lifetimes but no content."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config as fx_config
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3i_scale.backbones.flops import counter


@dataclass(frozen=True)
class Trace:
    """A recorded micro-batch. Parameters are indices into `module.parameters()`."""

    live: tuple[int, ...]
    """Live bytes of tensors other than parameters, after every allocation and after every complete gradient, which is
    no longer counted."""
    kept: tuple[int, ...]
    """At the same moments, bytes of parameters of which the backward pass holds a view: under ZeRO-3 it keeps the
    gathered storage, even if the parameter is released."""
    gradients: tuple[tuple[int, int], ...]
    """Parameters in the order in which their gradients are complete, with the index of that moment in `live`."""
    forward: tuple[tuple[int, ...], ...]
    """Parameters of the modules that run, in the order of the forward pass; under ZeRO-3 they are gathered together."""
    backward: tuple[tuple[int, ...], ...]
    """The same for the backward pass, recomputation included."""
    flop: int
    """FLOPs of the forward and backward pass, recomputation included."""
    cached: int = 0
    """Bytes of features of the other micro-batches of the step (`contrastive_batch: global`), not counted in `live`."""

    @property
    def operations(self) -> int:
        """Count the operations that create a tensor: accelerator kernels, except in-place ones."""
        return len(self.live) - len(self.gradients)


def scaled(small: Trace, large: Trace, samples: int, wanted: int) -> Trace | None:
    """Return the trace of `wanted` samples, extrapolated from traces of `samples` and of twice `samples`: sizes are
    affine in the number of samples. Return None if the two traces create other tensors or other gradients."""
    if len(small.live) != len(large.live) or small.gradients != large.gradients:
        return None

    def at(one: int, two: int) -> int:
        return round(one + (two - one) * (wanted - samples) / samples)

    return replace(large, live=tuple(map(at, small.live, large.live)), flop=at(small.flop, large.flop))


@dataclass
class _Recorder:
    owned: set[int]
    live: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    alive: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """By storage: its size, and the weak reference that reports its end."""
    live_bytes: int = 0
    kept_bytes: int = 0

    def meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.owned or key in self.alive:
            return
        size = storage.nbytes()
        self.alive[key] = size, weakref.ref(storage, lambda end: self._forget(key, end))
        self.live_bytes += size
        self.note()

    def note(self) -> None:
        self.live.append(self.live_bytes)
        self.kept.append(self.kept_bytes)

    def take(self, tensor: Tensor) -> None:
        """Stop counting a tensor."""
        self.meet(tensor)
        key = tensor.untyped_storage()._cdata
        size, end = self.alive[key]
        self.live_bytes -= size
        self.alive[key] = 0, end

    def _forget(self, key: int, end: Any) -> None:
        if key in self.alive and self.alive[key][1] is end:
            self.live_bytes -= self.alive.pop(key)[0]


class _Storages(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.recorder.meet(leaf)
        return output


class _NoAnswers(TorchFunctionMode):
    """Evaluates meta tensors as False in conditions: captions differ in length, so their mask is needed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].device.type == "meta":
            return False
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    """Model the fused kernels of all devices: they keep q, k, v, the output and one number per row. On `meta` torch
    would use the unfused products and keep their scores. Only one kernel computes gradients of a mask."""
    if attn_mask is not None and attn_mask.requires_grad:
        learnt: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, 0.0, is_causal
        )[0]
        return learnt
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]
    return output


@dataclass(eq=False)
class _SavedTensor:
    """A view of a parameter in autograd's saved tensors."""

    tensor: Tensor


def record(module: nn.Module, step: Callable[[], Tensor], inputs: list[Tensor]) -> Trace:
    """Record `step`, one forward pass of `module` that returns the loss, and its backward pass. The module is on `meta`
    and in training mode. `inputs` are tensors that exist before the step."""
    parameters = list(module.parameters())
    held = [*parameters, *module.buffers(), *inputs]
    recorder = _Recorder({tensor.untyped_storage()._cdata for tensor in held})
    uses: list[tuple[int, ...]] = []
    gradients: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_module_hooks(module, parameters, uses))
        stack.enter_context(_gradient_hooks(parameters, recorder, gradients))
        stack.enter_context(_kept_views(parameters, recorder, uses))
        # Every sample has every target.
        stack.enter_context(fx_config.patch(meta_nonzero_assume_all_nonzero=True))  # type: ignore[attr-defined]
        stack.enter_context(_Storages(recorder))
        flops = stack.enter_context(counter())
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention))
        with _NoAnswers():
            loss = step()
        forward = len(uses)
        loss.backward()
        del loss
    flop = int(flops.get_total_flops())
    live, kept = tuple(recorder.live), tuple(recorder.kept)
    return Trace(live, kept, tuple(gradients), tuple(uses[:forward]), tuple(uses[forward:]), flop)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield the modules with ZeRO-3 hooks, with their parameters: all modules except those inside a leaf."""
    leaf = z3_leaf_module(module)
    yield module, list(module.parameters(recurse=leaf))
    for child in () if leaf else module.children():
        yield from _units(child)


@contextlib.contextmanager
def _module_hooks(module: nn.Module, parameters: list[nn.Parameter], uses: list[tuple[int, ...]]) -> Iterator[None]:
    """Record when a module uses its parameters: in the forward pass, and, by its output's gradient, in the backward
    pass."""
    index = {id(parameter): place for place, parameter in enumerate(parameters)}
    handles = []

    def watch(child: nn.Module, places: tuple[int, ...]) -> None:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                    leaf.register_hook(lambda _: uses.append(places))

        handles.append(child.register_forward_pre_hook(lambda *_: uses.append(places)))
        handles.append(child.register_forward_hook(after))

    for child, its in _units(module):
        watch(child, tuple(index[id(parameter)] for parameter in its))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _gradient_hooks(
    parameters: list[nn.Parameter], recorder: _Recorder, gradients: list[tuple[int, int]]
) -> Iterator[None]:
    """Remove a gradient from its parameter as soon as it is complete: the engine decides when it is freed."""
    handles = []

    def taken(place: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                raise RuntimeError("a gradient hook without a gradient")
            recorder.take(gradient)
            gradients.append((place, len(recorder.live)))
            recorder.note()
            parameter.grad = None

        return hook

    for place, parameter in enumerate(parameters):
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(taken(place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _kept_views(parameters: list[nn.Parameter], recorder: _Recorder, uses: list[tuple[int, ...]]) -> Iterator[None]:
    """Record views saved by `F.linear`: they keep the storage alive, even if the parameter is released. Every use of a
    parameter gathers it again, so its views are counted by use."""
    owners = {parameter.untyped_storage()._cdata: place for place, parameter in enumerate(parameters)}
    views: Counter[tuple[int, int]] = Counter()  # by parameter, and its number of uses so far

    def pack(tensor: Tensor) -> Any:
        place = owners.get(tensor.untyped_storage()._cdata)
        if place is None or tensor.is_leaf:
            return tensor
        key, size = (place, sum(place in used for used in uses)), tensor.untyped_storage().nbytes()
        views[key] += 1
        recorder.kept_bytes += size * (views[key] == 1)

        def drop() -> None:
            views[key] -= 1
            recorder.kept_bytes -= size * (views[key] == 0)

        kept = _SavedTensor(tensor)
        weakref.finalize(kept, drop)
        return kept

    def unpack(saved: Any) -> Tensor:
        return saved.tensor if isinstance(saved, _SavedTensor) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
