"""Data that `one_stage.py` trains on, the model that fits them, and the datasets that exports are evaluated on."""

from __future__ import annotations

import hashlib
import json
import statistics
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _common import scene_shards
from transformers import AutoTokenizer

from m3i_scale.data.batch import CAPTION_MULTIPLE
from m3i_scale.errors import DataError
from m3i_scale.shards.folder import FACTS

TOKENS = 24
"""Maximum length of a caption."""
SAMPLED_CAPTIONS = 2048


@dataclass(frozen=True)
class Setting:
    """Model, batch and engine of all trainings on a dataset."""

    width: int = 96
    layers: int = 4
    heads: int = 3
    image: int = 48
    patch: int = 8
    batch: int = 64
    deepspeed: str = "zero1_bf16"
    budget: float = 6.0
    """Default TFLOP of one training."""
    points: int = 3
    """Default number of evaluations along the first seed's training."""


EMOJI, PHOTOS = Setting(), Setting(image=40, batch=128, deepspeed="zero1_cpu_fp32", budget=6.0, points=1)
MIXTURE = {"imagenette": 2, "flickr8k": 2, "tiny": 1}
"""Sampling weights of the photos: with labels, with captions, with neither."""


@dataclass(frozen=True)
class Probe:
    """Datasets and metrics of one evaluation."""

    data: Path
    measures: tuple[str, ...]
    train_data: Path | None = None
    exclude_groups: tuple[str, ...] = ()
    prefix: str = ""
    """Prefix of the metric names."""

    def options(self) -> dict[str, Any]:
        """Return the arguments of `evaluate`."""
        options = asdict(self) | {"data": str(self.data), "train_data": self.train_data and str(self.train_data)}
        return {name: value for name, value in options.items() if name != "prefix"}


@dataclass(frozen=True)
class DataSet:
    """Training data of all recipes, and the evaluations of their exports."""

    folder: Path
    datasets: dict[str, dict[str, Any]]
    """`data.datasets` of the config file."""
    classes: dict[str, list[str]]
    """Class names by label set."""
    streams: int
    samples: int
    tokens: int
    """Tokens of a caption, as batches are padded."""
    sha256: str
    """SHA-256 of all manifests, labels and the tokenizer."""
    probes: list[Probe]
    setting: Setting = field(default_factory=Setting)
    fine_tuned: bool = True
    """Whether exports are also fine-tuned and compared."""


def open_data(folder: Path) -> DataSet:
    """A folder with `train` and `val`, as `m3i-scale shards make` writes it.

    Raises:
        DataError: no such folder, or one without labels or captions.
    """
    if (folder / "manifest.json").is_file():
        raise DataError("this is one split", where=str(folder), fix=f"give its parent: --data {folder.parent}")
    for split in ("train", "val"):
        if not (folder / split / "manifest.json").is_file():
            raise DataError(
                f"no {split} shards with a manifest.json",
                where=str(folder / split),
                fix="m3i-scale shards make … --output /data/shards --split train=0.85,val=0.15",
            )
    manifest = json.loads((folder / "train" / "manifest.json").read_text(encoding="utf-8"))
    shards = list(manifest["shards"].values())
    total = {fact: sum(shard.get(fact, 0) for shard in shards) for fact in FACTS}
    for fact in ("with_label", "with_caption"):
        if not total[fact]:
            raise DataError(
                f"no training sample is {fact.replace('_', ' ')}",
                where=str(folder / "train"),
                why="the comparison is between recipes that learn from labels, from captions and from neither",
            )
    streams = next(count for count in (8, 4, 2, 1) if count <= len(shards))
    classes = _class_names(folder / "train")
    # the picture of a flag does not indicate its group
    without = ("flags",) if manifest.get("source") == "emoji" else ()
    style = folder / "style"  # texts are looked up among a held-out style of seen concepts if there is one
    probes = [
        Probe(folder / "val", ("linear", "knn", "dense", "zero_shot"), folder / "train", without),
        Probe(style if style.is_dir() else folder / "val", ("retrieval",)),
    ]
    tokens = padded_tokens(folder, EMOJI.batch)
    datasets = {"main": {"path": str(folder / "train")}}
    digest = _fingerprint([folder])
    return DataSet(folder, datasets, {"main": classes}, streams, total["samples"], tokens, digest, probes, EMOJI)


def open_photos(folder: Path) -> DataSet:
    """A folder of `examples/photos.py`. Segmentation is measured on the scenes of `examples/scenes.py`.

    Raises:
        DataError: no such folder, or the scenes cannot be made.
    """
    splits = ("imagenette/train", "imagenette/val", "flickr8k/train", "flickr8k/test")
    splits += ("tiny/train", "tiny/transfer", "tiny/val")
    for split in splits:
        if not (folder / split / "manifest.json").is_file():
            raise DataError(
                f"no shards of '{split}'",
                where=str(folder / split),
                fix=f"python examples/photos.py … --output {folder}",
            )
    scenes = scene_shards("masks")
    probes = [
        Probe(folder / "imagenette/val", ("linear", "knn", "few_shot"), folder / "imagenette/train"),
        Probe(folder / "tiny/val", ("linear", "few_shot"), folder / "tiny/transfer", prefix="transfer_"),
        Probe(scenes / "validation", ("dense",), scenes / "training"),
        Probe(folder / "flickr8k/test", ("retrieval",)),
    ]
    datasets: dict[str, dict[str, Any]] = {
        name: {"path": str(folder / name / "train"), "weight": weight} for name, weight in MIXTURE.items()
    }
    datasets["flickr8k"]["captions"] = "lines"
    datasets["tiny"]["labels"] = False
    manifests = [json.loads((folder / name / "train/manifest.json").read_text(encoding="utf-8")) for name in MIXTURE]
    return DataSet(
        folder,
        datasets,
        {"imagenette": _class_names(folder / "imagenette/train")},
        8,
        sum(shard["samples"] for manifest in manifests for shard in manifest["shards"].values()),
        padded_tokens(folder / "flickr8k", PHOTOS.batch * MIXTURE["flickr8k"] // sum(MIXTURE.values())),
        _fingerprint([*(folder / name for name in MIXTURE), scenes]),
        probes,
        PHOTOS,
        fine_tuned=False,
    )


def _class_names(shards: Path) -> list[str]:
    names: list[str] = json.loads((shards / "labels.json").read_text(encoding="utf-8"))
    return names


def padded_tokens(folder: Path, batch: int) -> int:
    """Return the mean length of a batch of captions, in tokens, with padding as in training."""
    captions: list[str] = []
    for shard in sorted((folder / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                text = tar.extractfile(member) if member.isfile() and member.name.endswith(".txt") else None
                captions += text.read().decode("utf-8").splitlines() if text is not None else []
        if len(captions) >= SAMPLED_CAPTIONS:
            break
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    lengths = [min(len(ids), TOKENS) for ids in tokenizer(captions)["input_ids"]]
    longest = [max(lengths[start : start + batch]) for start in range(0, len(lengths), batch)]
    return round(statistics.fmean(min(-(-length // CAPTION_MULTIPLE) * CAPTION_MULTIPLE, TOKENS) for length in longest))


def _fingerprint(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for pattern in ("*/manifest.json", "*/labels.json", "tokenizer/tokenizer.json"):
            for path in sorted(folder.glob(pattern)):
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
