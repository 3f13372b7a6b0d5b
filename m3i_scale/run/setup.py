"""Setup of a run: batch size and engine config, data streams, an engine with initialized weights, and a report on the
pretrained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.table import Table
from rich.text import Text

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.load_plan import LoadPlan
from m3i_scale.checkpoint.commit import explain
from m3i_scale.checkpoint.layout import checkpoints
from m3i_scale.config import RunConfig, read_yaml
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.parts import PartWorkers
from m3i_scale.data.tokenizer import tokenizer_identity
from m3i_scale.engine.activations import apply_activation_checkpointing, policy_of_switches
from m3i_scale.engine.agree import from_rank_0, open_together
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.compilation import compile_layers
from m3i_scale.engine.deepspeed.choice import Device, choose_ds_config, device_here
from m3i_scale.engine.deepspeed.effective import check_effective
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig, load_ds_config, resolve
from m3i_scale.engine.deepspeed.rules import supports_trust_ratios
from m3i_scale.engine.deepspeed.schema import AUTO
from m3i_scale.engine.device import allow_tf32, compute_dtype, pinning
from m3i_scale.engine.engine import build_engine, stream_into
from m3i_scale.engine.partition import initialize_sharded, keep_in_checkpoints, order_gathers
from m3i_scale.errors import ConfigError, ErrorCollector
from m3i_scale.files import sha256_of_json, write_json
from m3i_scale.objective.build import build_objective, ema_pairs, initialize_module, scales_of
from m3i_scale.objective.information import EMA_PREFIX, TEACHERS_PREFIX, Objective
from m3i_scale.objective.pretrained import pretrained_plans
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.objective.recipe import without_folders
from m3i_scale.objective.teacher import teachers_sha256
from m3i_scale.objective.text_config import text_identity
from m3i_scale.output import wide_console
from m3i_scale.run.data_checks import RunWithData, open_stream

START = "start.json"


@dataclass
class ResolvedRun(RunWithData):
    """Validated run: recipe, data and DeepSpeed config."""

    deepspeed: ResolvedConfig
    accumulation: int
    choice: str | None = None
    """With `deepspeed: auto`, which config was chosen, and why."""
    image_counts: list[int] | None = None
    """Number of training images per category, if categories.json has it (LVIS)."""
    scored: Sequence[str] = ()
    """Names of the targets whose scores evaluations compute; see `Target.check_scores`."""
    trainable_parameters: int = 0

    def in_stage(self, number: int) -> ResolvedRun:
        """Return the run with the image size, micro-batch size and accumulation of a stage. Without stages, return the
        run itself. See `RunConfig.in_stage`."""
        if not self.run.stages:
            return self
        run = self.run.in_stage(number)
        samples_of_rank = self.run.optim.micro_batch_size * self.accumulation
        return replace(
            self,
            run=run,
            image_size=run.image_size(backbone_config(run.backbone).image_size),
            accumulation=samples_of_rank // run.optim.micro_batch_size,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the properties that a run must share with a checkpoint to resume from it: model shape and objective.
        The first access reads all teacher files completely, so only use it on one rank."""
        run, tokenizer = self.run, self.tokenizer
        model = backbone_config(run.backbone).to_diff_dict()
        for key in ("transformers_version", "_name_or_path"):  # irrelevant for the weights
            model.pop(key, None)
        identity: dict[str, Any] = {
            "recipe": without_folders(run.recipe),
            "backbone": model,
            "optim": run.optim.model_dump(include={"batch_size", "weight_decay", "betas", "eps"}, mode="json"),
            "attention": run.backbone.attention,
            "freeze": sorted(run.backbone.freeze) or None,
            "text_freeze": (run.text.freeze and self.recipe.uses_text_tower) or None,
            "decay_tokens": run.optim.decay_tokens or None,
            "trust_coefficient": run.optim.trust_coefficient,
            "text": text_identity(run.text) if self.recipe.uses_text_tower else None,
            "label_sets": self.label_sets if self.recipe.labels_file is not None else None,
            "vocab_size": self.vocab_size,
            "teachers_sha256": teachers_sha256(self.recipe, run.backbone),
            "vocabulary_sha256": None if tokenizer is None else sha256_of_json(sorted(tokenizer.get_vocab().items())),
            "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
            "max_tokens": run.text.max_tokens if self.recipe.uses_text else None,
            "pixels": {"mean": list(run.data.augment.mean), "std": list(run.data.augment.std)},
        }
        if run.task is not None:
            identity["task"] = run.task.model_dump(mode="json")
            identity["protocol"] = None if run.protocol is None else run.protocol.model_dump(mode="json")
            identity["from_pretrained"] = run.backbone.from_pretrained
        return identity


def choose_engine(
    run: RunConfig, objective: Objective, world_size: int | None, device: Device | None = None
) -> tuple[RunConfig, str | None]:
    """Return the run with a DeepSpeed config in place of `deepspeed: auto`, and the reason; other runs unchanged. A run
    that resumes keeps the config of its checkpoint.

    Args:
        objective: the complete model, e.g. on `meta`.
        world_size: None if unknown, which counts as one rank.
        device: device of a rank, without regard to checkpoints. Default: of this machine.
    """
    if run.deepspeed != AUTO:
        return run, None
    name, reason = (device is None and saved_choice(run)) or choose_ds_config(
        objective, world_size or 1, device or device_here(world_size or 1), lambda raw: _supports(run, raw)
    )
    return run.model_copy(update={"deepspeed": name}), f"auto: {name}, {reason}"


def saved_choice(run: RunConfig) -> tuple[str, str] | None:
    """Return the DeepSpeed config of the checkpoint that a run resumes from, and the reason; None without one."""
    named = [] if run.checkpoint.resume in ("auto", "never") else [Path(run.checkpoint.resume)]
    for folder in [*checkpoints(run.output_dir / "checkpoints"), *named]:
        saved = ErrorCollector().collect(read_yaml, folder / "run.yaml")  # `find_resume` reports invalid checkpoints
        if saved is not None and isinstance(saved.get("deepspeed"), str):
            return saved["deepspeed"], f"as in {folder}"
    return None


def _supports(run: RunConfig, raw: dict[str, Any]) -> bool:
    if run.optim.trust_coefficient is not None and not supports_trust_ratios(raw):
        return False
    errors = ErrorCollector()
    if run.task is not None:
        errors.collect(run.task.check_engine, run, raw)
    return not errors.errors


def resolve_engine(run: RunConfig, world_size: int | None, hidden_size: int) -> ResolvedConfig:
    """Return the DeepSpeed config of the run with all "auto" values resolved."""
    optim = run.optim
    resolved = resolve(
        load_ds_config(run.deepspeed),
        world_size=world_size,
        batch_size=optim.batch_size,
        micro_batch_size=optim.micro_batch_size,
        clip_grad_norm=optim.clip_grad_norm,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        hidden_size=hidden_size,
        where=run.deepspeed,
    )
    if not (optim.momentum_correction or resolved.config["optimizer"]["params"].get("bias_correction", True)):
        what, why = "bias correction must not be disabled twice", "the learning rate would undo a missing correction"
        raise ConfigError(
            what, where="optim.momentum_correction: false", why=why, fix="set optim.momentum_correction=true"
        )
    if optim.trust_coefficient is not None and not supports_trust_ratios(resolved.config):
        raise ConfigError(
            "trust_coefficient does not support ZeRO stage 3 and offload of the optimizer",
            where=f"deepspeed: {run.deepspeed}",
            fix="set deepspeed=zero1_bf16 or zero2_bf16; on CPUs zero1_cpu_fp32",
        )
    return resolved


def open_data(
    resolved: ResolvedRun, ranks: ProcessGroupRanks, workers: Sequence[PartWorkers] = ()
) -> tuple[TrainStream, TrainStream | None]:
    """Open the training and validation streams of this rank. Every rank must call it. `workers` is the result of
    `started_workers`; without it, each iterator starts its worker processes."""
    of_training, of_validation = (*workers, None, None)[:2]
    stream = open_together(lambda: open_stream(resolved, ranks, of_training, pin=pinning()))
    if not resolved.run.data.validation:
        return stream, None
    return stream, open_together(lambda: open_stream(resolved, ranks, of_validation, validation=True, pin=pinning()))


def start_engine(
    resolved: ResolvedRun,
    ranks: ProcessGroupRanks,
    report_start: Callable[[dict[str, Any]], None] = lambda report: None,
    *,
    reads_source: bool = True,
) -> tuple[Any, ShardedEma | None]:
    """Build the partitioned modules, initialize the weights, and start DeepSpeed and the EMA. `report_start` is called
    on rank 0 with a report on every tensor of the pretrained weights, by part. `reads_source` is False if a checkpoint
    is loaded right after."""
    run = resolved.run
    allow_tf32(compute_dtype(resolved.deepspeed.config))
    engine = build_engine(
        lambda: _build(resolved, ranks),
        lambda module: _prepare(cast(Objective, module), run, report_start, reads_source),
        resolved.deepspeed.config,
        weight_decay=run.optim.weight_decay,
        decay_tokens=run.optim.decay_tokens,
        trust_coefficient=run.optim.trust_coefficient,
        lr_scales=lambda module: scales_of(cast(Objective, module), run),
    )
    check_effective(engine, resolved.deepspeed)
    order_gathers(engine)
    policy = policy_of_switches(run.backbone.activation_checkpointing, run.backbone.compiles)
    apply_activation_checkpointing(engine.module, policy)
    pairs = ema_pairs(engine.module)
    computes = resolved.recipe.ema is not None  # the EMA of a task is only exported, not a target
    return engine, ShardedEma(engine, pairs, computes=computes) if pairs else None


def _build(resolved: ResolvedRun, ranks: ProcessGroupRanks) -> Objective:
    objective = build_objective(
        resolved.run, resolved.label_sets, resolved.vocab_size, ranks, image_counts=resolved.image_counts
    )
    keep_in_checkpoints(objective.student)
    if objective.text is not None:
        keep_in_checkpoints(objective.text)
    if resolved.run.task is not None:
        (names,) = resolved.label_sets.values()
        resolved.run.task.prepare(objective, len(names), resolved.run.data.augment.erasing)
        torch.manual_seed(resolved.run.seed + ranks.rank)  # stochastic depth must drop different branches on every rank
    return objective


def _prepare(
    module: Objective, run: RunConfig, report_start: Callable[[dict[str, Any]], None], reads_source: bool
) -> None:
    initialize = partial(initialize_module, weight_init=run.backbone.weight_init)
    initialize_sharded(module, initialize, seed=run.seed, skip=(EMA_PREFIX, TEACHERS_PREFIX))
    reports: dict[str, dict[str, Any]] = {}
    for part, prefix, open_plan in pretrained_plans(module, run):
        if part == "teachers" or reads_source:
            stream_into(module, prefix, partial(_reported, part, open_plan, reports))
    if reads_source and (run.backbone.from_pretrained is not None or run.text.from_pretrained is not None):
        from_rank_0(lambda: report_start(reports))
    if run.backbone.compiles:
        compile_layers(module, run.backbone.activation_checkpointing)


def _reported(part: str, open_plan: Callable[[], LoadPlan], reports: dict[str, dict[str, Any]]) -> LoadPlan:
    plan = open_plan()
    if part != "teachers":
        reports[part] = plan.report
    return plan


def print_start(reports: dict[str, dict[str, Any]], run: RunConfig) -> None:
    """Print the load result of the pretrained weights by part (backbone, text, heads), and save it, with the names of
    all tensors, in the run's folder."""
    table = Table(box=None, show_header=False)
    for part, report in reports.items():
        rows = [
            ("start from", f"{part}: {report['source']} ({report['kind']}, files: {len(report['files'])})"),
            ("loaded", f"{report['loaded']} tensors, {report['parameters']:,} parameters"),
        ]
        rows += [
            ("resized", f"{name}: {tuple(how['from'])} → {tuple(how['to'])}") for name, how in report["resized"].items()
        ]
        rows += [("constant", f"{len(names)} × {reason}") for reason, names in report["constants"].items()]
        rows += [
            ("left out", f"{len(names)} × {reason}, e.g. {names[0]}") for reason, names in report["left_out"].items()
        ]
        rows += [("fresh", name) for name in report["fresh"]]
        rows += [("assumed", f"{name} = {why}") for name, why in report["assumed"].items()]
        for topic, text in rows:
            table.add_row(Text(topic, style="bold"), Text(text))
    wide_console(stderr=True, soft_wrap=True).print(table)
    try:
        write_json(run.output_dir / START, reports)
    except OSError as error:
        raise explain(error, run.output_dir / "checkpoints") from None


def run_yaml(run: RunConfig) -> str:
    """Return the complete config as YAML, including defaults."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
