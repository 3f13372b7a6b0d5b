"""Source of an export: a valid checkpoint and its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.build import DERIVED_FIELDS, backbone_config
from m3i_scale.backbones.families import FAMILIES, TokenFamily, VisionConfig, family_of
from m3i_scale.backbones.internimage import AUTO_MAP, SOURCE_FILES, InternImageConfig
from m3i_scale.backbones.load_plan import fit_positions
from m3i_scale.checkpoint.layout import MANIFEST
from m3i_scale.checkpoint_tools.consolidate import Which, saved_weights
from m3i_scale.checkpoint_tools.paths import resolve_checkpoint
from m3i_scale.config import BackboneConfig, RunConfig, parse_section, read_yaml
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.shards import shard_folder
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import CheckpointError, ConfigError, DataError, ExportError, did_you_mean
from m3i_scale.exports.tensors import VISION
from m3i_scale.files import read_json, read_json_lines, sha256_of
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.targets.base import Target
from m3i_scale.objective.text_config import without_source
from m3i_scale.upgrade import upgrade_line, upgrade_weights


@dataclass(frozen=True)
class Source:
    """Valid checkpoint and its metadata."""

    checkpoint: Path
    run: RunConfig
    """As in the stage of the checkpoint's step; its backbone has the image size of that stage."""
    recipe: Recipe
    step: int
    meta: dict[str, Any]
    passed_over: list[tuple[Path, str]]
    """Newer checkpoints that failed verification, with the reason."""

    @property
    def run_dir(self) -> Path:
        """Return the run's output folder, two levels above its checkpoints."""
        return self.checkpoint.parent.parent

    @property
    def label_sets(self) -> dict[str, list[str]]:
        """Return class names by label set, in the order of the heads; empty if no target predicts classes."""
        sets: dict[str, list[str]] = self.meta.get("label_sets") or {}
        return sets if self.recipe.labels_file is not None else {}

    @property
    def vocab_size(self) -> int | None:
        """Return the vocabulary size of captions; None if no target uses them."""
        return self.meta.get("vocab_size") if self.recipe.uses_text else None


def find_source(path: Path) -> Source:
    """Return the latest valid checkpoint of a run folder, or the given checkpoint."""
    checkpoint, passed_over = resolve_checkpoint(path)
    try:
        file = checkpoint / "run.yaml"
        run = parse_section(RunConfig, read_yaml(file), where=str(file), stored=True)
        meta = read_json(checkpoint / "meta.json")
        step = int(meta["step"])
        text = without_source(run.text, meta.get("identity", {}).get("text"))
        run = run.model_copy(update={"backbone": _without_source(run.backbone, meta), "text": text})
        run = run.in_stage(run.stage_at(step - 1))
        if run.stages and run.stages[0].image_size is not None:  # of the current stage: the size to export
            config = run.backbone.config | {"image_size": run.stages[0].image_size}
            run = run.model_copy(update={"backbone": run.backbone.model_copy(update={"config": config})})
    except ConfigError as error:
        raise CheckpointError(
            f"the config file of the checkpoint is invalid: {error.what}",
            where=error.where,
            why=error.why,
            fix=error.fix or "use another checkpoint of the run",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the metadata of the checkpoint: {error}",
            where=str(checkpoint),
            fix="use another checkpoint of the run",
        ) from None
    return Source(checkpoint, run, parse_recipe(run.recipe), step, meta, passed_over)


def _without_source(backbone: BackboneConfig, meta: dict[str, Any]) -> BackboneConfig:
    """Return a self-contained backbone section: an export must not depend on the pretrained weights, which may have
    moved since."""
    values = meta.get("identity", {}).get("backbone")
    if backbone.from_pretrained is None or values is None:
        return backbone
    return backbone.model_copy(update={"from_pretrained": None, **stored_section(values)})


def model_files(config: VisionConfig) -> tuple[dict[str, str], tuple[Path, ...]]:
    """Return `auto_map` and source files that an export needs if `transformers` lacks the model."""
    return (AUTO_MAP, SOURCE_FILES) if isinstance(config, InternImageConfig) else ({}, ())


def portable_section(config: VisionConfig) -> dict[str, Any]:
    """Return a backbone section without paths: preset and every field that shapes the modules."""
    return {
        "preset": family_of(config).first_preset,
        "config": {key: getattr(config, key) for key in family_of(config).shape_fields},
    }


def stored_section(values: dict[str, Any]) -> dict[str, Any]:
    """Return the backbone section for a configuration that is stored in a checkpoint as a dictionary."""
    family = {family.config_class.model_type: family for family in FAMILIES}[values["model_type"]]
    fields = {key: value for key, value in values.items() if key not in DERIVED_FIELDS and not key.startswith("_")}
    section = portable_section(family.config_class(**fields))
    training = {key: value for key, value in fields.items() if key in family.training_fields}
    return {"preset": section["preset"], "config": training | section["config"]}


def target_of(source: Source, modality: str) -> Target:
    """Return the recipe's first target of a modality."""
    for target in source.recipe.targets:
        if target.modality == modality:
            return target
    raise ExportError(
        f"the recipe '{source.recipe.name}' has no {modality} target",
        why=f"its targets are {', '.join(target.name for target in source.recipe.targets)}",
        fix="use --task features",
    )


def choose_label_set(source: Source, wanted: str | None) -> str:
    """Return the label set of a classifier."""
    target_of(source, "category")
    names = list(source.label_sets)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None:
        raise ExportError(
            f"a classifier has one head, but the run has {len(names)} label sets",
            where="--label-set",
            fix=f"set --label-set to one of {', '.join(names)}",
        )
    if wanted not in names:
        raise ExportError(f"unknown label set '{wanted}'", where="--label-set", fix=did_you_mean(wanted, names))
    return wanted


def with_best_head(source: Source) -> tuple[Source, dict[str, Any] | None]:
    """Reduce a checkpoint of a sweep to its best head, and return it with the accuracy of all heads. Other checkpoints
    remain unchanged. The last evaluation at or before the checkpoint's step decides. In a tie, the first head wins."""
    task = source.run.task
    if task is None or not task.chooses_head:
        return source, None
    names = [target.name for target in source.recipe.targets]
    measured: dict[str, Any] = {}
    for record in training_records(source):
        if record.get("kind") == "evaluation" and record.get("step", 0) <= source.step:
            measured = record
    scores = {name: measured[key] for name in names if (key := f"evaluation/{name}/top_1") in measured}
    if not scores:
        raise ExportError(
            "the best head of the sweep is unknown: none has been evaluated",
            where=str(source.run_dir / "metrics.jsonl"),
            why=f"it has no evaluation up to step {source.step}",
            fix="export a later checkpoint",
        )
    best = max(scores, key=lambda name: scores[name])
    target = next(target for target in source.run.recipe["targets"] if target["name"] == best)
    decoders = {target["decoder"]: source.run.recipe["decoders"][target["decoder"]]}
    recipe = source.run.recipe | {"targets": [target], "decoders": decoders}
    run = source.run.model_copy(update={"recipe": recipe})
    facts = {"chosen": best, "step": measured["step"], "top_1": scores}
    return replace(source, run=run, recipe=parse_recipe(recipe)), facts


def training_records(source: Source) -> Iterator[dict[str, Any]]:
    """Yield the records of the run's metrics.jsonl, if it exists."""
    path = source.run_dir / "metrics.jsonl"
    return map(upgrade_line, read_json_lines(path)) if path.is_file() else iter(())


class ExportedWeights(Mapping[str, Tensor]):
    """Trained or EMA weights of a checkpoint, with position embeddings resized to the image size of its stage, as the
    standard model interpolates them in every forward pass."""

    def __init__(self, source: Source, which: Which) -> None:
        config = backbone_config(source.run.backbone)
        family = family_of(config)
        self._weights = saved_weights(source.checkpoint, which)
        self._name = None if family.positions is None else VISION + family.positions
        self._antialias = isinstance(family, TokenFamily) and family.antialias
        self._class_row = family.has_class_token
        self._places = self._class_row + (config.image_size // config.patch_size) ** 2

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[name]
        if name != self._name or value.shape[-2] == self._places:
            return value
        shape = (*value.shape[:-2], self._places, value.shape[-1])
        return fit_positions(value, shape, antialias=self._antialias, class_row=self._class_row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def source_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the text tower was trained with."""
    kept = source.run_dir / "tokenizer"  # the run's copy outlives the shards
    configured = str(kept) if kept.is_dir() else source.run.text.tokenizer_source or source.meta.get("tokenizer")
    try:
        tokenizer = find_tokenizer(source.run.data.datasets, configured)
    except ConfigError as error:
        raise ExportError(
            f"the tokenizer of the run is missing: {error.what}",
            where=error.where,
            why="the text tower is useless without it",
            fix="restore the tokenizer folder",
        ) from None
    if len(tokenizer) != source.vocab_size:
        raise ExportError(
            f"the tokenizer must have the {source.vocab_size} tokens of the text tower, got {len(tokenizer)}",
            where=str(tokenizer.name_or_path),
            fix="restore the tokenizer of the run",
        )
    return tokenizer


def describe_data(source: Source) -> list[dict[str, Any]]:
    """Return the manifest metadata of every training dataset, with a hash that identifies the dataset exactly. Paths
    are omitted, because they are useless elsewhere. A dataset with an unreadable manifest gets a note."""
    described = []
    for name, config in source.run.data.datasets.items():
        facts: dict[str, Any] = {"name": name, "weight": config.weight, "manifest_sha256": None, "samples": None}
        try:
            raw = read_file(shard_folder(config.path) / MANIFEST)
            manifest = json.loads(raw)
            shards = manifest["shards"].values()
            # Manifests of other tools may not count labels and captions.
            counted = [key for key in ("with_label", "with_caption") if all(key in shard for shard in shards)]
            facts |= {
                "manifest_sha256": hashlib.sha256(raw).hexdigest(),
                "shards": len(shards),
                **{key: sum(shard[key] for shard in shards) for key in ("samples", *counted)},
                **{key: manifest[key] for key in ("split", "source", "licenses") if key in manifest},
                "dataset": manifest.get("name", name),
            }
        except FileNotFoundError:
            facts["note"] = "no manifest beside the shards at the time of export"
        except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            facts["note"] = f"the manifest cannot be read: {type(error).__name__}"
        described.append(facts)
    return described


def evaluation_of(source: Source, weights: str, given: Path | None = None) -> tuple[dict[str, Any] | None, str | None]:
    """Read the output of `m3i-scale evaluate --output`: the given file, or evaluation.json of the run if it exists.

    Return the document, or None if it is missing. If the run's file is for another model or other weights (`student` or
    `ema`), return None and a warning. For a given file, this is an error.
    """
    path = given or source.run_dir / "evaluation.json"
    if given is None and not path.is_file():
        return None, None
    try:
        values: Any = read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"cannot read the evaluation: {error}", where=str(path), fix="create it again, or remove it"
        ) from None
    data = values.get("data") if isinstance(values, dict) else None
    named = isinstance(data, dict) and {"samples", "cluster_unit"} <= data.keys()
    if not isinstance(values, dict) or not named or not isinstance(values.get("measures"), dict):
        raise ExportError(
            "the file is not an evaluation",
            where=str(path),
            fix="create it with `m3i-scale evaluate … --json > evaluation.json`",
        )
    model = values.get("model")
    if not isinstance(model, dict) or "export" not in model:  # from a version that did not record it
        return values, None
    of = model["export"] if isinstance(model["export"], dict) else {}
    measured = upgrade_weights(of.get("weights"))
    if (of.get("checkpoint_manifest_sha256"), measured) == (sha256_of(source.checkpoint / MANIFEST), weights):
        return values, None
    theirs = f"the {measured} weights of {of.get('checkpoint')}" if of else "another model"
    if given is not None:
        raise ExportError(
            f"the evaluation must be of the {weights} weights of {source.checkpoint.name}, but it is of {theirs}",
            where=str(path),
            fix="evaluate this export, then export again with that file and --overwrite",
        )
    return None, f"{path.name} is of {theirs}: the model card has no evaluation"


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by path with `/`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
