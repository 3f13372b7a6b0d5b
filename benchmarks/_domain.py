"""The two sets of `domain.py`, and the trainings that it compares: a start, and what goes on from it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import say
from _one_stage import Entry, optim_values, run_values
from _one_stage_data import EMOJI, DataSet, open_data
from _trainings import Training, tool
from PIL import Image, ImageFilter, ImageOps

from m3i_scale.errors import DataError
from m3i_scale.shards.encode_image import to_png
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

NATURE = ("animals-nature", "food-drink")
"""Groups of the domain."""
NO_PICTURES = ("flags",)
"""Groups of neither set: what a flag shows says nothing about its group."""
NOISE, BLUR = 24.0, 0.8
"""Of a scan: deviation of the noise, of 255, and of the blur, in pixels."""
FIGURES = {"knn": "knn k=20", "linear": "linear accuracy", "dense": "dense mean_iou"}
"""Measures of frozen features, and the figure of each. Texts are left out: the text tower starts anew, whatever becomes
of the backbone."""
LR, LAYER_DECAY = 1e-3, 0.75
"""What goes on has the rate of the start, and the decay by layer of `continue_m3i`."""
SPLITS = {"train": ("train", "style"), "val": ("val", "style_val")}
"""Of the emoji set, for each split here: all four styles."""
Sample = dict[str, bytes]
"""Members of a shard by their ending."""
Pictures = tuple[Image.Image, Image.Image]
"""An image, and its mask."""


@dataclass(frozen=True)
class Sets:
    """General pictures, which the start has learnt from, and those of a domain, which it has never seen."""

    general: DataSet
    domain: DataSet


def open_sets(emoji: Path, beside: Path) -> Sets:
    """Return both sets, made in `beside` out of the emoji set where they are missing.

    General: drawings in color of people, places, objects and the like, labelled by group. Domain: animals, plants and
    food as a scanner would have them, gray, inverted, blurred and noisy, labelled by kind. Nothing of the domain needs
    color, and most of its shapes are its own: a backbone that adapts to it has reason to forget.

    Raises:
        DataError: the set has no pictures of one of the two.
    """
    made_of = open_data(emoji).sha256.encode() + Path(__file__).read_bytes()
    place = beside / hashlib.sha256(made_of).hexdigest()[:12]
    general = _made(emoji, place / "general", "group", lambda group: group not in (*NATURE, *NO_PICTURES), _as_it_is)
    domain = _made(emoji, place / "domain", "subgroup", lambda group: group in NATURE, _scan)
    return Sets(open_data(general), open_data(domain))


def _made(
    emoji: Path, folder: Path, kind: str, belongs: Callable[[str], bool], seen: Callable[[str, Sample], Pictures]
) -> Path:
    """Return shards of the groups that belong there, labeled by `kind`, with pictures as `seen` has them."""
    if folder.exists():
        return folder
    say(f"making {folder}")
    found = {
        (split, key): sample
        for split, sources in SPLITS.items()
        for source in sources
        for key, sample in _samples(emoji / source)
        if belongs(_facts(sample)["group"])
    }
    if {split for split, _ in found} != set(SPLITS):
        raise DataError("the emoji set has no picture of this one in train or in val", where=f"{emoji}: {folder.name}")
    names = sorted({str(_facts(sample)[kind]) for sample in found.values()})
    records = []
    for (split, key), sample in found.items():
        facts, (image, mask) = _facts(sample), seen(key, sample)
        label = names.index(str(facts[kind]))
        records.append(
            Record(
                key,
                to_png(image),
                caption=sample["txt"].decode("utf-8"),
                label=label,
                meta=facts,
                split=split,
                mask=_png(mask.point([0] + [label + 1] * 255)),
            )
        )
    source = ListedInput(records, names, mask_labels=["ground", *names], source=f"emoji, {folder.name}")
    make_shards(source, folder, name=folder.name, options=ShardOptions(samples_per_shard=160))
    return folder


def _samples(folder: Path) -> Iterator[tuple[str, Sample]]:
    """Yield (key, members) of all samples in the shards of a folder."""
    for shard in sorted(folder.glob("*.tar")):
        samples: dict[str, Sample] = defaultdict(dict)
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                stream = tar.extractfile(member)
                if stream is not None:
                    samples[key][ending] = stream.read()
        yield from samples.items()


def _facts(sample: Sample) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(sample["json"])
    return facts


def _as_it_is(key: str, sample: Sample) -> Pictures:
    return Image.open(io.BytesIO(sample["png"])), Image.open(io.BytesIO(sample["mask.png"]))


def _scan(key: str, sample: Sample) -> Pictures:
    """Return it gray, inverted, blurred and noisy, at the size at which it is trained; its key draws the noise."""
    image, mask = _as_it_is(key, sample)
    gray = ImageOps.invert(image.convert("L").resize((EMOJI.image, EMOJI.image))).filter(ImageFilter.GaussianBlur(BLUR))
    noise = np.random.default_rng(zlib.crc32(key.encode())).normal(0, NOISE, (EMOJI.image, EMOJI.image))
    scan = Image.fromarray((np.asarray(gray) + noise).clip(0, 255).astype(np.uint8))
    return scan, mask.resize((EMOJI.image, EMOJI.image), Image.Resampling.NEAREST)


def _png(mask: Image.Image) -> bytes:
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Start(Training):
    """Trains `m3i` on the general set from random weights, and exports it."""

    code = (*Training.code, "benchmarks/_one_stage.py", "benchmarks/_domain.py")
    sets: Sets
    steps: int

    def values(self, folder: Path) -> dict[str, Any]:
        """See `Training`."""
        values = run_values(Entry("start", "m3i"), self.sets.general, self.seed, folder)
        return values | {"optim": optim_values(self.steps, EMOJI.batch), "checkpoint": _checkpoint(self.steps)}

    def depends(self) -> tuple[dict[str, Any], list[Any]]:
        """See `Training`."""
        values = self.values(Path())
        values["data"]["datasets"]["main"]["path"] = self.sets.general.sha256
        return values, []

    @property
    def export(self) -> Path:
        """Return the folder of the trained backbone."""
        return self.folder / "export"

    def measured(self, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Export it; it is measured beside what goes on from it."""
        tool(
            ["export", str(folder / "run"), "--output", str(folder / "export"), "--overwrite"],
            folder / "export.log",
            environment,
        )
        return {"steps": self.steps}


@dataclass(frozen=True)
class GoneOn(Start):
    """Goes on from a start by `continue_m3i` on the domain, with the anchor or without, and is compared with it."""

    start: Start
    anchored: bool

    def values(self, folder: Path) -> dict[str, Any]:
        """See `Training`. Without the anchor all else stays as it is."""
        values = run_values(Entry(self.name, "continue_m3i"), self.sets.domain, self.seed, folder)
        recipe = values["recipe"]
        if not self.anchored:
            recipe["targets"] = [target for target in recipe["targets"] if target["kind"] != "anchor"]
            del recipe["teachers"], recipe["decoders"]["patches"]
        values["backbone"]["from_pretrained"] = str(self.start.export)
        optim = optim_values(self.steps, EMOJI.batch) | {"lr": LR, "layer_decay": LAYER_DECAY}
        return values | {"optim": optim, "checkpoint": _checkpoint(self.steps)}

    def depends(self) -> tuple[dict[str, Any], list[Any]]:
        """See `Training`."""
        values = self.values(Path())
        values["data"]["datasets"]["main"]["path"] = self.sets.domain.sha256
        values["backbone"]["from_pretrained"] = self.start.key()
        return values, [self.sets.general.sha256]

    def measured(self, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Return figures of the start and of this, by set and measure."""
        super().measured(folder, environment)
        compared = ["compare", str(self.start.export), str(folder / "export"), "--data", str(self.sets.domain.folder)]
        compared += ["--general", str(self.sets.general.folder)]
        compared += [part for name in FIGURES for part in ("--measure", name)]
        sets = tool(compared, folder / "compare.log", environment)["sets"]
        found = {
            name: {
                measure: {side: sets[given]["measures"][label][side]["value"] for side in ("before", "after")}
                for measure, label in FIGURES.items()
            }
            for name, given in (("domain", "data"), ("general", "general"))
        }
        for name, figures in found.items():
            self.say(
                ", ".join(f"{name} {key} {one['before']:.3f} → {one['after']:.3f}" for key, one in figures.items())
            )
        return {"steps": self.steps, "sets": found}


def _checkpoint(steps: int) -> dict[str, Any]:
    return {"every_steps": steps, "keep_latest": 1}
