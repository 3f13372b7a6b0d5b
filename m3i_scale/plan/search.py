"""Resource plan of a run as configured, and a search for better settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, get_args

from m3i_scale.backbones.build import backbone_config
from m3i_scale.checkpoint.stream import expected_bytes
from m3i_scale.config import RunConfig
from m3i_scale.engine.activations import read_policy
from m3i_scale.engine.deepspeed.choice import Device
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig, load_ds_config
from m3i_scale.engine.deepspeed.rules import offloads_optimizer, supports_trust_ratios
from m3i_scale.engine.deepspeed.schema import AUTO
from m3i_scale.errors import ConfigError, error_prefix
from m3i_scale.objective.information import Role
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.plan.memory import SNAPSHOT
from m3i_scale.plan.planning import Choice, Estimate, Machine, Model, estimate, read_vocabulary
from m3i_scale.plan.settings import numel_of, settings_of
from m3i_scale.run.data_checks import check_batch
from m3i_scale.run.setup import choose_engine, resolve_engine
from m3i_scale.text import GIB


@dataclass(frozen=True)
class RunPlan:
    """Estimated resources of a run as configured, with suggestions for better settings."""

    run: RunConfig
    model: Model
    machine: Machine
    planned: Estimate
    samples: int
    stages: tuple[RunPlan, ...] = ()
    """Plan of each stage. The numbers of the run then come from the stage with the highest peak memory."""
    automatic: bool = False
    """Whether `deepspeed: auto` chose the DeepSpeed config of `run`."""

    @property
    def fits(self) -> bool:
        """Return whether the configured run fits in every stage."""
        return all(each.planned.fits(self.machine) for each in self.stages or [self])

    @property
    def seconds(self) -> float:
        """Return the estimated training time in seconds."""
        if self.stages:
            return sum(each.seconds for each in self.stages)
        return self.samples / self.run.optim.batch_size * self.planned.step_s

    @cached_property
    def hopeless(self) -> bool:
        """Return whether even the smallest micro-batch does not fit, in any stage."""
        if self.stages:
            return any(each.hopeless for each in self.stages)
        return not self.fits and not _fits_smaller(self.model, self.machine, self.planned.choice)

    @cached_property
    def compared(self) -> list[Estimate]:
        """Return the fastest fitting choice of every DeepSpeed config."""
        return compare(self.model, self.machine, self.planned.choice)

    @cached_property
    def suggestion(self) -> Estimate | None:
        """Return the best choice, or None if nothing fits. With stages, it is for the stage with the highest peak
        memory, and None if another stage would not fit with its micro-batch. With `deepspeed: auto` it is the planned
        one, unless the best one is faster."""
        best = choose(self.compared)
        if self.automatic and self.fits and best is not None and self.planned.step_s <= EQUAL * best.step_s:
            return self.planned
        others = [each for each in self.stages if each.planned is not self.planned]
        if best is not None and not all(each.fits_as(best.choice) for each in others):
            return None
        return best

    def fits_as(self, choice: Choice) -> bool:
        """Return whether another choice fits with the run's micro-batch."""
        choice = replace(choice, micro_batch=self.planned.choice.micro_batch)
        return estimate(self.model, self.machine, choice).fits(self.machine)

    @property
    def warnings(self) -> list[str]:
        """Return warnings about a probable mistake in the planned settings."""
        file = self.planned.choice.deepspeed
        if self.machine.on_host or file not in _ON_DEVICES:
            return []
        name = self.machine.name
        return [
            f"deepspeed={file} is meant for CPUs, and memory and time are planned for {name} GPUs. Fix: --hardware cpu "
            f"for a run on CPUs, deepspeed={_ON_DEVICES[file]} for a run on GPUs."
        ]

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `m3i-scale plan`."""
        planned, batch = self.planned, self.run.optim.batch_size
        world = self.machine.links.world
        seconds = self.seconds
        return {
            "name": self.run.name,
            "ranks": world,
            "hardware": self.machine.name,
            "on_host": self.machine.on_host,
            "planned": self.summary(planned),
            "peak_gib_per_rank": planned.peak_bytes / GIB,
            "memory_gib": self.machine.memory_gib,
            "fits": self.fits,
            "parts": {name: size / GIB for name, size in sorted(planned.parts.items(), key=lambda item: -item[1])},
            "activations_gib": planned.activation_bytes / GIB,
            "host_gib_per_rank": planned.host_bytes / GIB,
            "host_parts": {name: size / GIB for name, size in planned.host_parts.items()},
            "host_gib_per_node": planned.host_of_node(self.machine) / GIB,
            "host_memory_gib": self.machine.host_memory_gib,
            "parameters": {role: numel_of(self.model.parameters, role) for role in get_args(Role)},
            "flop_per_sample": planned.flop * world / batch,
            "comm_gib_per_step": sum(planned.traffic.rank_bytes.values()) / GIB,
            "comm_gib_per_step_by_kind": {kind: size / GIB for kind, size in planned.traffic.rank_bytes.items()},
            "comm_gib_per_step_by_link": {
                "intra": planned.traffic.intra_bytes / GIB,
                "inter": planned.traffic.inter_bytes / GIB,
            },
            "mfu": self.machine.mfu,
            "tflops_per_rank": self.machine.tflops[planned.settings.precision],
            "compute_s": planned.compute_s,
            "host_s": planned.host_s,
            "communication_s": planned.traffic.time_s,
            "step_time_s": planned.step_s,
            "samples_per_day": batch / planned.step_s * 86400,
            "samples": self.samples,
            "days": seconds / 86400,
            "gpu_hours": seconds / 3600 * world,
            "checkpoint_gib": expected_bytes(self.model.objective, planned.resolved.config) / GIB,
            "stages": [each._described_stage() for each in self.stages],
            "assumed": list(self.model.vocabulary.assumed),
            "warnings": self.warnings,
            "compared": [self.summary(each) for each in self.compared],
            "suggestion": None if self.suggestion is None else self.summary(self.suggestion),
        }

    def summary(self, estimated: Estimate) -> dict[str, Any]:
        """Describe a choice by config keys."""
        choice = estimated.choice
        return {
            "overrides": [
                f"deepspeed={choice.deepspeed}",
                f"backbone.activation_checkpointing={choice.policy}",
                f"{self._micro_batch_key}={choice.micro_batch}",
            ],
            "deepspeed": choice.deepspeed,
            "stage": estimated.settings.stage,
            "precision": estimated.settings.precision,
            "micro_batch_size": choice.micro_batch,
            "accumulation": estimated.settings.accumulation_steps,
            "activation_checkpointing": choice.policy,
            "peak_gib_per_rank": estimated.peak_bytes / GIB,
            "step_time_s": estimated.step_s,
            "host_s": estimated.host_s,
        }

    @property
    def _micro_batch_key(self) -> str:
        numbers = [number for number, each in enumerate(self.stages) if each.planned is self.planned]
        return f"stages.{numbers[0]}.micro_batch_size" if numbers else "optim.micro_batch_size"

    def _described_stage(self) -> dict[str, Any]:
        (stage,), planned, batch = self.run.stages, self.planned, self.run.optim.batch_size
        return {
            "steps": stage.steps,
            "image_size": self.model.image_size,
            "micro_batch_size": planned.choice.micro_batch,
            "accumulation": planned.settings.accumulation_steps,
            "peak_gib_per_rank": planned.peak_bytes / GIB,
            "fits": self.fits,
            "flop_per_sample": planned.flop * self.machine.links.world / batch,
            "step_time_s": planned.step_s,
            "days": self.seconds / 86400,
        }


def plan_run(
    run: RunConfig,
    machine: Machine,
    *,
    classes: int | None = None,
    tokens: int | None = None,
    samples: int | None,
) -> RunPlan:
    """Estimate the resources of a run, whose shards need not exist. `classes` and `tokens` are used instead of reading
    the shards. `samples` is the number of training samples; None: the run's steps × batch size."""
    total = samples if samples is not None else run.optim.steps * run.optim.batch_size
    if not run.stages:
        return _plan(run, machine, classes, tokens, total)
    plans = []
    for number, stage in enumerate(run.stages):
        with error_prefix(f"stages.{number}"):
            share = round(total * stage.steps / run.optim.steps)
            plans.append(_plan(run.in_stage(number), machine, classes, tokens, share))
    largest = max(plans, key=lambda plan: plan.planned.peak_bytes)
    return replace(largest, samples=total, stages=tuple(plans))


def _plan(run: RunConfig, machine: Machine, classes: int | None, tokens: int | None, samples: int) -> RunPlan:
    recipe = parse_recipe(run.recipe)
    world = machine.links.world
    check_batch(run, recipe, world)
    config = backbone_config(run.backbone)
    _check_policy(run.backbone.activation_checkpointing)
    vocabulary, automatic = read_vocabulary(run, recipe, classes, tokens), run.deepspeed == AUTO
    if automatic:
        device = Device("cpu" if machine.on_host else "bf16", int(machine.memory_gib * GIB))
        run, _ = choose_engine(run, Model(run, vocabulary, world, "bf16").objective, world, device)
    resolved = resolve_engine(run, world, config.hidden_size)
    _check_counted(resolved)
    precision = settings_of(resolved.config, world=world, on_host=machine.on_host).precision
    model = Model(run, vocabulary, world, precision)
    choice = Choice(run.deepspeed, run.backbone.activation_checkpointing, run.optim.micro_batch_size)
    planned = estimate(model, machine, choice)
    return RunPlan(run, model, machine, planned, samples, automatic=automatic)


POLICIES = ("none", "every_2", "full")
"""Activation checkpointing policies to try, in addition to the run's."""
ENGINE_FILES = {
    ("bf16", False): ("zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_bf16_all_reduce", "zero3_bf16_cpu_offload"),
    ("bf16", True): ("zero3_cpu",),
    ("fp32", True): ("zero1_cpu_fp32", "zero3_cpu_fp32"),
    ("fp16", False): ("zero3_fp16",),
}
"""Built-in DeepSpeed configs by precision and whether the CPU computes."""
_ON_DEVICES = {
    "zero1_cpu_fp32": "zero1_bf16",
    "zero3_cpu": "zero3_bf16",
    "zero3_cpu_fp32": "zero3_bf16",
    "zero3_cpu_lean": "zero3_bf16_lean",
}
"""Built-in DeepSpeed configs for CPUs, with their counterparts for accelerators."""


def compare(model: Model, machine: Machine, choice: Choice) -> list[Estimate]:
    """Find the fastest fitting choice of every DeepSpeed config. Configs that do not fit are omitted. Offloading
    configs are only used if no other fits, because the estimate excludes their copies and CPU arithmetic. On
    accelerators, a config for CPUs is replaced by its counterpart."""
    if not machine.on_host and choice.deepspeed in _ON_DEVICES:
        choice = replace(choice, deepspeed=_ON_DEVICES[choice.deepspeed])
        model = Model(model.run, model.vocabulary, model.world, "bf16")
    files = list(dict.fromkeys([choice.deepspeed, *ENGINE_FILES.get((model.precision, machine.on_host), ())]))
    if model.run.optim.trust_coefficient is not None:
        files = [file for file in files if supports_trust_ratios(load_ds_config(file))]
    offloading = [file for file in files if offloads_optimizer(load_ds_config(file))]
    for some in ([file for file in files if file not in offloading], offloading):
        compared = [fastest for file in some if (fastest := _fastest(model, machine, choice, file)) is not None]
        if compared:
            return compared
    return []


EQUAL = 1.01
"""Steps within this factor of the fastest one count as equal: the estimate is less accurate."""


def choose(compared: list[Estimate]) -> Estimate | None:
    """Return the fastest choice. Among equally fast ones, prefer the lowest CPU overhead."""
    limit = EQUAL * min((each.step_s for each in compared), default=0.0)
    return min((each for each in compared if each.step_s <= limit), key=lambda each: each.host_s, default=None)


def _fastest(model: Model, machine: Machine, choice: Choice, file: str) -> Estimate | None:
    """Return the fastest fitting choice of a DeepSpeed config; of equally fast ones, the largest micro-batch. Large
    ones are extrapolated first, and exact in the end."""
    settings = product(dict.fromkeys([choice.policy, *POLICIES]), _sizes(model, machine))
    tried = (estimate(model, machine, Choice(file, policy, size), quick=True) for policy, size in settings)
    fitting = [each for each in tried if each.fits(machine)]
    least_s = min((each.step_s for each in fitting), default=0.0)
    fitting.sort(key=lambda each: (round(each.step_s / least_s, 3), -each.choice.micro_batch))
    for each in fitting:
        exact = estimate(model, machine, each.choice)
        if exact.fits(machine):
            return exact
    return None


def _sizes(model: Model, machine: Machine) -> Iterator[int]:
    """Yield micro-batch sizes that divide the global batch and suit the recipe, up to 512 or the configured size."""
    per_rank, rest = divmod(model.run.optim.batch_size, machine.links.world)
    if rest:
        return
    most = min(per_rank, max(512, model.run.optim.micro_batch_size))
    yield from (size for size in range(model.smallest, most + 1) if per_rank % size == 0)


def _fits_smaller(model: Model, machine: Machine, choice: Choice) -> bool:
    smallest = next(iter(_sizes(model, machine)), None)
    if smallest is None:
        return False
    return estimate(model, machine, replace(choice, micro_batch=smallest)).fits(machine)


def nodes_that_fit(model: Model, machine: Machine, choice: Choice, *, most: int = 1024) -> tuple[int, int, int] | None:
    """Find a number of nodes that the run fits on, with the batch size and smallest micro-batch for it, or None."""
    nodes = machine.links.nodes
    while (nodes := nodes * 2) * machine.links.ranks_per_node <= most:
        wider = replace(machine, links=replace(machine.links, nodes=nodes))
        batch = math.lcm(model.run.optim.batch_size, wider.links.world * model.smallest)
        run = model.run.model_copy(update={"optim": model.run.optim.model_copy(update={"batch_size": batch})})
        other = Model(run, model.vocabulary, wider.links.world, model.precision)
        if _fits_smaller(other, wider, choice):
            return nodes, batch, other.smallest
    return None


def check_feasible(plan: RunPlan) -> None:
    """Raise an error if the run does not fit even with the smallest micro-batch."""
    if not plan.hopeless:
        return
    for number, stage in enumerate(plan.stages):
        with error_prefix(f"stages.{number}"):
            check_feasible(stage)
    fix = None
    if plan.planned.peak_bytes <= plan.machine.memory_gib * GIB:
        raise _no_host_memory(plan)
    if plan.suggestion is not None:
        fix = "set " + " ".join(plan.summary(plan.suggestion)["overrides"])
    elif wider := nodes_that_fit(plan.model, plan.machine, plan.planned.choice):
        nodes, batch, micro_batch = wider
        sizes = f"optim.batch_size={batch} optim.micro_batch_size={micro_batch}"
        fix = f"use {nodes} nodes instead of {plan.machine.links.nodes}, with {sizes}"
    raise ConfigError(
        f"the run does not fit: it needs {plan.planned.peak_bytes / GIB:.4g} GiB per rank of "
        f"{plan.machine.memory_gib:g} GiB, and does not fit with a micro-batch of {plan.model.smallest} either",
        where=f"deepspeed={plan.planned.choice.deepspeed}, activation_checkpointing={plan.planned.choice.policy}",
        fix=fix or "use a smaller backbone, or devices with more memory",
    )


def _no_host_memory(plan: RunPlan) -> ConfigError:
    taken, ranks = plan.planned.host_of_node(plan.machine), plan.machine.links.ranks_per_node
    limit = float(plan.machine.host_memory_gib or 0)
    parts = plan.planned.parts if plan.machine.on_host else plan.planned.host_parts
    snapshot = parts.get(SNAPSHOT, 0) * ranks
    fix = "use fewer ranks per node, or a DeepSpeed config that offloads less"
    if snapshot and taken - snapshot <= limit * GIB:
        fix = "set checkpoint.background=false, so that training waits for every save; or use more nodes"
    return ConfigError(
        f"the run does not fit into host memory: it needs {taken / GIB:.4g} GiB per node of {limit:g} GiB",
        where=f"--host-memory-gib {limit:g}, {ranks} ranks per node",
        why=f"{snapshot / GIB:.4g} GiB of it are staging buffers of background saves",
        fix=fix,
    )


_COUNTED = {
    "contiguous_gradients": True,
    "stage3_module_granularity_threshold": 0,
}
"""DeepSpeed settings that affect memory or traffic, with the values that the plan supports."""


def _check_counted(resolved: ResolvedConfig) -> None:
    zero = resolved.config["zero_optimization"]
    uncounted = [key for key, counted in _COUNTED.items() if zero.get(key, counted) != counted]
    if (zero.get("offload_optimizer") or {}).get("ratio", 1.0) != 1.0:
        uncounted.append("offload_optimizer.ratio")
    if zero["stage"] < 3 and not zero.get("reduce_scatter", True):
        uncounted.append("reduce_scatter")
    if uncounted:
        raise ConfigError(
            f"`plan` does not support 'zero_optimization.{uncounted[0]}'",
            where=resolved.where,
            why="it changes DeepSpeed's memory or communication, and the estimate does not include it",
            fix="run `plan` with a DeepSpeed config without it",
        )


def _check_policy(text: str) -> None:
    if read_policy(text).kind in ("selective", "offload"):
        raise ConfigError(
            f"`plan` does not support the activation checkpointing policy '{text}'",
            where="backbone.activation_checkpointing",
            why="the memory of a layer is decided at run time",
            fix="run `plan` with full, which saves least, and with none, which saves most",
        )
