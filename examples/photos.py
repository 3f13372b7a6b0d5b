"""Make shards of photographs from three downloads: Imagenette, Flickr8k and Tiny-ImageNet.

    python examples/photos.py --imagenette /data/imagenette2 --flickr8k /data/flickr8k \\
        --tiny-imagenet /data/tiny-imagenet-200 --output /data/photos

Imagenette has class labels, Flickr8k has captions, and Tiny-ImageNet is for training without either, and for transfer.
Eight training images that are copies of held-out images are left out. All licenses are non-commercial: do not
redistribute the shards.
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from m3i_scale.data.images import DECODE_ERRORS, READ_FORMATS, on_white
from m3i_scale.errors import DataError, UserError
from m3i_scale.files import atomic_dir
from m3i_scale.options import AsJson
from m3i_scale.output import reserve_stdout
from m3i_scale.shards.make import make_shards, summary_lines
from m3i_scale.shards.options import Output, ShardOptions, Workers, print_summary, sample_bar
from m3i_scale.shards.process_pool import DEFAULT_WORKERS
from m3i_scale.shards.records import ListedInput, Record, hash_of, reading

IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""Names by WordNet id, in label order."""
JPEG_QUALITY = 92
TRANSFER_PER_CLASS = 50
"""Tiny-ImageNet training images per class that are kept out of pre-training, to fit transfer probes on."""
COPIES = {
    *("n01855672_44", "n01917289_323", "n03770439_128", "n03976657_138", "n03976657_298", "n03976657_498"),
    *("n07753592_446", "2974587819_742fb7c338"),
}
"""Training images of Tiny-ImageNet, and one of Flickr8k, that are held-out images of Tiny-ImageNet and Imagenette: all
pairs with a correlation above 0.99 at 16 × 16 pixels, centered per channel. The next pair has 0.97."""
_CAPTION = re.compile(r"(\S+?)#\d+\s+(.*\S)\s*")
"""A line of Flickr8k.token.txt. Copies of the file have a space instead of the tab in some lines."""


@dataclass(frozen=True)
class PhotoSet:
    """Origin, license and size of a download."""

    folder: str
    """Folder below the output."""
    title: str
    origin: str
    license: str
    counts: dict[str, int] = field(hash=False)
    """Number of images by split."""


IMAGENETTE = PhotoSet(
    "imagenette",
    "Imagenette",
    "https://github.com/fastai/imagenette",
    "ImageNet terms of access: non-commercial research and education",
    {"train": 9469, "val": 3925},
)
FLICKR8K = PhotoSet(
    "flickr8k",
    "Flickr8k",
    "https://hockenmaier.cs.illinois.edu/8k-pictures.html",
    "non-commercial research and education",
    {"train": 6000, "dev": 1000, "test": 1000},
)
TINY = PhotoSet(
    "tiny",
    "Tiny-ImageNet",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "ImageNet terms of access: non-commercial research and education",
    {"train": 90_000, "transfer": 10_000, "val": 10_000},
)


@dataclass(frozen=True)
class SmallPhoto:
    """A photo that is resized when it is read."""

    path: Path
    short_side: int
    """In pixels. Smaller photos keep their bytes."""

    def read(self) -> bytes:
        """Return the encoded photo."""
        with reading(self.path, *DECODE_ERRORS), Image.open(self.path, formats=READ_FORMATS) as image:
            scale = self.short_side / min(image.size)
            if scale >= 1:
                return self.path.read_bytes()
            photo = on_white(image)
        width, height = (max(self.short_side, round(length * scale)) for length in photo.size)
        buffer = io.BytesIO()
        photo.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


@dataclass(frozen=True)
class Photo:
    """A photo with its split and annotations."""

    path: Path
    split: str
    wnid: str | None = None
    """WordNet id of its class."""
    caption: str | None = None


def imagenette_photos(folder: Path) -> list[Photo]:
    """List the photos of Imagenette; splits: train and val.

    Raises:
        DataError: a folder is missing.
    """
    photos = []
    for split in ("train", "val"):
        of_split = _subfolder(folder, split, "the folder of Imagenette must have train/WNID/*.JPEG and val/WNID/*.JPEG")
        for wnid in IMAGENETTE_CLASSES:
            of_class = _subfolder(of_split, wnid, "use Imagenette2, not Imagewoof or ImageNet")
            photos += [Photo(path, split, wnid) for path in _images(of_class)]
    return photos


def flickr8k_photos(folder: Path) -> list[Photo]:
    """List the photos of Flickr8k with captions; splits: train, dev and test. Some photos are in no split.

    Training photos have all captions, one per line; held-out photos have the first one.

    Raises:
        DataError: a file is missing or malformed, or a listed photo is missing.
    """
    captions = read_captions(folder / "Flickr8k.token.txt")
    images = _subfolder(folder, "images", "the folder of Flickr8k must have images/*.jpg and Flickr8k.token.txt")
    files = {path.name: path for path in _images(images)}
    photos = []
    for split in FLICKR8K.counts:
        listed = folder / f"Flickr_8k.{split}Images.txt"
        with reading(listed, UnicodeDecodeError, fix="get Flickr8k_text.zip from the page of Flickr8k"):
            names = listed.read_text(encoding="utf-8").split()
        for name in names:
            if name not in files or name not in captions:
                raise DataError(
                    f"no {'image' if name not in files else 'caption'} of '{name}', which is in {listed.name}",
                    where=str(folder),
                    fix="use the images, captions and lists of the same download",
                )
            of_image = captions[name] if split == "train" else captions[name][:1]
            photos.append(Photo(files[name], split, caption="\n".join(of_image)))
    return photos


def read_captions(path: Path) -> dict[str, list[str]]:
    """Return the captions by name of the image.

    Raises:
        DataError: the file is missing, or a line is not NAME#NUMBER, tab, caption.
    """
    with reading(path, UnicodeDecodeError, fix="get Flickr8k_text.zip from the page of Flickr8k"):
        lines = path.read_text(encoding="utf-8").splitlines()
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        match = _CAPTION.fullmatch(line)
        if match is None and line.strip():
            raise DataError(
                f"a caption line must be NAME#NUMBER, a tab and a caption, got '{line[:60]}'",
                where=f"{path}:{number}",
                fix="repair the line, or download the file again",
            )
        if match is not None:
            captions[match[1]].append(match[2])
    return captions


def tiny_photos(folder: Path) -> tuple[list[Photo], dict[str, str]]:
    """List the photos of Tiny-ImageNet, and return them with the class names by WordNet id.

    Splits: train, for training without labels; transfer, 50 training images per class; val.

    Raises:
        DataError: a file or folder is missing.
    """
    fix = "the folder of Tiny-ImageNet must have train/WNID/images, val/images, val/val_annotations.txt and words.txt"
    photos = []
    train = _subfolder(folder, "train", fix)
    wnids = sorted(path.name for path in train.iterdir() if path.is_dir())
    for wnid in wnids:
        paths = _images(_subfolder(train / wnid, "images", fix))
        ranked = sorted(paths, key=lambda path: hash_of("transfer", path.name))
        count = min(TRANSFER_PER_CLASS, len(ranked) // 2)
        photos += [Photo(path, "transfer", wnid) for path in ranked[:count]]
        photos += [Photo(path, "train", wnid) for path in ranked[count:]]
    annotations = _subfolder(folder, "val", fix) / "val_annotations.txt"
    with reading(annotations, UnicodeDecodeError, fix=fix):
        rows = [line.split()[:2] for line in annotations.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        if len(row) < 2 or row[1] not in wnids or Path(row[0]).name != row[0]:  # no paths out of the folder
            raise DataError(
                f"an annotation must have a file name and a class of train, got '{' '.join(row)}'",
                where=str(annotations),
                fix="download Tiny-ImageNet again",
            )
    photos += [Photo(folder / "val" / "images" / name, "val", wnid) for name, wnid in rows]
    return photos, _tiny_names(folder / "words.txt", wnids, fix)


def _tiny_names(path: Path, wnids: Sequence[str], fix: str) -> dict[str, str]:
    """Return the first name of every class, or all its names if another class has the same first one."""
    with reading(path, UnicodeDecodeError, fix=fix):
        rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    words = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    if unnamed := [wnid for wnid in wnids if wnid not in words]:
        raise DataError(f"no name of class '{unnamed[0]}'", where=str(path), fix="download Tiny-ImageNet again")
    first = {wnid: words[wnid].split(",")[0] for wnid in wnids}
    count = Counter(first.values())
    return {wnid: name if count[name] == 1 else words[wnid] for wnid, name in first.items()}


def _subfolder(folder: Path, name: str, fix: str) -> Path:
    if not (folder / name).is_dir():
        raise DataError(f"no folder '{name}'", where=str(folder / name), fix=fix)
    return folder / name


def _images(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise DataError("the folder contains no images", where=str(folder), fix="complete the download")
    return paths


def check_counts(one: PhotoSet, photos: Sequence[Photo], folder: Path) -> None:
    """Check that a download is complete.

    Raises:
        DataError: a split has a different number of images.
    """
    count = Counter(photo.split for photo in photos)
    for split, expected in one.counts.items():
        if count[split] != expected:
            raise DataError(
                f"the {split} split of {one.title} must have {expected:,} images, got {count[split]:,}",
                where=str(folder),
                fix=f"download it again from {one.origin}",
            )


def photo_records(one: PhotoSet, photos: Iterable[Photo], classes: Sequence[str], short_side: int) -> list[Record]:
    """Return records for shards; `classes` are the WordNet ids in label order.

    Args:
        short_side: of the stored images, in pixels.
    """
    return [
        Record(
            key=f"{one.folder}-{photo.path.stem}",
            image=SmallPhoto(photo.path, short_side).read,
            caption=photo.caption,
            label=None if photo.wnid is None else classes.index(photo.wnid),
            meta={"file": photo.path.name, "source": one.title} | ({"wnid": photo.wnid} if photo.wnid else {}),
            split=photo.split,
            size=short_side * short_side // 2,
        )
        for photo in photos
    ]


def main(
    imagenette: Annotated[Path, typer.Option(help="Folder with train/WNID and val/WNID.")],
    flickr8k: Annotated[Path, typer.Option(help="Folder with images, Flickr8k.token.txt and the lists of splits.")],
    tiny_imagenet: Annotated[Path, typer.Option(help="Folder with train, val and words.txt.")],
    output: Output,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Short side of the stored images, pixels.")] = 64,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Make shards of photos with class labels, of photos with captions, and of photos for transfer."""
    if output.exists():
        raise DataError("the output folder already exists", where=str(output), fix="remove it, or use another --output")
    tiny, tiny_names = tiny_photos(tiny_imagenet)
    sets = {IMAGENETTE: imagenette_photos(imagenette), FLICKR8K: flickr8k_photos(flickr8k), TINY: tiny}
    for (one, photos), folder in zip(sets.items(), (imagenette, flickr8k, tiny_imagenet), strict=True):
        check_counts(one, photos, folder)
        sets[one] = [photo for photo in photos if photo.path.stem not in COPIES]
    left_out = sum(sum(one.counts.values()) - len(photos) for one, photos in sets.items())
    if left_out != len(COPIES):
        raise DataError(
            f"{len(COPIES)} training images are known to be copies of held-out images, got {left_out}",
            where=f"{flickr8k}, {tiny_imagenet}",
            why="the files have other names than in the official downloads",
            fix="use the official downloads",
        )
    note = f"left out {left_out} training images that are copies of held-out images"
    classes = {IMAGENETTE: IMAGENETTE_CLASSES, FLICKR8K: {}, TINY: tiny_names}
    document: dict[str, Any] = {"output": str(output), "copies_left_out": left_out, "sets": {}}
    lines = []
    with atomic_dir(output) as folder, sample_bar(quiet=as_json) as tell:
        for one, photos in sets.items():
            summary = make_shards(
                ListedInput(
                    photo_records(one, photos, list(classes[one]), image_size),
                    list(classes[one].values()),
                    source=one.title,
                    licenses={one.origin: one.license},
                ),
                folder / one.folder,
                name=one.folder,
                options=ShardOptions(workers=workers),
                progress=tell,
            )
            splits = summary["splits"]
            document["sets"][one.folder] = {"splits": splits, "origin": one.origin, "license": one.license}
            lines += summary_lines(summary, output / one.folder)
    lines += [f"{one.title}: from {one.origin}; license: {one.license}" for one in sets]
    print_summary(document, as_json, [*lines, note, "Do not redistribute these shards."])


if __name__ == "__main__":
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
