"""The DeepSpeed engine: start it on a (partitioned) module, load weights into its parameters, and take steps.

A step after an overflow in fp16 is skipped.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from m3i_scale.backbones.load_plan import LoadPlan
from m3i_scale.engine.activations import stacks
from m3i_scale.engine.agree import from_rank_0, raise_together
from m3i_scale.engine.deepspeed.rules import optimizer_class, reduces_in_backward
from m3i_scale.engine.engine_state import count_micro_batches, scale_by_trust_ratio
from m3i_scale.engine.extensions import awaited_build
from m3i_scale.engine.gradients import ForeachBF16Optimizer, clipping_on_device
from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.engine.partition import construct, full_shape, gathered, gradients_by_parameter, order_gathers
from m3i_scale.errors import UserError

_AT_MINIMUM = "loss scale already at minimum"


def set_leaves(module: nn.Module) -> None:
    """Mark layers as ZeRO-3 leaf modules: the parameters of a layer are gathered and released together. Call it before
    start.

    Hooks, fetches and releases of a ViT layer's eight modules with parameters are most of the CPU time of a step
    (docs/benchmarks/gpu.md). A layer with parts that are called one by one is not marked, because the parts of a leaf
    have no hooks. A module with `reads_shapes` is marked: its forward reads the shapes of its children's parameters,
    which are 0 until they are gathered.
    """
    for layers in stacks(module):
        for _, layer in layers:
            set_z3_leaf_module(layer, True)
    for child in module.modules():
        if getattr(child, "reads_shapes", False):
            set_z3_leaf_module(child, True)


def awaited_optimizer(ds_config: dict[str, Any]) -> str | None:
    """Return a message if starting the engine has to wait for the build of its optimizer's extension; None if it is
    built, or if the optimizer is torch's."""
    kind = optimizer_class(ds_config)
    if kind == "AdamW":
        return None
    builder = get_accelerator().create_op_builder("FusedAdamBuilder" if kind == "FusedAdam" else "CPUAdamBuilder")
    return None if builder is None else awaited_build(builder.name)


def set_micro_batch_size(engine: Any, micro_batch_size: int) -> None:
    """Change the micro-batch size of the engine, and with it the number of accumulation steps. Call it between two
    steps. The global batch size, the weights and the optimizer states do not change."""
    batch_size = engine.train_batch_size()
    engine.set_train_micro_batch_size(micro_batch_size)
    engine.set_train_batch_size(batch_size)
    count_micro_batches(engine)


def free_memory_of_torch() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which DeepSpeed asks torch for the free GPU memory when it starts an engine.

    If pynvml is installed, DeepSpeed asks the driver. That fails on names of GPUs and MIG slices in
    `CUDA_VISIBLE_DEVICES` (`_get_nvml_gpu_id` of its CUDA accelerator).
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return contextlib.nullcontext()
    return mock.patch.object(accelerator, "available_memory", lambda device=None: torch.cuda.mem_get_info(device)[0])


def build_engine(
    build: Callable[[], nn.Module],
    initialize: Callable[[nn.Module], None],
    ds_config: dict[str, Any],
    *,
    weight_decay: float,
    decay_tokens: bool = False,
    lr_scales: Callable[[nn.Module], Mapping[str, float]] = lambda module: {},
    trust_coefficient: float | None = None,
) -> Any:
    """Construct the module (partitioned under ZeRO-3), initialize its weights and start the engine.

    Args:
        build: makes the module; called once, on every rank.
        initialize: fills the weights of the built module, before the optimizer copies them.
        ds_config: resolved DeepSpeed configuration.
        weight_decay: applied to matrices only.
        decay_tokens: apply it to tokens and position embeddings too.
        lr_scales: learning rate multipliers by parameter name; the default is 1.
        trust_coefficient: see `scale_by_trust_ratio`. None: off.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)  # the toolkit prints its summary of the configuration
    # DeepSpeed calls collectives by names that newer torch versions rename. A user cannot fix that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    module = construct(build, ds_config)
    initialize(module)
    set_leaves(module)
    groups = parameter_groups(module, weight_decay, lr_scales(module), full_shape, decay_tokens=decay_tokens)
    # The BF16 optimizer prints its memory twice for every parameter group: 100 lines with layer-wise LR decay.
    quiet = mock.patch.object(bf16_optimizer, "see_memory_usage")
    foreach = mock.patch.object(deepspeed.runtime.engine, "BF16_Optimizer", ForeachBF16Optimizer)
    with gradients_by_parameter(), free_memory_of_torch(), quiet, foreach:
        engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=groups, config=ds_config)
    keep_gradients_until_reduced(engine.optimizer)
    if reduces_in_backward(ds_config):
        engine.optimizer.reduce_in_backward(int(engine.zero_reduce_bucket_size()))
    if trust_coefficient is not None:
        scale_by_trust_ratio(engine, trust_coefficient)
    return engine


def keep_gradients_until_reduced(optimizer: Any) -> None:
    """Make ZeRO-1 and ZeRO-2 keep the memory of every gradient until their reduction stream has read it.

    DeepSpeed reduces a gradient larger than `reduce_bucket_size` in place, on a separate stream. If gradients are sent
    in another dtype (`communication_data_type`), it records that stream for the copy only, and the allocator reuses the
    gradient's memory too early.
    """
    if hasattr(optimizer, "_record_gradient_stream") and not get_accelerator().resolves_data_dependency():
        optimizer._record_gradient_stream = lambda gradient, stream: gradient.record_stream(stream)


def stream_into(module: nn.Module, prefix: str, open_stream: Callable[[], LoadPlan]) -> None:
    """Write the values of a plan into the parameters `prefix + name`. Every rank calls it; only rank 0 opens and reads
    the files.

    Each parameter is gathered, written and partitioned again before the next value is read. In addition to its shards,
    each rank holds one parameter, and rank 0 the open files of the stream. An error of rank 0 is raised on all ranks: a
    UserError as it is, any other as a UserError that names it on the other ranks.
    """
    opened: list[LoadPlan] = []

    def order() -> list[str]:
        opened.append(open_stream())
        return opened[0].names

    names: list[str] = from_rank_0(order)
    parameters = dict(module.named_parameters())
    tensors = opened[0].tensors() if opened else None
    error: Exception | None = None
    for name in names:
        # The other ranks take part in the same gathers, so an error is raised only after all of them.
        error = _write(parameters[prefix + name], tensors if error is None else None) or error
    raise_together(error, names_rank=False)


@torch.no_grad()
def _write(parameter: nn.Parameter, tensors: Iterator[Tensor] | None) -> Exception | None:
    """Write the next value, if this rank reads the stream; return the error. The value is read before the parameter is
    gathered, so a slow file does not block the other ranks in the collective."""
    value: Tensor | None = None
    failed: Exception | None = None
    try:
        value = None if tensors is None else next(tensors)
    except StopIteration:
        failed = RuntimeError("a stream of weights has fewer values than names")
    except Exception as error:
        failed = error
    with gathered([parameter], write=True):
        try:
            if value is not None:
                parameter.copy_(value)
        except Exception as error:
            failed = error
    return failed


def loss_scale(engine: Any) -> float | None:
    """Return the loss scale; None unless the engine computes in fp16."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None


def take_step(engine: Any) -> None:
    """Call `engine.step()` and order later weight gathers after it. An fp16 overflow skips the optimizer and halves the
    loss scale."""
    try:
        with clipping_on_device():
            engine.step()
    except Exception as error:  # DeepSpeed raises nothing narrower
        if _AT_MINIMUM not in str(error):
            raise
        raise UserError(
            f"gradients are not finite even at the smallest loss scale, {loss_scale(engine):g}",
            where="fp16.min_loss_scale",
            why="the run diverges, or its activations are too large for fp16",
            fix="start again from an earlier checkpoint with a lower optim.lr, or use a GPU with bf16",
        ) from None
    order_gathers(engine)


@contextlib.contextmanager
def undone_if_skipped(engine: Any, module: nn.Module) -> Iterator[None]:
    """Restore the buffers of `module` if the step taken inside is skipped, so that they keep no statistics of a bad
    batch. The gradient may be non-finite far below the encoder output even if the monitored values are finite."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    if not engine.was_step_applied():
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Return the bit-identical loss with the same gradient; if the loss is not finite, its full gradient becomes NaN.

    A loss may be NaN although its gradients are finite. Each ZeRO stage skips a step with a non-finite global gradient
    norm, so all ranks skip such steps. This needs no device synchronization.
    """
    return loss * (1 + 0 * loss.detach())  # 0 times inf or NaN is NaN
