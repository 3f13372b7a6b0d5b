"""Build the DeepSpeed engine: construct the module partitioned, initialise it, hand it over."""

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
from torch import nn

from m3i_scale.scale.activations import stacks
from m3i_scale.scale.deepspeed.rules import optimizer_class
from m3i_scale.scale.engine_state import count_micro_batches
from m3i_scale.scale.extensions import awaited_build
from m3i_scale.scale.parameter_groups import parameter_groups
from m3i_scale.scale.partition import construct, full_shape, gradients_by_parameter


def quiet_deepspeed() -> None:
    """Have DeepSpeed log warnings and errors only; the toolkit prints its own account of the configuration."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch versions rename; nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def set_leaves(module: nn.Module) -> None:
    """Have ZeRO-3 gather and release the parameters of a layer together, and not module by module. Call it before the
    engine is started.

    A layer of a ViT has eight modules with parameters; hooks, fetches and releases of each, forwards and backwards, are
    most of what a step takes of the host (docs/gpu.md). A layer whose parts are called one by one stays as it is: a
    leaf's parts have no hooks.
    """
    for layers in stacks(module):
        for _, layer in layers:
            set_z3_leaf_module(layer, True)


def awaited_optimizer(ds_config: dict[str, Any]) -> str | None:
    """Say what starting the engine will wait for, where the extension of its optimizer has to be built.

    Args:
        ds_config: resolved DeepSpeed configuration.

    Returns:
        None where it is built, or where the optimizer is torch's.
    """
    kind = optimizer_class(ds_config)
    if kind == "AdamW":
        return None
    builder = get_accelerator().create_op_builder("FusedAdamBuilder" if kind == "FusedAdam" else "CPUAdamBuilder")
    return None if builder is None else awaited_build(builder.name)


def set_micro_batch_size(engine: Any, micro_batch_size: int) -> None:
    """Have a step of the engine accumulate micro-batches of that size from here on; call it between two steps. The
    batch stays, and nothing of weights and optimizer is touched."""
    batch_size = engine.train_batch_size()
    engine.set_train_micro_batch_size(micro_batch_size)
    engine.set_train_batch_size(batch_size)
    count_micro_batches(engine)


@contextlib.contextmanager
def free_memory_of_torch() -> Iterator[None]:
    """Let DeepSpeed ask torch for the free memory of a GPU when it starts an engine.

    With pynvml installed it would ask the driver, and fail on the names of GPUs and MIG slices that
    `CUDA_VISIBLE_DEVICES` may hold in place of numbers (`_get_nvml_gpu_id` of its CUDA accelerator).
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        yield
        return
    with mock.patch.object(accelerator, "available_memory", lambda device=None: torch.cuda.mem_get_info(device)[0]):
        yield


def build_engine(
    build: Callable[[], nn.Module],
    initialize: Callable[[nn.Module], None],
    ds_config: dict[str, Any],
    *,
    weight_decay: float,
    lr_scales: Callable[[nn.Module], Mapping[str, float]] = lambda module: {},
) -> Any:
    """Construct the module (partitioned under ZeRO-3), give it its first weights and start the engine.

    Args:
        build: makes the module; called once, on every rank.
        initialize: fills the weights of the built module, before the optimizer copies them.
        ds_config: resolved DeepSpeed configuration.
        weight_decay: of matrices.
        lr_scales: gives what the learning rate of a parameter is multiplied by, by name; 1 where nothing is said.
    """
    quiet_deepspeed()
    module = construct(build, ds_config)
    initialize(module)
    set_leaves(module)
    groups = parameter_groups(module, weight_decay, lr_scales(module), full_shape)
    # By itself the BF16 optimizer prints its memory twice for every parameter group, 100 lines with a layer decay.
    quiet = mock.patch.object(bf16_optimizer, "see_memory_usage")
    with gradients_by_parameter(), free_memory_of_torch(), quiet:
        engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=groups, config=ds_config)
    keep_gradients_until_reduced(engine.optimizer)
    return engine


def keep_gradients_until_reduced(optimizer: Any) -> None:
    """Let ZeRO-1 and ZeRO-2 keep the memory of every gradient until their reduction stream is done with it.

    DeepSpeed reduces a gradient that is larger than `reduce_bucket_size` in place, on a stream of its own. If gradients
    travel in another type than their own (`communication_data_type`), it records that stream for the copy alone, and
    the allocator hands the memory of the gradient to the rest of the backward pass too early.
    """
    if hasattr(optimizer, "_record_gradient_stream") and not get_accelerator().resolves_data_dependency():
        optimizer._record_gradient_stream = lambda gradient, stream: gradient.record_stream(stream)
