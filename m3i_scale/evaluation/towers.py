"""Joint embedding space of images and texts, rebuilt from an export, with zero-shot classification and retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from m3i_scale.config import RunConfig, parse_section
from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.evaluation.features import no_pooling_layer, unit_rows
from m3i_scale.files import read_json
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.text_tower import TEXT_FAMILIES
from m3i_scale.output import quiet_loading
from m3i_scale.upgrade import upgrade_recipe

TEMPLATES = ("{}", "a picture of {}", "an image showing {}")
"""Default prompts; the embeddings of a class's prompts are averaged."""

TextEncoder = Callable[[list[str]], NDArray[np.float32]]
"""Captions → unit vectors (B, E)."""
DEPTHS = (1, 5, 10)
_CHUNK = 1_024
ScalarT = TypeVar("ScalarT", bound=np.generic)
_TEXT_BATCH = 256


@dataclass
class Towers:
    """Image and text encoders of an export, in fp32."""

    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    target: str
    """Name of the recipe's (first) text target."""
    max_tokens: int
    device: torch.device

    def images(self, images_BCHW: Tensor) -> Tensor:
        """Encode uint8 (B, 3, H, W) at the model's input size as unit vectors (B, E)."""
        return self.objective.embed_images(images_BCHW.to(self.device), self.target)

    def texts(self, captions: list[str]) -> NDArray[np.float32]:
        """Encode captions as unit vectors (B, E)."""
        parts = []
        for start in range(0, len(captions), _TEXT_BATCH):
            batch = captions[start : start + _TEXT_BATCH]
            tokens = self.tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
                return_attention_mask=True,
            ).to(self.device)
            embedded = self.objective.embed_text(tokens["input_ids"], tokens["attention_mask"].bool())
            parts.append(np.asarray(embedded.cpu().numpy(), dtype=np.float32))
        return np.concatenate(parts)


def why_no_towers(folder: Path) -> str | None:
    """Return why a model folder has no joint space; None if it has one."""
    absent = [name for name in ("text/model.safetensors", "heads/objective.json") if not _has(folder, name)]
    return f"no text tower with projection head: the folder has no {' and no '.join(absent)}" if absent else None


def has_head(folder: Path, kind: str) -> bool:
    """Return whether a folder is a feature export with the head of a target of this kind (`category`,
    `segmentation`)."""
    path = folder / "heads" / "objective.json"
    if not path.is_file():
        return False
    values = _read(path)
    try:
        targets = upgrade_recipe(values["run"]["recipe"])["targets"]
        return bool(values["label_sets"]) and kind in {target["kind"] for target in targets}
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the description of the heads has invalid targets: {error}",
            where=str(path),
            fix="export the checkpoint again",
        ) from None


def load_objective(folder: Path, device: torch.device) -> tuple[Objective, RunConfig, dict[str, list[str]]]:
    """Load the training modules of a feature export, with their weights. Return the modules, their config, and the
    class names by label set."""
    values = _read(folder / "heads" / "objective.json")
    run = parse_section(RunConfig, values.get("run"), where=str(folder / "heads" / "objective.json"), stored=True)
    try:
        with init_empty_weights(include_buffers=False):
            objective = build_objective(run, values["label_sets"], values["vocab_size"], target_encoders=False)
        weights = dict(_weights(folder))
        missing, unexpected = objective.load_state_dict(weights, strict=False, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ExportError(
            f"the heads do not fit the model: {error}", where=str(folder / "heads"), fix="export the checkpoint again"
        ) from None
    if missing or unexpected:
        raise ExportError(
            f"the heads do not fit the model: {len(missing)} parameters are missing and {len(unexpected)} are "
            f"unknown, e.g. {[*missing, *unexpected][0]}",
            where=str(folder),
            fix="export the checkpoint again",
        )
    return objective.to(device).eval(), run, values["label_sets"]


def towers_of(objective: Objective, run: RunConfig, folder: Path, device: torch.device) -> Towers:
    """Return image and text encoder of an export with a text target."""
    target = next(item.name for item in objective.recipe.targets if item.modality == "text")
    tokenizer = AutoTokenizer.from_pretrained(folder / "text", local_files_only=True, trust_remote_code=False)
    return Towers(objective, tokenizer, target, run.text.max_tokens, device)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"cannot read the description of the heads: {error}", where=str(path), fix="export the checkpoint again"
        ) from None
    if not isinstance(values, dict):
        raise ExportError(
            "the description of the heads must be a JSON object", where=str(path), fix="export the checkpoint again"
        )
    return values


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield weights by full name, loaded with standard classes: names in the files may be from older versions."""
    for place, prefix in ((folder, "student.model."), (folder / "text", "text.model.")):
        if not (place / "config.json").is_file():  # a recipe without text
            continue
        with quiet_loading():
            of_text = read_json(place / "config.json") if prefix == "text.model." else {}
            loader = TEXT_FAMILIES[of_text["model_type"]].model_class if of_text else AutoModel
            model, info = loader.from_pretrained(
                place,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **no_pooling_layer(place),
            )
        faulty = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if faulty:
            raise ExportError(
                f"{len(faulty)} tensors do not fit the model, e.g. {faulty[0]}",
                where=str(place),
                fix="export the checkpoint again",
            )
        for name, tensor in model.state_dict().items():
            yield prefix + name, tensor
    for path in sorted((folder / "heads").glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            yield name, tensor.float()


def _has(folder: Path, name: str) -> bool:
    """Return whether a weight file exists, as a single file or sharded."""
    path = folder / name
    return path.is_file() or path.with_name(path.name + ".index.json").is_file()


def prompts_of(name: str, templates: tuple[str, ...]) -> list[str]:
    """Return prompts for a class, with its name in plain words."""
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"a prompt template must have the placeholder {{}}, got '{template}'",
                fix="write {} where the class name belongs, e.g. 'a photo of a {}'",
            )
    plain = " ".join(name.replace("_", " ").replace("-", " ").split())
    return [template.replace("{}", plain) for template in templates]


def class_embeddings(
    classes: list[str], encode: TextEncoder, templates: tuple[str, ...] = TEMPLATES
) -> NDArray[np.float32]:
    """Return one unit vector per class (K, E): the normalized mean of its prompts' embeddings."""
    prompts = [prompt for name in classes for prompt in prompts_of(name, templates)]
    return unit_rows(encode(prompts).reshape(len(classes), len(templates), -1).mean(axis=1))


def zero_shot_predict(images_NE: NDArray[np.float32], classes_KE: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the class with the highest cosine similarity: (N)."""
    return np.asarray((unit_rows(images_NE) @ classes_KE.T).argmax(axis=1), dtype=np.int64)


@dataclass(frozen=True)
class Retrieval:
    """Ranks (0 is best) of the first correct item, with chance levels."""

    image_to_text: NDArray[np.int64]
    """For every image, rank of its caption among the distinct captions."""
    text_to_image: NDArray[np.int64]
    """For every distinct caption, best rank of its images among all images."""
    caption_of: NDArray[np.int64]
    """Index of every image's caption."""

    def chance(self, direction: str, depth: int) -> float:
        """Return the expected recall at `depth` for a random ranking."""
        images, distinct = len(self.caption_of), len(self.text_to_image)
        if direction == "image_to_text":
            return min(depth / distinct, 1.0)
        depth = min(depth, images)
        misses = [comb(images - int(count), depth) / comb(images, depth) for count in np.bincount(self.caption_of)]
        return float(1 - np.mean(misses))


def distinct_captions(captions: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct captions, and the index of each sample's caption."""
    distinct, number = np.unique(np.asarray(captions, dtype=object), return_inverse=True)
    return list(distinct), number.astype(np.int64)


def rank(images_NE: NDArray[np.float32], texts_UE: NDArray[np.float32], caption_of_N: NDArray[np.int64]) -> Retrieval:
    """Return ranks in both directions. Ties count against the model, so collapsed features get the worst rank.
    `texts_UE` has the embeddings of the distinct captions."""
    captions_U = np.arange(len(texts_UE))
    image_to_text = [
        _ranks(block @ texts_UE.T, own[:, None] == captions_U)
        for block, own in zip(_chunks(images_NE), _chunks(caption_of_N), strict=True)
    ]
    text_to_image = [
        _ranks(block @ images_NE.T, own[:, None] == caption_of_N)
        for block, own in zip(_chunks(texts_UE), _chunks(captions_U), strict=True)
    ]
    return Retrieval(np.concatenate(image_to_text), np.concatenate(text_to_image), caption_of_N)


def _ranks(scores_QC: NDArray[np.float32], right_QC: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of wrong candidates that score at least as high as the best correct one."""
    best_Q1 = np.where(right_QC, scores_QC, -np.inf).max(axis=1, keepdims=True)
    # equal embeddings may differ in the last bits of a matrix product; such a difference is a tie
    # and a score that is NaN counts as at least as high
    return np.asarray((~(scores_QC < best_Q1 - 1e-6) & ~right_QC).sum(axis=1), dtype=np.int64)


def _chunks(rows: NDArray[ScalarT]) -> list[NDArray[ScalarT]]:
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
