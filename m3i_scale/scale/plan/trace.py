"""Record what one micro-batch of a module does, without computing it: every tensor that comes and goes, every gradient,
every use of a parameter, and the FLOPs.

The module and its input lie on the `meta` device, where tensors have sizes and lifetimes and no content.
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
    """Says one thing that happens in a micro-batch.

    take, give: tensor `number` of `size` bytes comes into being, or is freed. gradient: that of parameter `owner` is
    complete, and is tensor `number`. fetch, release: module `owner` needs its parameters, or does not any more. keep,
    drop: the backward pass holds on to the storage of parameter `owner` by the view `number`, or lets go of it.
    backward: the forward pass is over.
    """

    kind: Kind
    number: int = 0
    size: int = 0
    owner: int = 0


@dataclass(frozen=True)
class Module:
    """Describes one module. Parameters are indices into `module.parameters()` of the whole model."""

    own: tuple[int, ...]
    """Parameters that are not a child's."""
    all: tuple[int, ...]
    """Its own, and its children's."""
    leaf: bool
    """Whether it is one unit under ZeRO-3 (`set_leaves`): then its children are no modules of the trace."""

    @property
    def fetched(self) -> tuple[int, ...]:
        """Return the parameters that are gathered when it runs."""
        return self.all if self.leaf else self.own


@dataclass(frozen=True)
class Trace:
    """Holds a recorded micro-batch."""

    events: tuple[Event, ...]
    modules: tuple[Module, ...]
    flop: int
    """Of forward and backward pass, recomputation included."""
    saved_bytes: int
    """What the forward pass leaves behind for the backward pass."""

    @property
    def operations(self) -> int:
        """Count what makes a tensor: kernels of an accelerator, but for those that write in place."""
        return sum(event.kind == "allocate" for event in self.events)


def scaled(small: Trace, large: Trace, samples: int, wanted: int) -> Trace | None:
    """Return the trace of `wanted` samples, from those of `samples` and of twice as many.

    Sizes are a number, and a number for every sample. None where the two make other tensors or other gradients.
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
    """Return the tensors that come into being, in order, and which of them are whose gradients."""
    return [(e.kind, e.number, e.owner) for e in trace.events if e.kind in ("allocate", "gradient")]


@dataclass
class _Recorder:
    """Collects events; knows which storages are alive."""

    owned: set[int]
    events: list[Event] = field(default_factory=list)
    alive: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """By storage: its number and the reference that tells of its end."""
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
    """Answers a tensor without content with no where it is asked: captions differ in length, their mask is needed."""

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
    """Do as the fused kernels of all devices do: keep q, k, v, the output and one number a row.

    On `meta` torch would take the plain products, and keep their scores. One kernel alone gives a mask gradients.
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
    """Stands for a view of a parameter among what autograd saved."""

    tensor: Tensor


def record(module: nn.Module, step: Callable[[], Tensor], inputs: list[Tensor]) -> Trace:
    """Record `step`, which gives the loss, and its backward pass.

    Args:
        module: on `meta`, in training mode.
        step: one forward pass of `module`.
        inputs: tensors that lie there before.
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
    """Yield the modules that ZeRO-3 has hooks on: all of them, but those inside of a leaf."""
    yield module
    for child in () if z3_leaf_module(module) else module.children():
        yield from _units(child)


@contextlib.contextmanager
def _module_hooks(owners: list[nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Record when a module uses its parameters, forwards and (by the gradient of its output) backwards."""
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
    """Take a complete gradient from the module at once: the engine decides what becomes of it."""
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
    """Record views that `F.linear` saves: they hold the storage, whatever becomes of the parameter."""
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
