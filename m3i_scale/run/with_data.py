"""Validation of a config against its data, and its data streams, independent of the training engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.parts import PartWorkers
from m3i_scale.errors import ConfigError, ErrorCollector
from m3i_scale.host.output_dir import QUARANTINE, QUARANTINE_VALIDATION, check_output_dir
from m3i_scale.objective.build import build_on_meta
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.run.data_checks import DataFacts, check_batch, check_text, find_shards, read_facts


@dataclass
class RunWithData:
    """Run whose recipe, backbone and data have been validated together."""

    run: RunConfig
    recipe: Recipe
    label_sets: dict[str, list[str]]
    tokenizer: PreTrainedTokenizerBase | None
    image_size: int
    """Image size of the first stage in pixels."""

    @property
    def vocab_size(self) -> int | None:
        """Return the vocabulary size of the tokenizer, or None without a text target."""
        return len(self.tokenizer) if self.tokenizer is not None else None


def check_with_data(run: RunConfig, world_size: int) -> RunWithData:
    """Validate a config against its data and the number of ranks, independent of the training engine."""
    if len(run.stages) > 1:
        raise ConfigError(
            f"the run has {len(run.stages)} stages, and a custom loop has one at a time",
            where="stages",
            fix="give `run.in_stage(0)`, then `run.in_stage(1)` …, and each stream the state of the one before",
        )
    run, errors = run.in_stage(0), ErrorCollector()
    errors.collect(check_output_dir, run.output_dir)
    recipe = errors.collect(parse_recipe, run.recipe)
    access, there = find_shards(run, errors, world_size)
    model = errors.collect(backbone_config, run.backbone)
    facts = DataFacts(run)
    if recipe is not None:
        errors.collect(check_text, run, recipe)
        errors.collect(check_batch, run, recipe, world_size)
        facts = read_facts(run, recipe, access, errors, there=there)
    errors.raise_any()
    if recipe is None or model is None:
        raise RuntimeError("there is no error, and nothing was read")
    image_size = run.image_size(model.image_size)
    checked = RunWithData(facts.run, recipe, facts.label_sets, facts.tokenizer, image_size)
    build_on_meta(checked.run, checked.label_sets, checked.vocab_size)
    return checked


def open_stream(
    given: RunWithData,
    ranks: Ranks,
    workers: PartWorkers | None = None,
    *,
    validation: bool = False,
    pin: Callable[[Tensor], Tensor] | None = None,
) -> TrainStream:
    """Open this rank's stream of micro-batches. Validation has no augmentation and starts at the first sample."""
    run = given.run
    output_dir = run.output_dir
    return TrainStream(
        run.data,
        run.data.validation if validation else run.data.datasets,
        views=given.recipe.drawn_views,
        image_size=given.image_size,
        micro_batch_size=run.optim.micro_batch_size,
        world_size=ranks.world_size,
        rank=ranks.rank,
        seed=run.seed,
        tokenizer=given.tokenizer,
        max_tokens=run.text.max_tokens,
        label_sets=given.label_sets,
        cache_dir=output_dir / "index",
        augment=not validation,
        quarantine_path=output_dir / (QUARANTINE_VALIDATION if validation else QUARANTINE),
        reads=given.recipe.reads,
        workers=workers,
        pin=pin,
    )
