"""`shards preview`: an HTML page with random samples."""

from __future__ import annotations

import base64
import io
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from m3i_scale.data.images import on_white, orientation, upright, upright_size
from m3i_scale.data.reader import BadSampleError, readable_members
from m3i_scale.data.samples import check_caption_size, decoding, open_image, read_label
from m3i_scale.data.shards import local_shards, read_labels
from m3i_scale.data.tar import RawSample, read_shard
from m3i_scale.defaults import MAX_CAPTION_BYTES, MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError
from m3i_scale.shards.existing_shards import Advance, read_shards
from m3i_scale.shards.write import atomic_folder
from m3i_scale.text import printable


@dataclass(frozen=True)
class Card:
    """One sample of the page."""

    shard: str
    key: str
    caption: str | None
    label: str | None
    size: tuple[int, int] | None
    """Width and height of the image in pixels."""
    fault: str | None
    """Reason why there is no picture."""
    picture: bytes
    """A small PNG, re-encoded so that no bytes of the shard get into the page."""


def preview(
    source: str,
    output: Path,
    *,
    count: int = 24,
    seed: int = 0,
    side: int = 160,
    max_pixels: int,
    workers: int = 1,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Write `index.html` with uniformly drawn samples of a folder, a brace pattern or one tar. The same seed draws the
    same samples; there are fewer than `count` if the dataset is smaller."""
    paths = local_shards(source)
    counts = list(read_shards(count_samples, paths, workers, advance))
    ends = list(accumulate(counts))
    if not ends[-1]:
        raise DataError("the shards hold no samples", where=source, fix="m3i-scale shards check tells why")
    chosen = sorted(random.Random(seed).sample(range(ends[-1]), min(count, ends[-1])))
    by_shard: dict[int, list[int]] = {}
    for number in chosen:
        shard = bisect_right(ends, number)
        by_shard.setdefault(shard, []).append(number - (ends[shard] - counts[shard]))
    cards = [
        card for shard, numbers in by_shard.items() for card in read_cards(paths[shard], numbers, side, max_pixels)
    ]
    with atomic_folder(output) as folder:
        (folder / "index.html").write_text(page(cards, source, ends[-1], seed), encoding="utf-8")
    return {
        "output": str(output),
        "samples": ends[-1],
        "shown": [{"shard": card.shard, "key": card.key, "fault": card.fault} for card in cards],
    }


def count_samples(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the number of samples of a shard."""
    shard = read_shard(path)
    return shard.size, len(shard.samples)


def read_cards(path: Path, numbers: Sequence[int], side: int, max_pixels: int) -> list[Card]:
    """Return the cards of some samples of a shard, by sample index."""
    shard = read_shard(path)
    labels = read_labels(path.parent)
    with path.open("rb") as stream:
        return [_card(path, stream, shard.samples[number], labels, side, max_pixels) for number in numbers]


def _card(path: Path, stream: Any, sample: RawSample, labels: Sequence[str] | None, side: int, max_pixels: int) -> Card:
    caption = label = size = fault = None
    picture = Image.new("RGB", (side, side), (240, 224, 224))
    try:
        members = readable_members(stream, sample, MAX_SAMPLE_BYTES)
        label = _label(members.get("cls"), labels)
        text = members.get("txt", b"")
        check_caption_size(text, MAX_CAPTION_BYTES)
        caption = printable(text.decode("utf-8", "backslashreplace").strip()) or None
        image = open_image(members, max_pixels)
        lies = orientation(image)
        size = upright_size(image.size, lies)
        with image, decoding():
            image.draft("RGB", (side, side))
            picture = _fitting(upright(on_white(image), lies), side)  # same orientation as in training
    except BadSampleError as bad:
        fault = printable(f"{bad.reason} {bad.detail}".strip())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Card(path.name, printable(sample.key), caption, label, size, fault, buffer.getvalue())


def _fitting(picture: Image.Image, side: int) -> Image.Image:
    """Resize a picture to at most `side` × `side`, but more than half of it; enlarge by integer factors only."""
    factor = side // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    return picture


def _label(data: bytes | None, labels: Sequence[str] | None) -> str | None:
    if data is None:
        return None
    try:
        number = read_label({"cls": data}, len(labels) if labels is not None else 10**9)
    except BadSampleError as bad:
        return f"{bad.reason}: {printable(bad.detail)}"
    if number is None or labels is None:
        return None if number is None else str(number)
    return f"{number} {printable(labels[number])}"


def page(cards: Sequence[Card], source: str, samples: int, seed: int) -> str:
    """Return a self-contained HTML page without scripts, with all text from the dataset escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    template = environment.get_template("preview.html.j2")
    return template.render(cards=cards, source=printable(source), samples=samples, seed=seed)
