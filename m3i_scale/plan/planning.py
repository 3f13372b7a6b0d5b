"""Memory and throughput estimates of `m3i-scale plan`, without data, weights or a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from m3i_scale.checkpoint.stream import buffers_of
from m3i_scale.config import RunConfig
from m3i_scale.config.data import Reads
from m3i_scale.config.views import view_sizes
from m3i_scale.data.batch import Batch, synthetic_batch
from m3i_scale.data.parts import PREFETCH_PARTS
from m3i_scale.data.shards import read_label_sets, shard_folder
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.defaults import NO_CLASS
from m3i_scale.engine.activations import apply_activation_checkpointing
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig
from m3i_scale.engine.device import keeps_host_memory
from m3i_scale.engine.engine import set_leaves
from m3i_scale.engine.parameter_groups import is_decayed
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_on_meta, ema_pairs, scales_of
from m3i_scale.objective.information import Objective, role_of
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.step_features import StepFeatures
from m3i_scale.plan.memory import HOLES, Parts, memory_of
from m3i_scale.plan.settings import Parameter, Settings, settings_of
from m3i_scale.plan.timing import Links, StepTraffic, hardware, host_time, step_time, step_traffic
from m3i_scale.plan.trace import Trace, record, scaled
from m3i_scale.plan.traffic import Traffic, collectives_of
from m3i_scale.run.setup import resolve_engine
from m3i_scale.text import GIB

_ASSUMED_CLASSES: dict[Reads, int] = {"labels": 1000, "masks": 150, "boxes": 80, "boxes_and_masks": 80}
VOCABULARY = 30522
"""Vocabulary of a plan without shards: the classes of ImageNet, ADE20k and COCO, and BERT's tokens."""
ACCELERATOR_WORKSPACE_GIB = 1.0
"""Non-tensor memory: CUDA context, library workspaces, NCCL channels. An assumption, not measured."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Devices, nodes and network links of a plan."""

    name: str
    links: Links
    memory_gib: float
    """Memory of one rank's device in GiB."""
    tflops: dict[str, float]
    """Peak TFLOP/s of one rank's device, by precision."""
    mfu: float
    on_host: bool
    """Whether ranks compute on CPUs."""
    workspace_gib: float
    """Non-tensor memory per rank in GiB."""
    host_memory_gib: float | None = None
    """CPU memory per node in GiB; None: unknown and not checked."""


@dataclass(frozen=True)
class Vocabulary:
    """Data properties that determine the model: classes and vocabulary size."""

    label_sets: dict[str, list[str]]
    tokens: int
    assumed: tuple[str, ...]
    """Descriptions of values that were assumed instead of read."""


class _PlannedRanks:
    """Ranks on `meta`, without communication: a gather has the rows of all ranks, a sum the shape of its input."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def gather(self, x_B: Tensor) -> Tensor:
        return x_B if self.world_size == 1 else x_B.repeat(self.world_size, *[1] * (x_B.dim() - 1))

    def sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def max(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        return x * 1


def non_tensor_gib(*, hosts: bool) -> float:
    """Return the non-tensor memory per rank in GiB. On CPUs, measure this process, which has the same imports."""
    if not hosts:
        return ACCELERATOR_WORKSPACE_GIB
    return float(psutil.Process().memory_info().rss) / GIB


def machine_of(
    name: str,
    *,
    nodes: int,
    ranks_per_node: int,
    memory_gib: float,
    tflops: float | None = None,
    workspace_gib: float | None = None,
    host_memory_gib: float | None = None,
    **numbers: float | None,
) -> Machine:
    """Return a machine from a hardware preset. `tflops` and `numbers`, fields of `Hardware`, override the preset."""
    given: dict[str, Any] = {field: number for field, number in numbers.items() if number is not None}
    preset, hosts = replace(hardware(name), **given), name == "cpu"
    latencies_us = preset.latency_us, preset.intra_latency_us
    links = Links(nodes, ranks_per_node, preset.intra_gb_s, preset.inter_gb_s, *latencies_us, gloo=hosts)
    rates = preset.tflops if tflops is None else dict.fromkeys(preset.tflops, tflops)
    workspace = non_tensor_gib(hosts=hosts) if workspace_gib is None else workspace_gib
    return Machine(name, links, memory_gib, rates, preset.mfu, hosts, workspace, host_memory_gib)


def read_vocabulary(run: RunConfig, recipe: Recipe, classes: int | None, tokens: int | None) -> Vocabulary:
    """Return label spaces and vocabulary size from the arguments, else from local shards, else from assumptions."""
    assumed = []
    folders = [shard_folder(source.path) for source in run.data.datasets.values()]
    # Plans contact no server and pack no images: both kinds of data count as missing, and assumptions are reported.
    there = bool(folders) and all(isinstance(folder, Path) and any(folder.glob("*.tar")) for folder in folders)
    label_sets: dict[str, list[str]] = {}
    if recipe.labels_file is not None:
        if classes is None and there:
            label_sets = read_label_sets(run.data.datasets, file=recipe.labels_file)
        else:
            assumed_classes = _ASSUMED_CLASSES[recipe.reads]
            label_sets = {"classes": [str(number) for number in range(classes or assumed_classes)]}
            assumed += [f"{assumed_classes} classes"] if classes is None else []
    if recipe.reads_masks and classes is not None and classes > NO_CLASS:
        raise ConfigError(
            f"--classes must be at most {NO_CLASS}, got {classes}",
            where=f"--classes {classes}",
            why="a pixel of a mask has one byte",
            fix=f"use --classes {NO_CLASS} or less",
        )
    if tokens is None and recipe.uses_text and (there or run.text.tokenizer_source):
        tokens = len(find_tokenizer(run.data.datasets, run.text.tokenizer_source))
    elif tokens is None and recipe.uses_text:
        assumed.append(f"a vocabulary of {VOCABULARY} tokens")
    return Vocabulary(label_sets, tokens or VOCABULARY, tuple(assumed))


@dataclass
class Model:
    """Objective of a run on `meta`, with recorded micro-batches."""

    run: RunConfig
    vocabulary: Vocabulary
    world: int
    precision: str
    _traces: dict[tuple[str, int], Trace] = field(default_factory=dict)
    _scaled: dict[tuple[str, int], Trace] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """Return the run's recipe."""
        return parse_recipe(self.run.recipe)

    @cached_property
    def objective(self) -> Objective:
        """Return the objective on `meta` in the computing precision."""
        tokens = self.vocabulary.tokens if self.recipe.uses_text else None
        ranks = _PlannedRanks(self.world)
        objective = build_on_meta(self.run, self.vocabulary.label_sets, tokens, ranks)
        set_leaves(objective)
        return objective.to(_DTYPES[self.precision]).train()

    @property
    def image_size(self) -> int:
        """Return the image size of the first stage in pixels."""
        return self.run.image_size(self.objective.student.image_size)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Return the parameters of the complete model."""
        parameters, scales = [], scales_of(self.objective, self.run)
        named = dict(self.objective.named_parameters())
        places = {name: place for place, name in enumerate(named) if named[name].requires_grad}
        follows = {target: places.get(online) for online, target in ema_pairs(self.objective)}
        for name, parameter in named.items():
            role = role_of(name, parameter)
            scale = scales.get(name, 1.0)
            decayed = is_decayed(parameter.shape, tokens=self.run.optim.decay_tokens)
            parameters.append(Parameter(parameter.numel(), role, decayed, scale, follows.get(name)))
        return tuple(parameters)

    @property
    def remembered_bytes(self) -> int:
        """Return the bytes of persistent buffers, which are also saved in checkpoints."""
        return sum(buffer.nbytes for buffer in buffers_of(self.objective).values())

    def trace(self, policy: str, micro_batch: int) -> Trace:
        """Return the recorded trace of one micro-batch."""
        if (policy, micro_batch) not in self._traces:
            self._traces[policy, micro_batch] = self._record(policy, micro_batch)
        return self._traces[policy, micro_batch]

    def quick_trace(self, policy: str, micro_batch: int) -> Trace:
        """Extrapolate the trace from two small micro-batches: tensor sizes are affine in the number of samples."""
        small, key = self.smallest, (policy, micro_batch)
        joint = self.run.optim.contrastive_batch == "global"  # then a loss has all samples of a rank
        if joint or micro_batch <= 2 * small or key in self._traces:
            return self.trace(policy, micro_batch)
        if key not in self._scaled:
            trace = scaled(self.trace(policy, small), self.trace(policy, 2 * small), small, micro_batch)
            self._scaled[key] = trace or self.trace(policy, micro_batch)
        return self._scaled[key]

    @property
    def smallest(self) -> int:
        """Return the smallest micro-batch that the recipe allows."""
        if self.recipe.mix is not None:
            return len(self.recipe.mix.inputs)
        return 2 if self.recipe.compares_samples and self.world == 1 else 1

    def _record(self, policy: str, micro_batch: int) -> Trace:
        objective, recipe, run = self.objective, self.recipe, self.run
        apply_activation_checkpointing(objective, policy)
        classes = len(next(iter(self.vocabulary.label_sets.values()), [""]))
        with torch.device("meta"):
            batch = synthetic_batch(
                micro_batch,
                recipe.drawn_views,
                image=self.image_size,
                tokens=run.text.max_tokens,
                classes=classes,
                vocabulary=self.vocabulary.tokens,
                reads=recipe.reads,
            )
            inputs = [value for value in vars(batch).values() if isinstance(value, Tensor)]
            steps = run.optim.batch_size // (micro_batch * self.world)
            if run.optim.contrastive_batch == "micro" or steps < 2:
                return record(objective, lambda: objective(batch)[0], inputs)
            cached = [0]
            trace = record(objective, lambda: _in_step(objective, batch, steps, cached), inputs)
            return replace(trace, cached=cached[0] * (steps - 1))


def _in_step(objective: Objective, batch: Batch, steps: int, cached: list[int]) -> Tensor:
    """Return the loss of a micro-batch over all `steps` micro-batches, which is encoded ahead like all others but the
    first. Set `cached` to the bytes of its cached features."""
    step = StepFeatures(steps)
    with torch.no_grad():
        objective(batch, step)
    step.features = [step.present] * steps
    leaves = tree_leaves([vars(features) for features in step.features[:1]])
    cached[0] = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    loss: Tensor = objective(batch, step)[0]
    return loss


@dataclass(frozen=True)
class Choice:
    """Settings that can change without affecting learning (in stages 1 to 3, up to rounding)."""

    deepspeed: str
    policy: str
    micro_batch: int


@dataclass(frozen=True)
class Estimate:
    """Estimated resources of one choice."""

    choice: Choice
    resolved: ResolvedConfig
    settings: Settings
    peak_bytes: int
    """Peak bytes on one rank's device, including the workspace."""
    parts: dict[str, int]
    """Bytes by part at the peak."""
    activation_bytes: int
    """Maximum bytes of activations, not necessarily at the peak."""
    host_parts: dict[str, int]
    """CPU memory in addition to the device, in bytes per rank; empty if the CPU is the device."""
    flop: int
    """FLOPs per step and rank."""
    collectives: Traffic
    """Collectives of a step, over all its micro-batches."""
    operations: int
    """Operations per micro-batch that create a tensor."""
    parameter_count: int
    """Number of parameter tensors of the complete model."""
    links: Links
    compute_s: float

    @cached_property
    def traffic(self) -> StepTraffic:
        """Return bytes and time of the collectives over the links."""
        return step_traffic(self.collectives, self.links, group=self.settings.hpz)

    @cached_property
    def host_s(self) -> float:
        """Return the CPU time to queue a step, in seconds."""
        return host_time(
            stage=self.settings.stage,
            operations=self.operations * self.settings.accumulation_steps,
            parameters=self.parameter_count,
            pieces=self.collectives.pieces,
        )

    @cached_property
    def step_s(self) -> float:
        """Return the time of a step in seconds."""
        return step_time(
            self.traffic,
            compute_s=self.compute_s,
            host_s=self.host_s,
            overlap=self.settings.overlap,
            micro_batches=self.settings.accumulation_steps,
        )

    @property
    def host_bytes(self) -> int:
        """Return the CPU memory per rank in addition to its device, in bytes."""
        return sum(self.host_parts.values())

    def host_of_node(self, machine: Machine) -> int:
        """Return the CPU memory of all ranks of a node in bytes."""
        return (self.peak_bytes if machine.on_host else self.host_bytes) * machine.links.ranks_per_node

    def fits(self, machine: Machine) -> bool:
        """Return whether the choice fits on its device and, if the memory of a node is known, on its node."""
        on_device = self.peak_bytes <= machine.memory_gib * GIB
        limit = machine.host_memory_gib
        return on_device and (limit is None or self.host_of_node(machine) <= limit * GIB)


def estimate(model: Model, machine: Machine, choice: Choice, *, quick: bool = False) -> Estimate:
    """Estimate memory, traffic and time of a step."""
    run = _with(model.run, choice)
    resolved = resolve_engine(run, machine.links.world, model.objective.student.width)
    settings = settings_of(resolved.config, world=machine.links.world, on_host=machine.on_host)
    settings = replace(settings, snapshot=model.remembered_bytes if run.checkpoint.background else None)
    trace = (model.quick_trace if quick else model.trace)(choice.policy, choice.micro_batch)
    memory = memory_of(model.parameters, trace, settings)
    parts = memory.peak
    live = parts.total()
    parts["workspace"] = round(machine.workspace_gib * GIB) + sum(b.nbytes for b in model.objective.buffers())
    if machine.on_host and keeps_host_memory():
        parts["fragmentation"] = round(HOLES * live)
    flop = trace.flop * settings.accumulation_steps
    return Estimate(
        choice=choice,
        resolved=resolved,
        settings=settings,
        peak_bytes=parts.total(),
        parts=dict(parts),
        activation_bytes=memory.activation_bytes,
        host_parts={} if machine.on_host else host_parts(model, choice, memory.host),
        flop=flop,
        collectives=collectives_of(model.parameters, trace, settings),
        operations=trace.operations,
        parameter_count=len(model.parameters),
        links=machine.links,
        compute_s=flop / (machine.tflops[settings.precision] * 1e12 * machine.mfu),
    )


def host_parts(model: Model, choice: Choice, host: Parts) -> dict[str, int]:
    """Return the CPU memory by part of a rank with a device: offloads, staging buffers, prefetched batches, process."""
    parts = dict(host)
    sample_bytes = 3 * sum(side**2 for side in view_sizes(model.recipe.drawn_views, model.image_size))
    if model.run.data.num_workers:
        parts["batches of workers"] = PREFETCH_PARTS * choice.micro_batch * sample_bytes
    if model.run.optim.contrastive_batch == "global":
        parts["batches of a step"] = model.run.optim.batch_size // model.world * sample_bytes
    parts["process"] = round(non_tensor_gib(hosts=True) * GIB)
    return parts


def _with(run: RunConfig, choice: Choice) -> RunConfig:
    backbone = run.backbone.model_copy(update={"activation_checkpointing": choice.policy})
    optim = run.optim.model_copy(update={"micro_batch_size": choice.micro_batch})
    return run.model_copy(update={"backbone": backbone, "optim": optim, "deepspeed": choice.deepspeed})
