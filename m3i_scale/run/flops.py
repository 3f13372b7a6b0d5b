"""FLOPs of training steps, counted with the modules on `meta` without memory, and the peak of the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.backbones.flops import counter as flop_counter
from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch, synthetic_batch
from m3i_scale.engine.device import compute_dtype
from m3i_scale.engine.peak import Peak, measured_peak, named_peak
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.run.setup import ResolvedRun


@dataclass(frozen=True)
class Work:
    """FLOPs per step and the peak FLOP/s of the device."""

    flop: dict[str, float]
    """Result of `step_flop`."""
    max_tokens: int
    """Caption length that was counted, in tokens."""
    peak: Peak

    def step_flop(self, caption_tokens: float) -> float:
        """Return the FLOPs per step for a mean caption length. The FLOPs of a text encoder or caption decoder are
        nearly proportional to it."""
        return self.flop["model"] - self.flop["text"] * (1 - caption_tokens / self.max_tokens)


def step_flop(run: RunConfig, label_sets: dict[str, list[str]], vocab_size: int | None) -> dict[str, float]:
    """Return the FLOPs of one optimizer step over the global batch and all ranks. A multiply-add counts as two.

    Counts matrix products, convolutions and attention, on a batch in which every sample has every target and every
    caption has `text.max_tokens` tokens. Masks of varying size are those of seeds 0, 1, …. Similarities with samples of
    other ranks are not included: they are only counted within a micro-batch. If the run has several stages
    (`RunConfig.in_stage`), the first one counts.

    Args:
        vocab_size: vocabulary size of the tokenizer; None without a text target.

    Returns:
        `forward` (student), `teacher` (EMA, teachers and text encoder), `heads` (decoders, heads, losses), `backward`.
        `model`: the sum of these four, used for MFU. `text`: the part of `model` that scales with caption tokens.
        Recomputation by activation checkpointing is not counted.
    """
    micro = run.optim.micro_batch_size
    scale = run.optim.batch_size / micro
    with torch.device("meta"):
        objective = build_objective(run, label_sets, vocab_size)
        batch = synthetic_batch(
            micro,
            objective.recipe.drawn_views,
            image=run.image_size(objective.student.image_size),
            tokens=run.text.max_tokens if objective.recipe.uses_text else 1,
            classes=min((len(names) for names in label_sets.values()), default=1),
            vocabulary=vocab_size or 100,
            reads=objective.recipe.reads,
        )
        parts = _count_parts(objective, replace(batch, seeds_B=torch.arange(micro, device="cpu")))
    parts["model"] = sum(parts[name] for name in ("forward", "teacher", "heads", "backward"))
    return {name: value * scale for name, value in parts.items()}


def count_work(resolved: ResolvedRun) -> Work:
    """Count the FLOPs per step and determine the peak FLOP/s for MFU, identically on every rank."""
    given, dtype = resolved.run.hardware.peak_tflops, compute_dtype(resolved.deepspeed.config)
    peak = measured_peak(dtype) if given is None else named_peak(given, dtype)
    flop = step_flop(resolved.run, resolved.label_sets, resolved.vocab_size)
    return Work(flop, resolved.run.text.max_tokens, peak)


def _count_parts(objective: Objective, batch: Batch) -> dict[str, float]:
    parts = dict.fromkeys(("forward", "teacher", "heads", "backward", "text"), 0.0)
    counter = flop_counter()

    @contextlib.contextmanager
    def span(name: str, factor: int = 1) -> Iterator[None]:
        before = counter.get_total_flops()
        yield
        parts[name] += factor * (counter.get_total_flops() - before)

    every_row = _EveryRow()  # type: ignore[no-untyped-call]
    every_object = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with every_row, every_object, sdpa_kernel(SDPBackend.MATH), counter:
        objective.span = span
        hooks = []
        for module in objective.text_modules:
            # A backward pass has twice the products; a frozen text encoder has none.
            factor = 3 if any(parameter.requires_grad for parameter in module.parameters()) else 1
            hooks += _around(module, partial(span, "text", factor))
        loss, _ = objective(batch)
        with span("backward"):
            loss.backward()
    for hook in hooks:
        hook.remove()
    objective.span = contextlib.nullcontext
    objective.zero_grad()
    return parts


def _around(module: torch.nn.Module, span: Callable[[], contextlib.AbstractContextManager[None]]) -> list[Any]:
    """Register hooks that wrap a module's forward pass in a span; return their handles."""
    opened: list[contextlib.ExitStack] = []

    def enter(*_: Any) -> None:
        opened.append(contextlib.ExitStack())
        opened[-1].enter_context(span())

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(lambda *_: opened.pop().close()),
    ]


class _EveryRow(TorchDispatchMode):
    """Dispatch mode that treats every mask of rows or tokens as all true, because meta tensors have no values."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if function is torch.ops.aten.index.Tensor:
            tensor, indices = args[0], args[1]
            args = (tensor, [_all_rows(index) for index in indices])
        return function(*args, **(kwargs or {}))


def _all_rows(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return index
    if index.dim() != 1:
        raise NotImplementedError(f"a mask of {index.dim()} dimensions")
    return torch.arange(len(index), device=index.device)
