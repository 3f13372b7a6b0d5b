"""Check everything of a run that can be checked before anything is started, all at once."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig, TextConfig, find_run_file, run_values, sections_that_hold
from m3i_scale.data.categories import categories_beside
from m3i_scale.data.mixing import check_shares, check_weights
from m3i_scale.data.remote.access import Access, check_access
from m3i_scale.data.shards import CATEGORIES, LABELS, captions_beside, read_label_sets, require_shards, shard_folder
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.downstream.fine_tuning import check_image_counts, check_labels, check_stage, check_task
from m3i_scale.errors import ConfigError, Faults, UserError
from m3i_scale.objective.meta import build_on_meta
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe, parse_recipe
from m3i_scale.run.hooks.guard import check_guard
from m3i_scale.run.retention import check_retention
from m3i_scale.run.setup import ResolvedRun, check_batch, resolve_engine
from m3i_scale.run.source_checks import check_sources, measures_precision
from m3i_scale.scale.activations import check_policy
from m3i_scale.scale.arithmetic import check_deterministic
from m3i_scale.scale.compilation import check_compile
from m3i_scale.scale.deepspeed.resolve import ResolvedConfig, check_accelerator, load_ds_config
from m3i_scale.scale.peak import compute_dtype, named_peak
from m3i_scale.text import shown

_ANY_WIDTH = 768
"""Of a backbone that is at fault: buckets of the DeepSpeed file are filled in with it, and thrown away."""


def faults_of(name_or_path: str, overrides: list[str] | None = None, ranks: int | None = None) -> list[UserError]:
    """List all that `train` would refuse before it starts anything, but for what only the machines of the run can tell.

    Args:
        name_or_path: a run file, or the name of a built-in one.
        overrides: `section.key=value`.
        ranks: that the run would have; None: what depends on their number is not looked at.
    """
    faults = Faults()
    values = faults.note(run_values, name_or_path, overrides)
    if values is None:
        return faults.found
    faults.note(load_run_and_recipe, name_or_path, overrides, values)
    run, broken = sections_that_hold(values)
    if run is not None:
        recipe_holds = Faults().note(lambda: parse_recipe(run.recipe)) is not None
        at_fault = broken if recipe_holds else broken | {"recipe"}
        Checks(run, ranks, at_fault, here=False).resolve(faults)
    for fault in faults.found:
        fault.where = fault.where or str(find_run_file(name_or_path))
    return faults.found


def check_run(name_or_path: str, overrides: list[str] | None = None, ranks: int | None = None) -> None:
    """Raise the faults that `faults_of` returns.

    Raises:
        UserError: what was found; a FaultsError where that are several things.
    """
    faults = Faults()
    faults.found = faults_of(name_or_path, overrides, ranks)
    faults.end()


def resolve_run(run: RunConfig, world_size: int) -> ResolvedRun:
    """Check a run file against its data, its engine configuration, the number of ranks and this machine.

    Raises:
        ConfigError, DataError: what does not hold together; a FaultsError where that are several things.
    """
    faults = Faults()
    resolved = Checks(run, world_size).resolve(faults)
    faults.end()
    if resolved is None:
        raise RuntimeError("nothing is at fault, and nothing is resolved")
    return resolved


class Checks:
    """Runs the checks of one run, but for those that need a section which is at fault already.

    Args:
        run: the run file.
        ranks: of the run; None: not known.
        at_fault: names of sections that hold defaults, because what was written there has faults.
        here: whether this machine would be a part of the run.
    """

    def __init__(
        self, run: RunConfig, ranks: int | None, at_fault: frozenset[str] = frozenset(), *, here: bool = True
    ) -> None:
        self.run, self.ranks, self.at_fault, self.here = run, ranks, at_fault, here

    def sound(self, *sections: str) -> bool:
        """Return whether nothing in these sections is known to be at fault."""
        return not self.at_fault.intersection(sections)

    def resolve(self, faults: Faults) -> ResolvedRun | None:
        """Run all checks, and return the resolved run.

        Args:
            faults: what is found is added.

        Returns:
            None where something does not hold together.
        """
        run, before = self.run, len(faults.found)
        recipe = faults.note(parse_recipe, run.recipe) if self.sound("recipe") else None
        access, there = self._access(faults) if self.sound("data") else (None, False)
        model = faults.note(backbone_config, run.backbone) if self.sound("backbone") else None
        faults.note(check_policy, run.backbone.activation_checkpointing)
        if run.backbone.compile:
            faults.note(check_compile)
        label_sets: dict[str, list[str]] = {}
        image_counts: list[int] | None = None
        tokenizer = None
        if model is not None and self.sound("optim"):
            faults.note(check_task, run, model)
        if recipe is not None:
            self._check_without_data(recipe, faults)
            if self.sound("data"):
                faults.note(check_sources, run, recipe, access, there=there)
            if access is not None and there:
                label_sets, image_counts = self._read_classes(recipe, access, faults)
                if recipe.uses_text and self.sound("text"):
                    tokenizer = faults.note(_tokenizer, self.run, access)
                file = recipe.labels_file or LABELS
                run = faults.note(_with_validation_labels, self.run, label_sets, file) or run
        deepspeed = None
        if self.sound("optim", "deepspeed"):
            width = _ANY_WIDTH if model is None else model.hidden_size
            deepspeed = faults.note(resolve_engine, run, self.ranks, width)
        elif self.sound("deepspeed"):  # which is filled in from `optim`
            faults.note(load_ds_config, run.deepspeed)
        if deepspeed is not None:
            faults.note(check_stage, run, deepspeed.config)
        self._check_engine(deepspeed, faults)
        if recipe is None or model is None or deepspeed is None or not self.sound("data", "text"):
            return None
        if len(faults.found) > before:
            return None
        accumulation = run.optim.batch_size // (run.optim.micro_batch_size * (self.ranks or 1))
        precision = faults.note(measures_precision, run, recipe, access)
        of_model = (model.image_size, accumulation, image_counts, bool(precision))
        resolved = ResolvedRun(run, recipe, label_sets, tokenizer, deepspeed, *of_model)
        vocab_size = resolved.vocab_size
        built = faults.note(lambda: build_on_meta(run, label_sets, vocab_size, image_counts=image_counts))
        if precision is None or built is None:
            return None
        return resolved

    def _read_classes(
        self, recipe: Recipe, access: Access, faults: Faults
    ) -> tuple[dict[str, list[str]], list[int] | None]:
        """Return class names by label set, and in how many images the classes are, where a source says so."""
        if recipe.labels_file is None:
            return {}, None
        label_sets = faults.note(self._read_labels, access, recipe.labels_file) or {}
        counts = faults.note(self._image_counts, access) if recipe.labels_file == CATEGORIES else None
        return label_sets, counts

    def _read_labels(self, access: Access, file: str) -> dict[str, list[str]]:
        label_sets = read_label_sets(self.run.data.sources, access, file)
        check_labels(self.run.task, label_sets)
        return label_sets

    def _image_counts(self, access: Access) -> list[int] | None:
        """Return in how many images of all sources every category is; None where no source says so. That sources have
        other categories is told with their names."""
        by_source = []
        for name, source in self.run.data.sources.items():
            categories = categories_beside(shard_folder(source.shards), f"source '{name}': ", access)
            if categories is not None and categories.format == "lvis":
                by_source.append([category.image_count or 0 for category in categories.categories])
        counts = [sum(of_category) for of_category in zip(*by_source, strict=False)] if by_source else None
        check_image_counts(self.run.task, counts)
        return counts

    def _check_without_data(self, recipe: Recipe, faults: Faults) -> None:
        run = self.run
        if not recipe.uses_text and run.text != TextConfig():  # a complete run file holds the defaults of all sections
            faults.found.append(
                ConfigError("`text` has no effect: the recipe has no text target", where="text", fix="leave it out")
            )
        if self.sound("evaluation", "data", "optim"):
            faults.note(_check_evaluation, run)
            if self.sound("checkpoint"):
                faults.note(check_retention, run, recipe)
        if self.ranks is not None and self.sound("optim"):
            ranks = self.ranks
            faults.note(check_batch, run, recipe, ranks)

    def _check_engine(self, deepspeed: ResolvedConfig | None, faults: Faults) -> None:
        peak = self.run.hardware.peak_tflops
        if deepspeed is None:
            if not isinstance(peak, str | None):  # a name is one of some precision
                faults.note(named_peak, peak, torch.float32)
            return
        if self.here:
            faults.note(check_accelerator, deepspeed)
            if self.run.hardware.deterministic:
                faults.note(check_deterministic)
        if self.sound("guard", "checkpoint"):
            faults.note(check_guard, self.run, deepspeed.config)
        if peak is not None:
            faults.note(named_peak, peak, compute_dtype(deepspeed.config))

    def _access(self, faults: Faults) -> tuple[Access | None, bool]:
        """Return the access to servers, and whether the shards are there."""
        data = self.run.data
        if self.ranks is not None and self.sound("optim"):
            size = self.run.optim.micro_batch_size
            faults.note(check_shares, data, micro_batch_size=size, world_size=self.ranks)
        before = len(faults.found)
        faults.note(check_weights, data.sources)
        access = faults.note(lambda: check_access(data, data.sources).at_start())
        if access is not None:
            for kind, sources in (("sources", data.sources), ("validation", data.validation)):
                for name, source in sources.items():
                    faults.note(require_shards, source.shards, f"data.{kind}.{name}.shards", access)
        return access, len(faults.found) == before


def _check_evaluation(run: RunConfig) -> None:
    """Check that an evaluation has validation data, an interval, and a run that is long enough.

    Raises:
        ConfigError: one of them is missing.
    """
    every, steps = run.evaluation.every_steps, run.optim.steps
    if every and not run.data.validation:
        raise ConfigError(
            "evaluation.every_steps needs data.validation", fix="data.validation.val.shards=/data/shards/val"
        )
    if run.data.validation and not every:
        raise ConfigError(
            "data.validation has no effect", where="evaluation.every_steps: 0", fix="set it, e.g. to 1000"
        )
    if every > steps:
        raise ConfigError(
            f"the run has {steps} steps: nothing would ever be evaluated",
            where=f"evaluation.every_steps: {every}",
            fix=f"evaluation.every_steps={steps} or less",
        )


def _tokenizer(run: RunConfig, access: Access) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run, of which padding is token 0.

    Raises:
        ConfigError: no source has captions; see `find_tokenizer`; or it pads with another token.
    """
    read = {name: source for name, source in run.data.sources.items() if source.captions != "none"}
    if read and all(captions_beside(source.shards, access) == 0 for source in read.values()):
        raise ConfigError(
            "the recipe has a text target, and no source has captions",
            where=", ".join(f"data.sources.{name}.shards: {shown(source.shards)}" for name, source in read.items()),
            why="manifest.json beside the shards counts none",
            fix="make them anew with NAME.txt beside NAME.jpg, or take a recipe without text: m3i_no_text, supervised",
        )
    tokenizer = find_tokenizer(run.data.sources, run.text.tokenizer, access)
    if tokenizer.pad_token_id != 0:
        raise ConfigError(
            f"the text tower pads with token 0, and the tokenizer with {tokenizer.pad_token_id}",
            where="text.tokenizer",
            fix="take a BERT-type tokenizer, or the one that `shards make` trains",
        )
    return tokenizer


def _with_validation_labels(run: RunConfig, label_sets: dict[str, list[str]], file: str) -> RunConfig:
    """Return the run with validation sources under the training label set that they share: they never add one to the
    model.

    Raises:
        ConfigError: validation labels that no training source has.
    """
    if not label_sets or not run.data.validation:
        return run
    sources = {}
    for name, source in run.data.validation.items():
        (label_set, names), *_ = [*read_label_sets({name: source}, file=file).items(), (None, None)]
        same = [key for key in label_sets if label_sets[key] == names]
        if label_set is not None and not same:
            raise ConfigError(
                f"the labels of validation source '{name}' are those of no training source",
                where=f"data.validation.{name}: {source.shards}",
                fix=f"make both from one folder or manifest (`shards make … --split`), so that {file} is the same",
            )
        # The same names under another set name: the model has one head for them.
        chosen = label_set if label_set in same else (same[0] if same else source.label_set)
        sources[name] = source.model_copy(update={"label_set": chosen})
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": sources})})
