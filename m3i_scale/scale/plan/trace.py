"""Record one micro-batch of a module without computing it: allocations, frees, gradients, parameter uses and FLOPs.

The module and its input are on the `meta` device, where tensors have sizes and lifetimes but no content.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal
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

Kind = Literal["allocate", "free", "gradient", "fetch", "release", "keep", "drop", "backward"]


@dataclass(frozen=True)
class Event:
    """One event of a micro-batch.

    allocate, free: tensor `number` of `size` bytes is created, or freed. gradient: the gradient of parameter `owner` is
    complete, and is tensor `number`. fetch, release: module `owner` starts or stops needing its parameters. keep, drop:
    the backward pass starts or stops holding the storage of parameter `owner` by the view `number`. backward: the
    forward pass is over.
    """

    kind: Kind
    number: int = 0
    size: int = 0
    owner: int = 0


@dataclass(frozen=True)
class Module:
    """One module. Parameters are indices into `module.parameters()` of the full model."""

    own: tuple[int, ...]
    """Parameters, without the children's parameters."""
    all: tuple[int, ...]
    """Parameters, including the children's parameters."""
    leaf: bool
    """Whether it is a leaf module under ZeRO-3 (`set_leaves`); its children are then not in the trace."""

    @property
    def fetched(self) -> tuple[int, ...]:
        """Return the parameters that are gathered when it runs."""
        return self.all if self.leaf else self.own


@dataclass(frozen=True)
class Trace:
    """A recorded micro-batch."""

    events: tuple[Event, ...]
    modules: tuple[Module, ...]
    flop: int
    """FLOPs of the forward and backward pass, recomputation included."""
    saved_bytes: int
    """Bytes saved by the forward pass for the backward pass."""

    @property
    def operations(self) -> int:
        """Count the operations that create a tensor: accelerator kernels, except in-place ones."""
        return sum(event.kind == "allocate" for event in self.events)


def scaled(small: Trace, large: Trace, samples: int, wanted: int) -> Trace | None:
    """Return the trace of `wanted` samples, extrapolated from traces of `samples` and of twice `samples`.

    Sizes are linear in the number of samples. Return None if the two traces create other tensors or other gradients.
    """
    if _made(small) != _made(large):
        return None
    sizes = {event.number: event.size for event in small.events if event.size}

    def at(one: int, two: int) -> int:
        return round(one + (two - one) * (wanted - samples) / samples)

    events = tuple(
        replace(event, size=at(sizes.get(event.number, event.size), event.size)) if event.size else event
        for event in large.events
    )
    return Trace(events, small.modules, at(small.flop, large.flop), at(small.saved_bytes, large.saved_bytes))


def _made(trace: Trace) -> list[tuple[str, int, int]]:
    """Return the created tensors, in order, and the owners of gradients."""
    return [(e.kind, e.number, e.owner) for e in trace.events if e.kind in ("allocate", "gradient")]


@dataclass
class _Recorder:
    """Recorder of events that tracks live storages."""

    owned: set[int]
    events: list[Event] = field(default_factory=list)
    alive: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """By storage: its number, and the weak reference that reports its end."""
    live_bytes: int = 0
    count: int = 0

    def meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.owned or key in self.alive:
            return
        self.count += 1
        number, size = self.count, storage.nbytes()

        def end(_: Any) -> None:
            if self.alive.pop(key, (0, None))[0] == number:
                self.live_bytes -= size
                self.events.append(Event("free", number))

        self.alive[key] = number, weakref.ref(storage, end)
        self.live_bytes += size
        self.events.append(Event("allocate", number, size))

    def number_of(self, tensor: Tensor) -> int:
        self.meet(tensor)
        return self.alive[tensor.untyped_storage()._cdata][0]


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
    """Model the fused kernels of all devices: they keep q, k, v, the output and one number per row.

    On `meta` torch would use the unfused products and keep their scores. Only one kernel computes gradients of a mask.
    """
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
    """Record `step`, which returns the loss, and its backward pass.

    Args:
        module: the module, on `meta` and in training mode.
        step: one forward pass of `module`.
        inputs: tensors that exist before the step.
    """
    parameters = list(module.parameters())
    index = {id(parameter): place for place, parameter in enumerate(parameters)}
    storages = {parameter.untyped_storage()._cdata: place for place, parameter in enumerate(parameters)}
    held = [*parameters, *module.buffers(), *inputs]
    recorder = _Recorder({tensor.untyped_storage()._cdata for tensor in held})
    owners = list(_units(module))
    modules = tuple(
        Module(
            tuple(index[id(p)] for p in child.parameters(recurse=False)),
            tuple(index[id(p)] for p in child.parameters()),
            z3_leaf_module(child),
        )
        for child in owners
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_module_hooks(owners, recorder))
        stack.enter_context(_gradient_hooks(parameters, modules, recorder))
        stack.enter_context(_kept_views(storages, recorder))
        # Every sample has every target.
        stack.enter_context(fx_config.patch(meta_nonzero_assume_all_nonzero=True))  # type: ignore[attr-defined]
        stack.enter_context(_Storages(recorder))
        flops = stack.enter_context(counter())
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention))
        with _NoAnswers():
            loss = step()
        saved = recorder.live_bytes
        recorder.events.append(Event("backward"))
        loss.backward()
        del loss
    return Trace(tuple(recorder.events), modules, int(flops.get_total_flops()), saved)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with ZeRO-3 hooks: all modules except those inside a leaf."""
    yield module
    for child in () if z3_leaf_module(module) else module.children():
        yield from _units(child)


@contextlib.contextmanager
def _module_hooks(owners: list[nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Record when a module uses its parameters, in the forward pass and (by the gradient of its output) in the backward
    pass."""
    handles = []

    def before(number: int) -> Callable[..., None]:
        return lambda *_: recorder.events.append(Event("fetch", owner=number))

    def after(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            recorder.events.append(Event("release", owner=number))
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                    leaf.register_hook(lambda _: recorder.events.append(Event("fetch", owner=number)))

        return hook

    for number, child in enumerate(owners):
        handles.append(child.register_forward_pre_hook(before(number)))
        handles.append(child.register_forward_hook(after(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _gradient_hooks(parameters: list[nn.Parameter], modules: tuple[Module, ...], recorder: _Recorder) -> Iterator[None]:
    """Remove a gradient from its parameter as soon as it is complete: the engine decides when it is freed."""
    handles = []
    module_of = {place: number for number, module in enumerate(modules) for place in module.fetched}
    waiting = {n: {p for p in module.fetched if parameters[p].requires_grad} for n, module in enumerate(modules)}

    def taken(place: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                raise RuntimeError("a gradient hook without a gradient")
            number = recorder.number_of(gradient)
            recorder.events.append(Event("gradient", number, gradient.untyped_storage().nbytes(), place))
            parameter.grad = None
            del gradient
            module = module_of[place]
            waiting[module].discard(place)
            if not waiting[module]:
                recorder.events.append(Event("release", owner=module))

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
def _kept_views(storages: dict[int, int], recorder: _Recorder) -> Iterator[None]:
    """Record views saved by `F.linear`: they keep the storage alive, even if the parameter is released."""
    count = 0

    def pack(tensor: Tensor) -> Any:
        nonlocal count
        place = storages.get(tensor.untyped_storage()._cdata)
        if place is None or tensor.is_leaf:
            return tensor
        count += 1
        number, kept = count, _SavedTensor(tensor)
        weakref.finalize(kept, lambda: recorder.events.append(Event("drop", number, owner=place)))
        recorder.events.append(Event("keep", number, owner=place))
        return kept

    def unpack(saved: Any) -> Tensor:
        return saved.tensor if isinstance(saved, _SavedTensor) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
