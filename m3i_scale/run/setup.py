"""Everything that can be checked before step 1, checked before step 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.build import (
    backbone_config,
    belongs_to_layers,
    pretrained_folder,
    starts_fresh,
    vision_class,
)
from m3i_scale.config import BackboneConfig, RunConfig, TextConfig
from m3i_scale.data.loader import TrainStream, find_tokenizer, read_label_sets
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.objective.build import build_objective, initialize_module, momentum_pairs
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.teacher import teacher_sha256, teacher_weights
from m3i_scale.scale.activations import apply_activation_checkpointing, checkpointed_layers
from m3i_scale.scale.checkpoint.state import from_rank_0, read_meta
from m3i_scale.scale.collectives import ProcessGroupRanks
from m3i_scale.scale.ds_config import Resolved, check_accelerator, load_ds_config, resolve
from m3i_scale.scale.ds_effective import check_effective
from m3i_scale.scale.engine import build_engine
from m3i_scale.scale.partition import ShardedMomentum, copy_into, initialize_sharded

_SHOWN_CHANGES, _SHOWN_LETTERS = 5, 100


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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it: the shape of the model and what it learns."""
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
        }

    def _vocabulary_sha256(self) -> str | None:
        if self.tokenizer is None:
            return None
        return hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()


def make_plan(run: RunConfig, world_size: int) -> Plan:
    """Check a run file against its data, its engine configuration and the number of ranks.

    Raises:
        ConfigError, DataError: what does not hold together.
    """
    recipe = parse_recipe(run.recipe)
    if not run.data.sources:
        raise ConfigError(
            "the run has no data", where="data.sources", fix="data.sources.main.shards=/data/shards/train"
        )
    model = backbone_config(run.backbone)
    checkpointed_layers(run.backbone.activation_checkpointing, model.num_hidden_layers)
    label_sets = read_label_sets(run.data.sources) if recipe.uses_categories else {}
    tokenizer = find_tokenizer(run.data.sources, run.text.tokenizer) if recipe.uses_text else None
    if not recipe.uses_text and run.text != TextConfig():  # a complete run file holds the defaults of all sections
        raise ConfigError("`text` has no effect: the recipe has no text target", where="text")
    lines = [name for name, source in run.data.sources.items() if source.captions == "lines"]
    if lines and not recipe.uses_text:
        raise ConfigError(
            "`captions: lines` has no effect: the recipe has no text target", where=f"data.sources.{lines[0]}"
        )
    if run.evaluation.every_steps and not run.data.validation:
        raise ConfigError(
            "evaluation.every_steps needs data.validation", fix="data.validation.val.shards=/data/shards/val"
        )
    if run.data.validation and not run.evaluation.every_steps:
        raise ConfigError(
            "data.validation has no effect", where="evaluation.every_steps: 0", fix="set it, e.g. to 1000"
        )
    if tokenizer is not None and tokenizer.pad_token_id != 0:
        raise ConfigError(
            f"the text tower pads with token 0, and the tokenizer with {tokenizer.pad_token_id}",
            where="text.tokenizer",
            fix="take a BERT-type tokenizer, or the one that `shards make` trains",
        )
    # A mix asks for as many samples on every rank, when the modules are built.
    if recipe.mix is None and recipe.compares_samples and run.optim.micro_batch_size * world_size < 2:
        raise ConfigError(
            f"{recipe.compares_samples}, which needs at least two samples at a time",
            where=f"optim.micro_batch_size: {run.optim.micro_batch_size}, on {world_size} rank",
            why="one sample differs from nothing: its loss says nothing",
            fix="optim.micro_batch_size=2 or more, or more ranks",
        )
    run = _with_validation_labels(run, label_sets)
    raw = load_ds_config(run.deepspeed)
    optim = run.optim
    resolved = resolve(
        raw,
        world_size=world_size,
        batch_size=optim.batch_size,
        micro_batch_size=optim.micro_batch_size,
        clip_grad_norm=optim.clip_grad_norm,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        hidden_size=model.hidden_size,
        where=run.deepspeed,
    )
    check_accelerator(resolved)
    accumulation = optim.batch_size // (optim.micro_batch_size * world_size)
    return Plan(run, recipe, label_sets, tokenizer, resolved, model.image_size, accumulation)


def _with_validation_labels(run: RunConfig, label_sets: dict[str, list[str]]) -> RunConfig:
    """Validation sources under the training label set that they share; they never add one to the model.

    Raises:
        ConfigError: validation labels that no training source has.
    """
    if not label_sets or not run.data.validation:
        return run
    sources = {}
    for name, source in run.data.validation.items():
        (found, names), *_ = [*read_label_sets({name: source}).items(), (None, None)]
        same = [key for key in label_sets if label_sets[key] == names]
        if found is not None and not same:
            raise ConfigError(
                f"the labels of validation source '{name}' are those of no training source",
                where=f"data.validation.{name}: {source.shards}",
                fix="make both from one folder or manifest (`shards make … --split`), so that labels.json is the same",
            )
        # The same names under another set name: the model has one head for them.
        chosen = found if found in same else (same[0] if same else source.label_set)
        sources[name] = source.model_copy(update={"label_set": chosen})
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": sources})})


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


def start_engine(plan: Plan, ranks: ProcessGroupRanks) -> tuple[Any, ShardedMomentum | None]:
    """Build the partitioned modules, give them their first weights, start DeepSpeed and the momentum target."""
    run = plan.run
    engine = build_engine(
        lambda: build_objective(run, plan.label_sets, plan.vocab_size, ranks),
        lambda module: _first_weights(module, run, ranks),
        plan.deepspeed.config,
        weight_decay=run.optim.weight_decay,
    )
    check_effective(engine, plan.deepspeed)
    apply_activation_checkpointing(engine.module, run.backbone.activation_checkpointing)
    pairs = momentum_pairs(engine.module)
    return engine, ShardedMomentum(engine, pairs) if pairs else None


def _first_weights(module: nn.Module, run: RunConfig, ranks: ProcessGroupRanks) -> None:
    initialize_sharded(module, initialize_module, seed=run.seed, skip=("momentum.", "teacher."))
    if run.backbone.from_pretrained is not None:
        _fill(module, "student.model.", lambda: _pretrained_weights(run.backbone), ranks)
    recipe = parse_recipe(run.recipe)
    if recipe.teacher is not None:
        _fill(module, "teacher.model.", lambda: teacher_weights(recipe), ranks)


def _fill(
    module: nn.Module, prefix: str, read: Callable[[], Mapping[str, Tensor | None]], ranks: ProcessGroupRanks
) -> None:
    """Rank 0 reads a whole model, in host memory; its parameters are handed over one at a time."""
    values: dict[str, Tensor | None] = {}
    from_rank_0(lambda: values.update(read()))
    copy_into(module, prefix, values if ranks.rank == 0 else None)


def _pretrained_weights(backbone: BackboneConfig) -> dict[str, Tensor | None]:
    """Whole weights by name; None for those that the folder has not and the model may start fresh."""
    source, config = backbone.from_pretrained or "", backbone_config(backbone)
    kind, options = vision_class(config)
    try:
        model, report = kind.from_pretrained(
            pretrained_folder(source), config=config, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot start from '{source}': {str(error).splitlines()[0]}", where="backbone.from_pretrained"
        ) from None
    bad = [name for key in ("missing_keys", "mismatched_keys") for name in report.get(key, [])]
    # A published classifier may have no fusion head; ours keeps its first weights.
    fresh = {name for name in report["missing_keys"] if starts_fresh(source, str(name))}
    bad = [name for name in bad if name not in fresh]
    # Poolers and task heads are no part of the backbone; a layer that finds no place means another depth.
    bad += [name for name in report.get("unexpected_keys", []) if belongs_to_layers(config, str(name))]
    if bad:
        raise ConfigError(
            f"{len(bad)} weights of '{source}' are missing, have another shape or find no place, e.g. {bad[0]}",
            where="backbone.from_pretrained",
            fix="leave image_size, patch_size and widths as the checkpoint has them",
        )
    return {name: None if name in fresh else parameter.detach() for name, parameter in model.named_parameters()}


def check_resume(plan: Plan, checkpoint: Path, world_size: int) -> None:
    """Refuse a checkpoint of another model or recipe, of another partition, or of a later step than the run has.

    Raises:
        CheckpointError: names what differs.
    """
    meta = read_meta(checkpoint)
    _check_identity(plan, checkpoint, meta)
    stage = plan.deepspeed.config["zero_optimization"]["stage"]
    for key, here in (("world_size", world_size), ("zero_stage", stage)):
        if meta[key] != here:
            raise CheckpointError(
                f"the checkpoint was written with {key} {meta[key]}, and this run has {here}",
                where=str(checkpoint),
                fix=f"resume with {key} {meta[key]}",
            )
    if meta["step"] > plan.run.optim.steps:
        raise CheckpointError(
            f"the checkpoint is of step {meta['step']}, and the run has {plan.run.optim.steps} steps",
            where=str(checkpoint),
            fix="raise optim.steps, or take another output_dir",
        )


def _check_identity(plan: Plan, checkpoint: Path, meta: dict[str, Any]) -> None:
    saved = meta["identity"]
    now = json.loads(json.dumps(plan.identity()))
    different = [key for key in now if saved.get(key) != now[key]]
    if different:
        key = different[0]
        raise CheckpointError(
            f"the checkpoint is of another run: {', '.join(different)} changed",
            where=str(checkpoint),
            why=_difference(key, saved.get(key), now[key]),
            fix="take the same run file, or another output_dir for the new run",
        )


def _difference(key: str, before: Any, now: Any) -> str:
    """What was and what is: recipes by their names, where those differ, everything else field by field."""
    names = [value.get("name") if isinstance(value, dict) else None for value in (before, now)]
    if key == "recipe" and names[0] != names[1]:
        return f"recipe was '{names[0]}', and is '{names[1]}'"
    found = list(_changes(key, before, now))
    more = f", and {len(found) - _SHOWN_CHANGES} more" if len(found) > _SHOWN_CHANGES else ""
    return "; ".join(found[:_SHOWN_CHANGES]) + more


def _changes(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                yield from _changes(f"{key}.{name}", before.get(name), now.get(name))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            if one != other:
                yield from _changes(f"{key}.{number}", one, other)
    else:
        yield f"{key} was {_short(before)}, and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + " …"


def meta_of(plan: Plan, *, step: int, world_size: int, zero_stage: int) -> dict[str, Any]:
    """What meta.json and the manifest say about a checkpoint."""
    text = run_yaml(plan.run)
    return {
        "step": step,
        "samples": step * plan.run.optim.batch_size,
        "world_size": world_size,
        "zero_stage": zero_stage,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "identity": plan.identity(),
        "label_sets": plan.label_sets,
        "vocab_size": plan.vocab_size,
        "tokenizer": getattr(plan.tokenizer, "name_or_path", None),
    }


def run_yaml(run: RunConfig) -> str:
    """The complete run file, defaults included."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
