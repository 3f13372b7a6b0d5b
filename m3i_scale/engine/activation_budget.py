"""Choice of the layers that recompute, so that the activations saved for the backward pass fit into a budget.

One forward pass without backward is recorded. Tensors that autograd would save inside a layer are counted and freed at
the end of the layer. So counting needs no more memory than `full` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from m3i_scale.engine.activations import recompute_only, summarize_layers, trained_stacks
from m3i_scale.engine.agree import max_over_ranks
from m3i_scale.errors import ConfigError
from m3i_scale.text import GIB


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer holds between forward and backward pass."""

    name: str
    saved: float
    """Bytes that autograd saves, parameters excluded."""
    inputs: float
    """Bytes of the inputs, the only tensors saved if the layer recomputes."""


@dataclass(frozen=True)
class Choice:
    """The layers that recompute, and the resulting activation memory."""

    names: list[str]
    gib: float
    """Peak with these layers recomputing."""
    none_gib: float
    full_gib: float
    outside_gib: float
    """Saved outside layers, included in all of the above."""
    layers: int

    def __str__(self) -> str:
        return (
            f"activations: {self.gib:.3g} GiB counted on a rank (none {self.none_gib:.3g}, full {self.full_gib:.3g}), "
            f"{len(self.names)} of {self.layers} layers recompute: {summarize_layers(self.names)}"
        )


class _Counter:
    """Byte counter of the distinct live storages that autograd saves."""

    def __init__(self, parameters: Iterator[nn.Parameter], keep: bool) -> None:
        self._parameters, self._keep = list(parameters), keep
        self._seen: dict[int, Tensor] = {}
        self.total = 0

    def pack(self, tensor: Tensor) -> Any:
        address = _address(tensor)
        if address not in self._seen and address not in {_address(parameter) for parameter in self._parameters}:
            self._seen[address] = tensor.detach()  # kept alive while counted: addresses are reused
            self.total += tensor.untyped_storage().nbytes()
        return tensor if self._keep else None


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _never(packed: Any) -> Tensor:
    raise RuntimeError("activations were only counted: there is no backward pass")


def count_saved(module: nn.Module, forward: Callable[[], Any]) -> tuple[list[LayerBytes], int]:
    """Return the bytes of every trained layer in forward order, and the bytes saved outside layers.

    `forward` runs `module`, which is in training mode, once with gradient. Buffers and random states are restored.
    """
    bytes_of: dict[str, list[int]] = {}

    def counting(name: str, layer: nn.Module) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *inputs: Any) -> Any:
            counter = _Counter(layer.parameters(), keep=False)
            with saved_tensors_hooks(counter.pack, _never):
                output = function(*inputs)
            layer_bytes = bytes_of.setdefault(name, [0, 0])
            layer_bytes[0] += counter.total
            layer_bytes[1] += sum(value.nbytes for value in inputs if isinstance(value, Tensor))
            return output

        return run

    for layers in trained_stacks(module):
        for name, layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = counting(name, layer)
    outside = _Counter(module.parameters(), keep=True)
    with _as_it_was(module), torch.enable_grad(), saved_tensors_hooks(outside.pack, lambda packed: packed):
        forward()
    return [LayerBytes(name, *layer_bytes) for name, layer_bytes in bytes_of.items()], outside.total


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Restore what a forward pass in training mode changes: buffers (queues, statistics) and random states."""
    accelerator = get_accelerator()
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    host, device = torch.get_rng_state(), accelerator.get_rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        accelerator.set_rng_state(device)
        torch.set_rng_state(host)


def peak_bytes(layers: list[LayerBytes], outside: float, recomputed: set[str]) -> float:
    """Return the peak of the saved bytes: after the forward pass, or just after a layer was recomputed. The backward
    pass frees layers from the last to the first, so few bytes are left when an early layer is recomputed."""
    held, peak = 0.0, 0.0
    for layer in layers:
        again = layer.name in recomputed
        peak = max(peak, held + layer.saved)
        held += layer.inputs if again else layer.saved
    return outside + max(peak, held)


def choose_layers(layers: list[LayerBytes], outside: float, budget_gib: float) -> Choice:
    """Choose the fewest layers to recompute: those that save most memory first, and of equal ones the earlier."""
    order = sorted(range(len(layers)), key=lambda index: (layers[index].inputs - layers[index].saved, index))
    peaks = [
        peak_bytes(layers, outside, {layers[index].name for index in order[:count]}) / GIB
        for count in range(len(layers) + 1)
    ]
    fitting = [count for count, gib in enumerate(peaks) if gib <= budget_gib]
    if not fitting:
        raise ConfigError(
            f"activations do not fit into {budget_gib:g} GiB even when every layer recomputes",
            where="backbone.activation_checkpointing",
            why=f"counted on a rank: {min(peaks):.3g} GiB with all {len(layers)} layers, {peaks[0]:.3g} with none, of "
            f"which {outside / GIB:.3g} outside layers",
            fix="a smaller optim.micro_batch_size, or a larger budget",
        )
    names = [layers[index].name for index in sorted(order[: fitting[0]])]
    return Choice(names, peaks[fitting[0]], peaks[0], peaks[-1], outside / GIB, len(layers))


def fit_activations(module: nn.Module, forward: Callable[[], Any], budget_gib: float) -> Choice:
    """Choose the layers that recompute and apply the choice. Collective: the rank that saves most decides."""
    layers, outside = count_saved(module, forward)
    values = {"outside": float(outside)}
    for number, layer in enumerate(layers):
        values |= {f"{number:06d} saved": float(layer.saved), f"{number:06d} inputs": float(layer.inputs)}
    values = max_over_ranks(values)
    layers = [
        LayerBytes(layer.name, values[f"{number:06d} saved"], values[f"{number:06d} inputs"])
        for number, layer in enumerate(layers)
    ]
    choice = choose_layers(layers, values["outside"], budget_gib)
    recompute_only(module, set(choice.names))
    return choice
