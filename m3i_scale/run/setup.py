"""Everything that can be checked before step 1, checked before step 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.build import backbone_config, backbone_source
from m3i_scale.backbones.load_plan import LoadPlan, plan_load
from m3i_scale.config import RunConfig, read_yaml
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.tokenizer import tokenizer_identity
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import sha256_of_json
from m3i_scale.objective.build import build_objective, initialize_module, momentum_pairs
from m3i_scale.objective.recipe import Recipe, meaning, parse_recipe
from m3i_scale.objective.teacher import teacher_plan, teacher_sha256
from m3i_scale.run.schedule import learning_rate
from m3i_scale.run.source_checks import check_label_order
from m3i_scale.scale.activations import apply_activation_checkpointing
from m3i_scale.scale.agree import from_rank_0, open_together
from m3i_scale.scale.checkpoint.layout import read_meta
from m3i_scale.scale.collectives import ProcessGroupRanks
from m3i_scale.scale.compilation import compile_layers
from m3i_scale.scale.deepspeed.effective import check_effective
from m3i_scale.scale.deepspeed.resolve import Resolved, load_ds_config, resolve
from m3i_scale.scale.deepspeed.rules import precision
from m3i_scale.scale.engine import build_engine
from m3i_scale.scale.loading import stream_into
from m3i_scale.scale.partition import ShardedMomentum, initialize_sharded
from m3i_scale.text import known_part, told_differences

_SHOWN_CHANGES = 5
_NEWER_IDENTITY = ("tokenizer", "max_tokens", "pixels")
"""Parts that checkpoints of earlier versions have not; those are resumed without a look at them."""
_TOLD_VERSIONS = ("m3i-scale", "torch", "deepspeed", "transformers", "safetensors")


@dataclass
class Plan:
    """A run that holds together: recipe, data, engine configuration."""

    run: RunConfig
    recipe: Recipe
    label_sets: dict[str, list[str]]
    tokenizer: PreTrainedTokenizerBase | None
    deepspeed: Resolved
    image_size: int
    accumulation: int

    @property
    def vocab_size(self) -> int | None:
        """Size of the tokenizer; None without a text target."""
        return len(self.tokenizer) if self.tokenizer is not None else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it: the shape of the model and what it learns.

        Reads every byte of a teacher, once: ask for it on one rank.
        """
        run = self.run
        model = backbone_config(run.backbone).to_diff_dict()
        for key in ("transformers_version", "_name_or_path"):  # says nothing about the weights
            model.pop(key, None)
        return {
            "recipe": {key: value for key, value in run.recipe.items() if key != "teacher"},  # its hash stands below
            "backbone": model,
            "optim": run.optim.model_dump(include={"batch_size", "weight_decay", "betas", "eps"}, mode="json"),
            "attention": run.backbone.attention,
            "text": run.text.config if self.recipe.uses_text else None,
            "label_sets": self.label_sets if self.recipe.uses_categories else None,
            "vocab_size": self.vocab_size,
            "teacher_sha256": teacher_sha256(self.recipe),
            "vocabulary_sha256": self._vocabulary_sha256(),
            "tokenizer": None if self.tokenizer is None else tokenizer_identity(self.tokenizer),
            "max_tokens": run.text.max_tokens if self.recipe.uses_text else None,
            "pixels": {"mean": list(run.data.augment.mean), "std": list(run.data.augment.std)},
        }

    def _vocabulary_sha256(self) -> str | None:
        if self.tokenizer is None:
            return None
        return sha256_of_json(sorted(self.tokenizer.get_vocab().items()))


def check_batch(run: RunConfig, recipe: Recipe, world_size: int) -> None:
    """Refuse a micro-batch whose losses would say nothing.

    Raises:
        ConfigError: the recipe compares samples, and there is one.
    """
    # A mix asks for as many samples on every rank, when the modules are built.
    if recipe.mix is None and recipe.compares_samples and run.optim.micro_batch_size * world_size < 2:
        raise ConfigError(
            f"{recipe.compares_samples}, which needs at least two samples at a time",
            where=f"optim.micro_batch_size: {run.optim.micro_batch_size}, on {world_size} rank",
            why="one sample differs from nothing: its loss says nothing",
            fix="optim.micro_batch_size=2 or more, or more ranks",
        )


def resolve_engine(run: RunConfig, world_size: int | None, hidden_size: int) -> Resolved:
    """The run's DeepSpeed file, filled in.

    Raises:
        ConfigError: see `resolve`.
    """
    optim = run.optim
    return resolve(
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


def open_stream(plan: Plan, ranks: ProcessGroupRanks, *, validation: bool = False) -> TrainStream:
    """This rank's stream of micro-batches; for validation without augmentation, and always from the start."""
    run = plan.run
    output_dir = run.output_dir
    return TrainStream(
        run.data,
        run.data.validation if validation else run.data.sources,
        views=plan.recipe.views,
        image_size=plan.image_size,
        micro_batch_size=run.optim.micro_batch_size,
        world_size=ranks.world_size,
        rank=ranks.rank,
        seed=run.seed,
        tokenizer=plan.tokenizer,
        max_tokens=run.text.max_tokens,
        label_sets=plan.label_sets,
        cache_dir=output_dir / "index",
        augment=not validation,
        quarantine_path=output_dir / ("quarantine_validation.jsonl" if validation else "quarantine.jsonl"),
    )


def open_data(plan: Plan, ranks: ProcessGroupRanks) -> tuple[TrainStream, TrainStream | None]:
    """This rank's streams for training and for validation; every rank calls it.

    Raises:
        UserError: what any rank cannot open, of both, so that validation data are looked at before the first step.
    """
    stream = open_together(lambda: open_stream(plan, ranks))
    if not plan.run.data.validation:
        return stream, None
    return stream, open_together(lambda: open_stream(plan, ranks, validation=True))


Told = Callable[[dict[str, Any]], None]


def start_engine(
    plan: Plan, ranks: ProcessGroupRanks, told: Told = lambda report: None, *, reads_source: bool = True
) -> tuple[Any, ShardedMomentum | None]:
    """Build the partitioned modules, give them their first weights, start DeepSpeed and the momentum target.

    Args:
        plan: of the run.
        ranks: of the run.
        told: called on rank 0 with what became of every tensor of `backbone.from_pretrained`.
        reads_source: False where a checkpoint is loaded right after, over whatever the backbone starts from.
    """
    run = plan.run
    engine = build_engine(
        lambda: build_objective(run, plan.label_sets, plan.vocab_size, ranks),
        lambda module: _prepare(module, run, told, reads_source),
        plan.deepspeed.config,
        weight_decay=run.optim.weight_decay,
    )
    check_effective(engine, plan.deepspeed)
    apply_activation_checkpointing(engine.module, run.backbone.activation_checkpointing)  # a budget: all, until counted
    pairs = momentum_pairs(engine.module)
    return engine, ShardedMomentum(engine, pairs) if pairs else None


def _prepare(module: nn.Module, run: RunConfig, told: Told, reads_source: bool) -> None:
    _first_weights(module, run, told, reads_source)
    if run.backbone.compile:
        compile_layers(module)


def _first_weights(module: nn.Module, run: RunConfig, told: Told, reads_source: bool) -> None:
    initialize_sharded(module, initialize_module, seed=run.seed, skip=("momentum.", "teacher."))
    if run.backbone.from_pretrained is not None and reads_source:
        plans: list[LoadPlan] = []

        def open_stream() -> LoadPlan:
            plans.append(plan_load(backbone_source(run.backbone), backbone_config(run.backbone)))
            return plans[0]

        stream_into(module, "student.model.", open_stream)
        from_rank_0(lambda: told(plans[0].report))
    recipe = parse_recipe(run.recipe)
    if recipe.teacher is not None:
        stream_into(module, "teacher.model.", lambda: teacher_plan(recipe))


def check_resume(plan: Plan, checkpoint: Path, world_size: int) -> list[str]:
    """Refuse a checkpoint of another model or recipe, or of a later step than the run has. Returns what is told of a
    run that goes on in another shape. Call it on one rank: it may read a whole teacher.

    Raises:
        CheckpointError: names what differs.
    """
    meta = read_meta(checkpoint)
    _check_identity(plan, checkpoint, meta)
    if meta["step"] > plan.run.optim.steps:
        raise CheckpointError(
            f"the checkpoint is of step {meta['step']}, and the run has {plan.run.optim.steps} steps",
            where=str(checkpoint),
            fix="raise optim.steps, or take another output_dir",
        )
    return _changed_shape(plan, meta, world_size) + _changed_schedule(plan.run, checkpoint, int(meta["step"]))


def _changed_shape(plan: Plan, meta: dict[str, Any], world_size: int) -> list[str]:
    """Notes on another number of ranks, stage or precision."""
    now = shape_of(plan, world_size)
    notes = [
        f"resharded: {key} was {meta.get(key)}, is {value}"
        for key, value in now.items()
        if key != "compared" and meta.get(key) != value
    ]
    if plan.recipe.compares_samples and meta.get("compared") != now["compared"]:
        notes.append(
            f"losses compare {now['compared']} samples at a time, and did {meta.get('compared')} before: their values "
            "jump here (optim.micro_batch_size × ranks)"
        )
    return notes


_OF_THE_SCHEDULE = ("steps", "warmup_steps", "lr", "min_lr")


def _changed_schedule(run: RunConfig, checkpoint: Path, step: int) -> list[str]:
    """A note on another length or height of the schedule: the learning rate follows the new one from here on."""
    if step >= run.optim.steps:
        return []
    saved = read_yaml(checkpoint / "run.yaml").get("optim")
    if not isinstance(saved, dict):
        return []
    before = run.optim.model_copy(update={name: saved[name] for name in _OF_THE_SCHEDULE if name in saved})
    told = [
        f"optim.{name} was {getattr(before, name)}, is {getattr(run.optim, name)}"
        for name in _OF_THE_SCHEDULE
        if getattr(before, name) != getattr(run.optim, name)
    ]
    if not told:
        return []
    rates = " instead of ".join(f"{learning_rate(step, optim):.3g}" for optim in (run.optim, before))
    return [f"the schedule changed: {', '.join(told)}; the learning rate of step {step + 1} is {rates}"]


def shape_of(plan: Plan, world_size: int) -> dict[str, Any]:
    """In which shape a run is computed; a resumed run may have another."""
    config = plan.deepspeed.config
    return {
        "world_size": world_size,
        "zero_stage": int(config["zero_optimization"]["stage"]),
        "precision": precision(config),
        "compared": world_size * plan.run.optim.micro_batch_size,
    }


def _check_identity(plan: Plan, checkpoint: Path, meta: dict[str, Any]) -> None:
    saved, now = dict(meta["identity"]), json.loads(json.dumps(plan.identity))
    for identity in (saved, now):  # a recipe may be written in several ways
        identity["recipe"] = meaning(identity.get("recipe"))
    check_label_order(saved.get("label_sets"), now["label_sets"], checkpoint)
    for key in _NEWER_IDENTITY:
        if key in saved and key in now:
            now[key] = known_part(saved[key], now[key])
        else:
            now.pop(key, None)
    different = [key for key in now if saved.get(key) != now[key]]
    if different:
        key = different[0]
        files = [f"data.sources.{name}: {source.shards}" for name, source in plan.run.data.sources.items()]
        labels = key == "label_sets"
        raise CheckpointError(
            f"the checkpoint is of another run: {', '.join(different)} changed",
            where=f"{checkpoint}" + (f"; labels.json of {', '.join(files)}" if labels else ""),
            why=_difference(key, saved.get(key), now[key]),
            fix=("restore labels.json as it was" if labels else "take the same run file")
            + ", or another output_dir for the new run",
        )


def _difference(key: str, before: Any, now: Any) -> str:
    """What was and what is: recipes by their names, where those differ, everything else field by field."""
    names = [value.get("name") if isinstance(value, dict) else None for value in (before, now)]
    if key == "recipe" and names[0] != names[1]:
        return f"recipe was '{names[0]}', is '{names[1]}'"
    found = told_differences(key, before, now)
    more = f", and {len(found) - _SHOWN_CHANGES} more" if len(found) > _SHOWN_CHANGES else ""
    return "; ".join(found[:_SHOWN_CHANGES]) + more


def meta_of(plan: Plan, *, step: int, world_size: int) -> dict[str, Any]:
    """What meta.json and the manifest say about a checkpoint."""
    text = run_yaml(plan.run)
    return {
        "step": step,
        "samples": step * plan.run.optim.batch_size,
        **shape_of(plan, world_size),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "identity": plan.identity,
        "label_sets": plan.label_sets,
        "vocab_size": plan.vocab_size,
        "tokenizer": getattr(plan.tokenizer, "name_or_path", None),
        "versions": {name: version(name) for name in _TOLD_VERSIONS},
    }


def run_yaml(run: RunConfig) -> str:
    """The complete run file, defaults included."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
