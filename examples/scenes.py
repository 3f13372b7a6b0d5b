"""Make scenes of emoji with boxes, masks and the class of every pixel, in the layouts of COCO, LVIS and ADE20k.

    python examples/scenes.py /data/emoji-scenes --images 1800

Art is cut out and pasted onto a background, where it occludes other art. Only visible pixels are labeled, so labels are
exact. A family of art is in one split only, and in the same one as in `emoji.py`, whose cache holds the art. Some
pieces have no label: other art, and outlines with the wrong inside, so that an edge alone is not the answer. The same
seed gives the same bytes. Needs `pip install -e '.[emoji]'`.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from emoji import Art, Concept, held_out_families, npm_styles
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, ImageOps
from scene_layouts import Category, LayoutWriter, Scene

from m3i_scale.data.images import DECODE_ERRORS
from m3i_scale.errors import ConfigError, DataError, UserError
from m3i_scale.files import atomic_dir
from m3i_scale.options import AsJson
from m3i_scale.output import reserve_stdout
from m3i_scale.shards.image_folders import list_images
from m3i_scale.shards.options import print_summary, sample_bar
from m3i_scale.shards.records import reading

Families = list[list[Art]]
"""Art by family: a family is drawn first, then one picture of it, so that many look-alikes count as one."""

VALIDATION_SHARE = 1 / 6
ZIPF_EXPONENT = 1.3
"""The category of rank r is drawn with weight r^-1.3. Of 300 images as of 1,800, some are then in at most 10 images for
training and some in more than 100, where LVIS divides them."""
EMPTY_SHARE, CROWD_SHARE = 0.04, 0.06
"""How many images have nothing to find, and how many have a crowd."""
THINGS, DISTRACTORS, CROWD = (1, 8), (0, 5), (8, 16)
"""Fewest and most pieces of a scene."""
SIDES, CROWD_SIDES = (0.14, 0.6), (0.1, 0.16)
"""The longer side of a piece, as a share of the scene's."""
TURN, BLUR, NOISE = 20.0, 0.7, 6.0
"""A piece is turned by so many degrees at most; deviation of the blur in pixels, at most; of the noise, of 255."""
ABSENT = 5
"""So many categories an image are named as absent from it, as LVIS does."""
CACHE_BYTES = 1 << 28
"""Of art once drawn, which takes longer than the rest of a scene."""
UNLABELLED = {"emoji": "flags", "stamps": "symbols"}
"""The group whose art has no label."""


@dataclass(frozen=True)
class Artwork:
    """Holds the art of one split."""

    things: list[Families]
    """By category."""
    others: Families


def emoji_art(cache_dir: Path, size: int) -> tuple[list[tuple[Concept, Art]], dict[str, str]]:
    """Read concepts and pictures of the styles that `emoji.py` has for training; return them and licenses by source.

    Raises:
        DataError: see `emoji.npm_styles`.
    """
    concepts, styles = npm_styles(cache_dir)
    art = [
        (concept, Art(style.art[concept.code], style.kind, size, (0, 0, 0)))
        for style in styles
        for concept in concepts
        if concept.code in style.art
    ]
    return art, {style.source: style.license for style in styles}


def stamp_art(folder: Path, size: int) -> list[tuple[Concept, Art]]:
    """Read concepts and pictures from GROUP/SUBGROUP/…/NAME.png; names that differ in numbers only are a family.

    Raises:
        DataError: no such folder, no pictures in folders of groups, or one that is damaged.
    """
    art = []
    for path in list_images(folder):
        way = path.relative_to(folder).parts
        if len(way) > 1:
            family = "/".join((*way[:-1], re.sub(r"[^a-z]+", " ", path.stem.lower()).strip()))
            concept = Concept("/".join(way), path.stem, "", way[0], "/".join(way[:-1][:2]), family)
            with reading(path, *DECODE_ERRORS), Image.open(path) as picture:
                picture.load()
            art.append((concept, Art(path.read_bytes(), "bitmap", size, (0, 0, 0))))
    if not art:
        raise DataError("no picture lies in the folder of a group", where=str(folder), fix="GROUP/NAME.png")
    return art


def split_art(art: list[tuple[Concept, Art]], unlabelled: str) -> tuple[list[Category], dict[str, Artwork]]:
    """Return the categories, the most frequent first, and the art of train and val; a category has families in both.

    Raises:
        DataError: there is no such category.
    """
    held_out = held_out_families([*dict.fromkeys(concept for concept, _ in art)])  # a concept has several styles
    families: dict[Category, dict[str, dict[str, list[Art]]]] = defaultdict(lambda: {"train": {}, "val": {}})
    for concept, picture in art:
        split = "val" if concept.family in held_out else "train"
        families[Category(concept.group, concept.subgroup)][split].setdefault(concept.family, []).append(picture)
    by_group: dict[str, list[Category]] = defaultdict(list)
    # The subgroups with most families are frequent, and the groups take turns: both kinds of classes have a long tail.
    for category in sorted(families, key=lambda one: -len(families[one]["train"])):
        if category.group != unlabelled and families[category]["train"] and families[category]["val"]:
            by_group[category.group].append(category)
    ranks = {category: rank for group in by_group.values() for rank, category in enumerate(group)}
    categories = sorted(ranks, key=lambda one: ranks[one])
    if not categories:
        raise DataError("no subgroup has two families of art", fix="more pictures")
    others = [both for category, both in families.items() if category.group == unlabelled]
    return categories, {
        split: Artwork(
            [list(families[category][split].values()) for category in categories],
            [family for both in others for family in both[split].values()],
        )
        for split in ("train", "val")
    }


class Composer:
    """Composes scenes of the art of one split.

    Args:
        artwork: see `split_art`.
        size: side of the scenes in pixels.
    """

    def __init__(self, artwork: Artwork, size: int) -> None:
        self.artwork, self.size = artwork, size
        weights = np.arange(1, len(artwork.things) + 1) ** -ZIPF_EXPONENT
        self.shares = weights / weights.sum()
        self._cut_out = lru_cache(maxsize=CACHE_BYTES // (4 * largest_side(size) ** 2))(_cut_out)

    def compose(self, draw: np.random.Generator) -> Scene:
        """Return a scene; it follows from the state of `draw` alone."""
        things: list[int | None] = []
        if draw.random() >= EMPTY_SHARE:
            things += [self._category(draw) for _ in range(draw.integers(*THINGS, endpoint=True))]
        crowded = len(things) > 0 and draw.random() < CROWD_SHARE  # then the first is many
        things += [None] * int(draw.integers(*DISTRACTORS, endpoint=True))
        canvas, crowd = _Canvas(_ground(self.size, draw)), range(0)
        for number in draw.permutation(len(things)):
            category, center = things[number], draw.uniform(0.08, 0.92, 2)
            side = SIDES[0] * (SIDES[1] / SIDES[0]) ** draw.random()
            picture = self._distractor(draw) if category is None else self._thing(category, draw)
            if crowded and number == 0:
                first = len(canvas.pieces)
                crowd = range(first, first + int(draw.integers(*CROWD, endpoint=True)))
                for _ in crowd:
                    member = self._changed(picture, draw.uniform(*CROWD_SIDES), draw)
                    canvas.paste(category, member, draw.normal(center, 0.1).clip(0, 1))
            else:
                canvas.paste(category, self._changed(picture, side, draw), center)
        others = [category for category in range(len(self.shares)) if category not in canvas.pieces]
        absent = sorted(draw.choice(others, min(ABSENT, len(others)), replace=False).tolist())
        return Scene(canvas.photograph(draw), canvas.owner_HW, canvas.pieces, crowd, absent)

    def _category(self, draw: np.random.Generator) -> int:
        return int(draw.choice(len(self.shares), p=self.shares))

    def _thing(self, category: int, draw: np.random.Generator) -> Image.Image:
        return self._one_of(self.artwork.things[category], draw)

    def _one_of(self, families: Families, draw: np.random.Generator) -> Image.Image:
        family = families[draw.integers(len(families))]
        return self._cut_out(family[draw.integers(len(family))])

    def _distractor(self, draw: np.random.Generator) -> Image.Image:
        """Return other art, or the outline of one thing with the inside of another, the middle of which is outside."""
        if self.artwork.others and draw.random() < 0.5:
            return self._one_of(self.artwork.others, draw)
        outline, inside = (self._thing(self._category(draw), draw) for _ in range(2))
        mean = inside.resize((1, 1), Image.Resampling.BOX).convert("RGB").getpixel((0, 0))
        filled = Image.new("RGBA", outline.size, mean)
        filled.alpha_composite(inside.resize(outline.size))
        filled = ImageChops.offset(filled, outline.width // 2, outline.height // 2)
        filled.putalpha(outline.getchannel("A"))
        return filled

    def _changed(self, picture: Image.Image, side: float, draw: np.random.Generator) -> Image.Image:
        """Return a picture at `side`, a share of the scene's, mirrored or not, and turned."""
        scale = side * self.size / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        if draw.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return picture.rotate(draw.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)


class _Canvas:
    """Holds a scene in the making; the last piece lies on top."""

    def __init__(self, ground_HW3: NDArray[np.float32]) -> None:
        self.pixels_HW3 = ground_HW3
        self.owner_HW = np.full(ground_HW3.shape[:2], -1, np.int16)
        self.pieces: list[int | None] = []

    def paste(self, category: int | None, picture: Image.Image, center: NDArray[np.float64]) -> None:
        """Draw a picture; `center` is relative to height and width.

        Soft edges mix with what is below; a pixel is the piece's where it is at least half opaque.
        """
        art_HW4 = np.asarray(picture, np.float32)
        here, there = list[slice](), list[slice]()
        for axis, middle in enumerate(center.tolist()):
            length, side = self.owner_HW.shape[axis], art_HW4.shape[axis]
            first = round(middle * length - side / 2)
            here.append(slice(max(first, 0), min(first + side, length)))
            there.append(slice(here[-1].start - first, here[-1].stop - first))
        part_HW4, below_HW3 = art_HW4[tuple(there)], self.pixels_HW3[tuple(here)]
        below_HW3 += part_HW4[..., 3:] / 255 * (part_HW4[..., :3] - below_HW3)
        self.owner_HW[tuple(here)][part_HW4[..., 3] >= 128] = len(self.pieces)
        self.pieces.append(category)

    def photograph(self, draw: np.random.Generator) -> NDArray[np.uint8]:
        """Return the pixels, blurred and noisy wherever they come from."""
        sharp = Image.fromarray(self.pixels_HW3.round().clip(0, 255).astype(np.uint8))
        blurred_HW3 = np.asarray(sharp.filter(ImageFilter.GaussianBlur(draw.uniform(0, BLUR))), np.float32)
        noise_HW3 = draw.standard_normal(blurred_HW3.shape, np.float32) * NOISE
        return (blurred_HW3 + noise_HW3).round().clip(0, 255).astype(np.uint8)


def largest_side(size: int) -> int:
    """Return the longer side of the largest piece in pixels, of scenes of `size`."""
    return round(SIDES[1] * size)


def _cut_out(art: Art) -> Image.Image:
    picture = art.cut_out()
    return picture.crop(picture.getchannel("A").getbbox())


def _ground(size: int, draw: np.random.Generator) -> NDArray[np.float32]:
    """Return one color, with soft spots of others, large and small."""
    plain, coarse, fine = (
        Image.fromarray(colors).resize((size, size), Image.Resampling.BICUBIC)
        for colors in [draw.integers(0, 256, (cells, cells, 3), np.uint8) for cells in (1, 4, 16)]
    )
    return np.array(Image.blend(Image.blend(plain, coarse, 0.5), fine, 0.15), np.float32)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    images: Annotated[int, typer.Option(min=6, help="So many scenes; a sixth of them is for validation.")] = 300,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Side of the scenes in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other scenes.")] = 0,
    stamps: Annotated[
        Path | None, typer.Option(help="Take cut-outs from here, as GROUP/NAME.png, in place of emoji.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps the emoji; default: .cache beside the folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compose scenes with exact boxes, masks and pixel classes, in the layouts of COCO, LVIS and ADE20k."""
    if folder.exists():
        raise ConfigError("the folder exists", where=str(folder), fix="another one, or remove it")
    if stamps is not None and cache is not None:
        raise ConfigError("--cache has no effect with --stamps", fix="leave one out")
    largest = largest_side(size)
    if stamps is None:
        kind, (art, licenses) = "emoji", emoji_art(cache or folder.parent / ".cache" / "emoji", largest)
    else:
        kind, art, licenses = "stamps", stamp_art(stamps, largest), {}
    categories, artwork = split_art(art, UNLABELLED[kind])
    val = round(images * VALIDATION_SHARE)
    image_id = 0
    try:
        with atomic_dir(folder, durable=False) as partial, sample_bar(quiet=as_json) as tell:
            writer = LayoutWriter(partial, categories, f"Scenes of {kind}, {size} pixels, seed {seed}", licenses)
            for which, (split, count) in enumerate({"train": images - val, "val": val}.items()):
                composer = Composer(artwork[split], size)
                for number in range(count):
                    image_id += 1
                    writer.add(split, image_id, composer.compose(np.random.default_rng([seed, which, number])))
                    tell(image_id, images)
            summary = writer.end()
    except OSError as error:
        fix = "a disk with room and with hard links, where you may write"
        raise DataError(f"cannot write: {error}", where=str(folder), fix=fix) from None
    lines = [
        f"{folder / split}: {made['images']} images ({made['without_instances']} without instances), "
        f"{made['instances']} instances, {made['crowds']} crowds"
        for split, made in summary["splits"].items()
    ]
    counts = summary["categories"]
    lines.append(
        f"{summary['groups']} groups; categories: {counts['f']} frequent, {counts['c']} common, {counts['r']} rare"
    )
    print_summary(summary, as_json, lines)


if __name__ == "__main__":
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
