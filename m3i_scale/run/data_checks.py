"""Validation of a config against its data, properties read from the data (class lists, tokenizer), and data streams.
Independent of the training engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import DatasetConfig, RunConfig, TextConfig
from m3i_scale.data.categories import shard_categories
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.mixing import check_shares, check_weights
from m3i_scale.data.parts import PartWorkers
from m3i_scale.data.remote.access import Access, check_access
from m3i_scale.data.shards import (
    CATEGORIES,
    LABELS,
    MASK_LABELS,
    read_label_sets,
    read_sample_count,
    require_shards,
    shard_folder,
)
from m3i_scale.data.tokenizer import check_ends, find_tokenizer
from m3i_scale.errors import ConfigError, ErrorCollector
from m3i_scale.host.output_dir import QUARANTINE, QUARANTINE_VALIDATION, check_output_dir
from m3i_scale.objective.build import build_on_meta
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.text_config import with_token_ids
from m3i_scale.text import redact_text, without_secrets

_NAMED = {
    MASK_LABELS: ("masks", "put it, a list of class names in the order of the masks' numbers, next to the shards"),
    CATEGORIES: ("boxes", "make the shards by `m3i-scale shards make coco`, which writes it"),
}
"""Annotations that use the classes in a file, and how to create the file."""


@dataclass
class DataFacts:
    """Properties of a run that are read from its data."""

    run: RunConfig
    """Config with validation datasets mapped to the training label spaces."""
    label_sets: dict[str, list[str]] = field(default_factory=dict)
    image_counts: list[int] | None = None
    """Number of images per category, if a dataset provides it."""
    tokenizer: PreTrainedTokenizerBase | None = None
    unpacked: frozenset[str] = frozenset()
    """Paths of datasets that are not in shards yet."""
    sample_counts: dict[str, int] = field(default_factory=dict)
    """Number of images of these datasets, by path."""


@dataclass
class RunWithData:
    """A run after its recipe, backbone and data were validated together."""

    run: RunConfig
    recipe: Recipe
    label_sets: dict[str, list[str]]
    tokenizer: PreTrainedTokenizerBase | None
    image_size: int
    """Image size of the first stage in pixels."""

    @property
    def vocab_size(self) -> int | None:
        return len(self.tokenizer) if self.tokenizer is not None else None


def check_with_data(run: RunConfig, world_size: int) -> RunWithData:
    """Validate a config against its data and the number of ranks, independent of the training engine."""
    if len(run.stages) > 1:
        raise ConfigError(
            f"a custom loop trains one stage at a time, but the run has {len(run.stages)}",
            where="stages",
            fix="use `run.in_stage(0)`, then `run.in_stage(1)` …, and start each stream from the state of the stream "
            "before",
        )
    run, errors = run.in_stage(0), ErrorCollector()
    errors.collect(check_output_dir, run.output_dir)
    recipe = errors.collect(parse_recipe, run.recipe)
    access = find_shards(run, errors, world_size)
    model = errors.collect(backbone_config, run.backbone)
    facts = DataFacts(run)
    if recipe is not None:
        errors.collect(check_text, run, recipe)
        errors.collect(check_batch, run, recipe, world_size)
        facts = read_facts(run, recipe, access, errors)
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


def check_batch(run: RunConfig, recipe: Recipe, world_size: int) -> None:
    """Validate that the micro-batch is large enough for contrastive losses."""
    # A mix requires the same number of samples on every rank when the modules are built.
    if recipe.mix is None and recipe.compares_samples and run.optim.compared_samples(world_size) < 2:
        raise ConfigError(
            f"{recipe.compares_samples}, which needs at least two samples per step",
            where=f"optim.micro_batch_size: {run.optim.micro_batch_size}, on {world_size} rank",
            why="the loss of a single sample is constant",
            fix="set optim.micro_batch_size=2 or more, or use more ranks",
        )


def check_text(run: RunConfig, recipe: Recipe) -> None:
    """Validate that the `text` section is used."""
    if not recipe.uses_text and run.text != TextConfig():  # a resolved config includes the defaults of all sections
        raise ConfigError("`text` has no effect: the recipe has no text target", where="text", fix="leave it out")
    for key in ("config", "model_type", "from_pretrained"):
        if getattr(run.text, key) and not recipe.uses_text_tower:
            raise ConfigError(
                f"`text.{key}` has no effect: the recipe predicts captions token by token, without a text encoder",
                where=f"text.{key}",
                fix="leave it out" + ("; recipe.decoders sets the size of the decoder" if key == "config" else ""),
            )


def find_shards(
    run: RunConfig, errors: ErrorCollector, ranks: int | None, unpacked: frozenset[str] = frozenset()
) -> Access | None:
    """Return the access to remote servers, or None unless the shards of all datasets exist. Without `ranks`, the shares
    of the datasets in a micro-batch are not checked. `unpacked` are paths without shards."""
    data, size = run.data, run.optim.micro_batch_size
    if ranks is not None:
        errors.collect(check_shares, data, micro_batch_size=size, world_size=ranks)
    before = len(errors.errors)
    errors.collect(check_weights, data.datasets)
    access = errors.collect(lambda: check_access(data, data.datasets).at_start())
    if access is not None:
        for kind, sources in (("datasets", data.datasets), ("validation", data.validation)):
            for name, source in sources.items():
                if source.path not in unpacked:
                    errors.collect(require_shards, source.path, f"data.{kind}.{name}.path", access)
    return access if len(errors.errors) == before and not unpacked else None


def read_facts(
    run: RunConfig, recipe: Recipe, access: Access | None, errors: ErrorCollector, *, text: bool = True
) -> DataFacts:
    """Check the datasets against the recipe and read their properties. `access` is the result of `find_shards`. If the
    `text` section is not valid (`text`), the tokenizer is not read."""
    facts = DataFacts(run)
    errors.collect(_check_sources, run, recipe, access)
    if access is None:
        return facts
    file = recipe.labels_file
    if file is not None:
        facts.label_sets = errors.collect(_read_classes, run, access, file) or {}
    if file == CATEGORIES:
        facts.image_counts = errors.collect(_image_counts, run, access)
    if recipe.uses_text and text:
        facts.tokenizer = errors.collect(_tokenizer, run, access)
        if facts.tokenizer is not None and recipe.predicts_captions:
            errors.collect(check_ends, facts.tokenizer)
        if facts.tokenizer is not None and recipe.uses_text_tower:
            section = errors.collect(with_token_ids, run.text, facts.tokenizer) or run.text
            run = run.model_copy(update={"text": section})
    facts.run = errors.collect(with_validation_labels, run, facts.label_sets, file or LABELS) or run
    return facts


def _check_sources(run: RunConfig, recipe: Recipe, access: Access | None) -> None:
    """Validate that dataset settings have an effect, and that every target has a dataset. Without `access`, files next
    to the shards are not checked."""
    sources, file = run.data.datasets, recipe.labels_file
    for name, source in sources.items():
        where = f"data.datasets.{name}"
        if source.captions != "one" and not recipe.uses_text:
            raise ConfigError(
                f"`captions: {source.captions}` has no effect: the recipe has no text target",
                where=where,
                fix="leave it out",
            )
        if not source.labels and not recipe.uses_categories:
            raise ConfigError(
                "`labels: false` has no effect: the recipe has no category target", where=where, fix="leave it out"
            )
        if source.label_set is not None and file is None:
            raise ConfigError(
                "`label_set` has no effect: the recipe predicts no classes", where=where, fix="leave it out"
            )
        setting = "`labels: false`" if not source.labels else None if source.label_set is None else "`label_set`"
        read = {name: source.model_copy(update={"labels": True})}
        if setting and access is not None and not read_label_sets(read, access, file or LABELS):
            raise ConfigError(
                f"{setting} has no effect: the dataset has no {file}",
                where=f"{where}: {without_secrets(source.path)}",
                fix=f"leave it out, or put {file}, a list of class names, next to the shards",
            )
    if recipe.reads != "labels" and file is not None:
        for kind, named in (("datasets", sources), ("validation", run.data.validation)):
            for name, source in named.items():
                _check_class_names(source, f"data.{kind}.{name}", access, file)
    if recipe.uses_text and sources and all(source.captions == "none" for source in sources.values()):
        raise ConfigError(
            "the recipe has a text target, but every dataset has `captions: none`",
            where="data.datasets",
            fix="read the captions of at least one dataset, or use a recipe without a text target",
        )
    for name, source in run.data.validation.items():
        idle = [key for key in ("epochs", "augment") if getattr(source, key) is not None]
        idle += ["weight, as a schedule"] if isinstance(source.weight, list) else []
        if idle:
            raise ConfigError(
                f"{idle[0]} has no effect: the same validation batches are read every time, without augmentation",
                where=f"data.validation.{name}",
                fix=f"leave it out of data.validation.{name}",
            )


def _check_class_names(source: DatasetConfig, where: str, access: Access | None, file: str) -> None:
    """Validate that a file next to the shards names the classes of the masks or boxes."""
    what, fix = _NAMED[file]
    if not source.labels:
        raise ConfigError(
            f"{what} need {file}, but `labels: false` disables it", where=where, fix="leave out `labels: false`"
        )
    if access is None:
        return
    if not read_label_sets({"source": source}, access, file):
        raise ConfigError(
            f"the dataset has no {file} with the classes of its {what}",
            where=f"{where}: {without_secrets(source.path)}",
            fix=fix,
        )
    if file == CATEGORIES:
        shard_categories(shard_folder(source.path), f"{where}: ", access)


def _read_classes(run: RunConfig, access: Access, file: str) -> dict[str, list[str]]:
    label_sets = read_label_sets(run.data.datasets, access, file)
    if run.task is not None:
        run.task.check_classes(label_sets)
    return label_sets


def _image_counts(run: RunConfig, access: Access) -> list[int] | None:
    """Return the number of images per category over all datasets, or None if no dataset provides it. Different
    categories between datasets are reported elsewhere, with their names."""
    by_source = []
    for name, source in run.data.datasets.items():
        categories = shard_categories(shard_folder(source.path), f"dataset '{name}': ", access)
        if categories is not None and categories.format == "lvis":
            by_source.append([category.image_count or 0 for category in categories.categories])
    counts = [sum(of_category) for of_category in zip(*by_source, strict=False)] if by_source else None
    if run.task is not None:
        run.task.check_image_counts(counts)
    return counts


def no_captions(datasets: dict[str, DatasetConfig], why: str) -> ConfigError:
    """Return the error for a recipe with a text target on datasets without captions."""
    return ConfigError(
        "the recipe has a text target, and no dataset has captions",
        where=", ".join(f"data.datasets.{name}.path: {redact_text(source.path)}" for name, source in datasets.items()),
        why=why,
        fix="write captions to NAME.txt next to NAME.jpg (and make existing shards again), or use a recipe without "
        "text: m3i_no_text with class labels, sim or mae with images only",
    )


def _tokenizer(run: RunConfig, access: Access) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run."""
    read = {name: source for name, source in run.data.datasets.items() if source.captions != "none"}
    if read and all(read_sample_count(source.path, "with_caption", access) == 0 for source in read.values()):
        raise no_captions(read, "manifest.json next to the shards counts none")
    return find_tokenizer(run.data.datasets, run.text.tokenizer_source, access)


def with_validation_labels(
    run: RunConfig, label_sets: dict[str, list[str]], file: str, unpacked: Mapping[str, list[str]] | None = None
) -> RunConfig:
    """Map validation datasets to the training label space with the same classes. They never add one to the model. For
    `unpacked`, see `read_label_sets`."""
    if not label_sets or not run.data.validation:
        return run
    sources = {}
    for name, source in run.data.validation.items():
        (label_set, names), *_ = [*read_label_sets({name: source}, file=file, unpacked=unpacked).items(), (None, None)]
        same = [key for key in label_sets if label_sets[key] == names]
        if label_set is not None and not same:
            raise ConfigError(
                f"the class labels of validation dataset '{name}' are not those of a training dataset",
                where=f"data.validation.{name}: {source.path}",
                fix=f"make both with one command (`shards make … --split`), so that {file} is the same",
            )
        # The same class list under another name: the model has one head for it.
        chosen = label_set if label_set in same else (same[0] if same else source.label_set)
        sources[name] = source.model_copy(update={"label_set": chosen})
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": sources})})
