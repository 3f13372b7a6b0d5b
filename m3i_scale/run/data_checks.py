"""Validation of a config against its data, and properties read from the data: class lists and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from m3i_scale.config import RunConfig, TextConfig
from m3i_scale.data.categories import shard_categories
from m3i_scale.data.mixing import check_shares, check_weights
from m3i_scale.data.remote.access import Access, check_access
from m3i_scale.data.shards import CATEGORIES, LABELS, read_label_sets, read_sample_count, require_shards, shard_folder
from m3i_scale.data.tokenizer import check_ends, find_tokenizer
from m3i_scale.errors import ConfigError, Faults
from m3i_scale.objective.recipe import Recipe
from m3i_scale.run.source_checks import check_sources
from m3i_scale.text import redact_text


def check_batch(run: RunConfig, recipe: Recipe, world_size: int) -> None:
    """Validate that the micro-batch is large enough for contrastive losses."""
    # A mix requires the same number of samples on every rank when the modules are built.
    if recipe.mix is None and recipe.compares_samples and run.optim.micro_batch_size * world_size < 2:
        raise ConfigError(
            f"{recipe.compares_samples}, which needs at least two samples at a time",
            where=f"optim.micro_batch_size: {run.optim.micro_batch_size}, on {world_size} rank",
            why="one sample differs from nothing: its loss says nothing",
            fix="optim.micro_batch_size=2 or more, or more ranks",
        )


def check_text(run: RunConfig, recipe: Recipe) -> None:
    """Validate that the `text` section is used."""
    if not recipe.uses_text and run.text != TextConfig():  # a resolved config includes the defaults of all sections
        raise ConfigError("`text` has no effect: the recipe has no text target", where="text", fix="leave it out")
    if run.text.config and not recipe.uses_text_tower:
        raise ConfigError(
            "`text.config` has no effect: the recipe predicts captions token by token, and encodes none",
            where="text.config",
            fix="leave it out; the decoder's size stands in recipe.decoders",
        )


@dataclass
class DataFacts:
    """Properties of a run that are read from its data."""

    run: RunConfig
    """Config with validation datasets mapped to the training label spaces."""
    label_sets: dict[str, list[str]] = field(default_factory=dict)
    image_counts: list[int] | None = None
    """Number of images per category, if a dataset provides it."""
    tokenizer: PreTrainedTokenizerBase | None = None


class DataChecks:
    """Data-related checks of a run, except checks that depend on an invalid section. `at_fault` names these sections,
    which have default values instead. `ranks` is None if unknown."""

    def __init__(self, run: RunConfig, ranks: int | None, at_fault: frozenset[str] = frozenset()) -> None:
        self.run, self.ranks, self.at_fault = run, ranks, at_fault

    def has_no_errors(self, *sections: str) -> bool:
        """Return whether none of these sections has a known error."""
        return not self.at_fault.intersection(sections)

    def read(self, recipe: Recipe, access: Access | None, faults: Faults, *, there: bool) -> DataFacts:
        """Check the datasets against the recipe and read their properties. Errors are added to `faults`. `access` is
        None if the section `data` is invalid; `there`: whether the shards exist."""
        facts = DataFacts(self.run)
        if self.has_no_errors("data"):
            faults.note(check_sources, self.run, recipe, access, there=there)
        if access is not None and there:
            facts.label_sets, facts.image_counts = self._read_classes(recipe, access, faults)
            if recipe.uses_text and self.has_no_errors("text"):
                facts.tokenizer = faults.note(_tokenizer, self.run, access)
                if facts.tokenizer is not None and recipe.predicts_captions:
                    faults.note(check_ends, facts.tokenizer)
            file = recipe.labels_file or LABELS
            facts.run = faults.note(_with_validation_labels, self.run, facts.label_sets, file) or self.run
        return facts

    def access(self, faults: Faults) -> tuple[Access | None, bool]:
        """Return the access to remote servers, and whether the shards exist."""
        data = self.run.data
        if self.ranks is not None and self.has_no_errors("optim"):
            size = self.run.optim.micro_batch_size
            faults.note(check_shares, data, micro_batch_size=size, world_size=self.ranks)
        before = len(faults.found)
        faults.note(check_weights, data.datasets)
        access = faults.note(lambda: check_access(data, data.datasets).at_start())
        if access is not None:
            for kind, sources in (("datasets", data.datasets), ("validation", data.validation)):
                for name, source in sources.items():
                    faults.note(require_shards, source.path, f"data.{kind}.{name}.path", access)
        return access, len(faults.found) == before

    def _read_classes(
        self, recipe: Recipe, access: Access, faults: Faults
    ) -> tuple[dict[str, list[str]], list[int] | None]:
        """Return class names by label space, and images per class if a dataset provides them."""
        if recipe.labels_file is None:
            return {}, None
        label_sets = faults.note(self._read_labels, access, recipe.labels_file) or {}
        counts = faults.note(self._image_counts, access) if recipe.labels_file == CATEGORIES else None
        return label_sets, counts

    def _read_labels(self, access: Access, file: str) -> dict[str, list[str]]:
        label_sets = read_label_sets(self.run.data.datasets, access, file)
        if self.run.task is not None:
            self.run.task.check_classes(label_sets)
        return label_sets

    def _image_counts(self, access: Access) -> list[int] | None:
        """Return the number of images per category over all datasets, or None if no dataset provides it. Different
        categories between datasets are reported elsewhere, with their names."""
        by_source = []
        for name, source in self.run.data.datasets.items():
            categories = shard_categories(shard_folder(source.path), f"dataset '{name}': ", access)
            if categories is not None and categories.format == "lvis":
                by_source.append([category.image_count or 0 for category in categories.categories])
        counts = [sum(of_category) for of_category in zip(*by_source, strict=False)] if by_source else None
        if self.run.task is not None:
            self.run.task.check_image_counts(counts)
        return counts


def _tokenizer(run: RunConfig, access: Access) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run. Its padding token must be 0."""
    read = {name: source for name, source in run.data.datasets.items() if source.captions != "none"}
    if read and all(read_sample_count(source.path, "with_caption", access) == 0 for source in read.values()):
        raise ConfigError(
            "the recipe has a text target, and no dataset has captions",
            where=", ".join(f"data.datasets.{name}.path: {redact_text(source.path)}" for name, source in read.items()),
            why="manifest.json beside the shards counts none",
            fix="make them anew with NAME.txt beside NAME.jpg, or take a recipe without text, e.g. continue_images",
        )
    tokenizer = find_tokenizer(run.data.datasets, run.text.tokenizer, access)
    if tokenizer.pad_token_id != 0:
        raise ConfigError(
            f"the text tower pads with token 0, and the tokenizer with {tokenizer.pad_token_id}",
            where="text.tokenizer",
            fix="take a BERT-type tokenizer, or the one that `shards make` trains",
        )
    return tokenizer


def _with_validation_labels(run: RunConfig, label_sets: dict[str, list[str]], file: str) -> RunConfig:
    """Map validation datasets to the training label space with the same classes. They never add one to the model."""
    if not label_sets or not run.data.validation:
        return run
    sources = {}
    for name, source in run.data.validation.items():
        (label_set, names), *_ = [*read_label_sets({name: source}, file=file).items(), (None, None)]
        same = [key for key in label_sets if label_sets[key] == names]
        if label_set is not None and not same:
            raise ConfigError(
                f"the labels of validation dataset '{name}' are those of no training dataset",
                where=f"data.validation.{name}: {source.path}",
                fix=f"make both from one folder or manifest (`shards make … --split`), so that {file} is the same",
            )
        # The same class list under another name: the model has one head for it.
        chosen = label_set if label_set in same else (same[0] if same else source.label_set)
        sources[name] = source.model_copy(update={"label_set": chosen})
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": sources})})
