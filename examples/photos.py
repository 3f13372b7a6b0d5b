"""Make shards of photographs from three downloads: Imagenette, Flickr8k and Tiny-ImageNet.

    python examples/photos.py --imagenette /data/imagenette2 --flickr8k /data/flickr8k \\
        --tiny-imagenet /data/tiny-imagenet-200 --output /data/photos

Imagenette has class labels, Flickr8k has captions, and Tiny-ImageNet is for training without either, and for transfer.
Training images that nearly equal a held-out image of any of the three sets are left out. All licenses are
non-commercial: do not redistribute the shards.
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.data.images import DECODE_ERRORS, on_white
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
FITTED = ("train", "transfer")
"""Splits that a model or a probe is fitted on."""
SIGNATURE_SIDE = 16
DUPLICATE_CORRELATION = 0.99
"""Minimum correlation of two images at 16 × 16 pixels. On the three sets, all eight pairs above it are the same photo;
the pairs from 0.95 to 0.985 are different photos of sky, water or snow."""
_CAPTION = re.compile(r"(\S+?)#\d+\s+(.*\S)\s*")
"""A line of Flickr8k.token.txt. Copies of the file have a space instead of the tab in some lines."""
_CHUNK = 512


@dataclass(frozen=True)
class PhotoSet:
    """Origin and license of a download."""

    folder: str
    """Folder below the output."""
    title: str
    origin: str
    license: str


IMAGENETTE = PhotoSet(
    "imagenette",
    "Imagenette",
    "https://github.com/fastai/imagenette",
    "ImageNet terms of access: non-commercial research and education",
)
FLICKR8K = PhotoSet(
    "flickr8k",
    "Flickr8k",
    "https://hockenmaier.cs.illinois.edu/8k-pictures.html",
    "non-commercial research and education",
)
TINY = PhotoSet(
    "tiny",
    "Tiny-ImageNet",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "ImageNet terms of access: non-commercial research and education",
)


@dataclass(frozen=True)
class SmallPhoto:
    """A photo that is resized when it is read."""

    path: Path
    short_side: int
    """In pixels. Smaller photos keep their bytes."""

    def read(self) -> bytes:
        """Return the encoded photo."""
        with reading(self.path, *DECODE_ERRORS), Image.open(self.path) as image:
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
        DataError: a folder is missing, or is not a class of Imagenette.
    """
    photos = []
    for split in ("train", "val"):
        of_split = _subfolder(folder, split, "the folder of Imagenette must have train/WNID/*.JPEG and val/WNID/*.JPEG")
        for wnid in IMAGENETTE_CLASSES:
            of_class = _subfolder(of_split, wnid, "Imagenette has ten classes, each with a folder in train and in val")
            photos += [Photo(path, split, wnid) for path in _images(of_class)]
        unknown = sorted({path.name for path in of_split.iterdir() if path.is_dir()} - {*IMAGENETTE_CLASSES})
        if unknown:
            raise DataError(
                f"'{unknown[0]}' is not a class of Imagenette",
                where=str(of_split / unknown[0]),
                fix="use Imagenette2, not Imagewoof or ImageNet",
            )
    return photos


def flickr8k_photos(folder: Path, notes: list[str]) -> list[Photo]:
    """List the photos of Flickr8k with captions; splits: train, dev and test.

    Training photos have all captions, one per line; held-out photos have the first one.

    Raises:
        DataError: a file is missing or malformed, or a listed photo is missing.
    """
    captions = read_captions(folder / "Flickr8k.token.txt")
    images = _subfolder(folder, "images", "the folder of Flickr8k must have images/*.jpg and Flickr8k.token.txt")
    files = {path.name: path for path in _images(images)}
    splits: dict[str, str] = {}
    repeated = 0
    for split in ("test", "dev", "train"):  # held out if in several lists
        for name in read_split(folder, split):
            if name not in files or name not in captions:
                what = "no image" if name not in files else "no caption"
                raise DataError(
                    f"{what} for '{name}', which is in the list of {split} images",
                    where=str(folder),
                    fix="use the images, captions and lists of the same download",
                )
            repeated += name in splits
            splits.setdefault(name, split)
    notes += [f"Flickr8k: {repeated} list entries repeat an image of another list; held out"] if repeated else []
    unlisted = len(files.keys() - splits.keys())
    notes += [f"Flickr8k: left out {unlisted} images that are in no list"] if unlisted else []
    return [
        Photo(files[name], split, caption="\n".join(captions[name][: None if split == "train" else 1]))
        for name, split in splits.items()
    ]


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


def read_split(folder: Path, split: str) -> list[str]:
    """Return the names in `Flickr_8k.trainImages.txt` or its like. Only the first column is read.

    Raises:
        DataError: there is no list, or there are several.
    """
    wanted = f"flickr8k.{split}images.txt"
    found = [path for path in sorted(folder.iterdir()) if path.name.lower().replace("_", "") == wanted]
    if len(found) != 1:
        raise DataError(
            f"there must be one list of {split} images, found {len(found)}",
            where=str(folder / f"Flickr_8k.{split}Images.txt"),
            fix="get Flickr8k_text.zip from the page of Flickr8k",
        )
    with reading(found[0], UnicodeDecodeError):
        rows = found[0].read_text(encoding="utf-8").splitlines()
    return [*dict.fromkeys(row.split()[0] for row in rows if row.strip())]


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


# -------------------- near-duplicates


def near_duplicates(train: list[Path], held_out: list[Path], advance: Callable[[], None]) -> dict[Path, Path]:
    """Return training images that nearly equal a held-out image, with that image."""
    signatures = partial(_signatures, advance=advance)
    train_ND, held_out_MD = signatures(train), signatures(held_out)
    found = {}
    for start in range(0, len(train), _CHUNK):
        similarity = train_ND[start : start + _CHUNK] @ held_out_MD.T
        nearest = similarity.argmax(axis=1)
        for row in np.flatnonzero(similarity.max(axis=1) > DUPLICATE_CORRELATION).tolist():
            found[train[start + row]] = held_out[nearest[row]]
    return found


def _signatures(paths: Sequence[Path], advance: Callable[[], None]) -> NDArray[np.float32]:
    """Return small images without mean, at unit length (N, D). An image of one color is zero, and equals none."""

    def signature(path: Path) -> NDArray[np.float32]:
        with reading(path, *DECODE_ERRORS), Image.open(path) as image:
            image.draft("RGB", (4 * SIGNATURE_SIDE, 4 * SIGNATURE_SIDE))
            small = on_white(image).resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BOX)
        advance()
        return np.asarray(small, np.float32).ravel()

    with ThreadPoolExecutor() as pool:
        pixels_ND = np.stack(list(pool.map(signature, paths)))
    pixels_ND -= pixels_ND.mean(axis=1, keepdims=True)
    norm_N1 = np.linalg.norm(pixels_ND, axis=1, keepdims=True)
    pixels_ND /= np.maximum(norm_N1, 1e-6)
    return pixels_ND


def without_duplicates(sets: dict[PhotoSet, list[Photo]], notes: list[str], tell: Callable[[int, int], None]) -> None:
    """Remove training photos that nearly equal a held-out photo of any set, and note how many."""
    owner = {photo.path: one for one, photos in sets.items() for photo in photos}
    train = [photo.path for photos in sets.values() for photo in photos if photo.split in FITTED]
    held_out = [photo.path for photos in sets.values() for photo in photos if photo.split not in FITTED]
    read = iter(range(1, len(owner) + 1))
    found = near_duplicates(train, held_out, lambda: tell(next(read), len(train) + len(held_out)))
    counts = Counter((owner[path].title, owner[other].title) for path, other in found.items())
    notes += [
        f"left out {count} training images of {title} that nearly equal held-out images of {other}"
        for (title, other), count in sorted(counts.items())
    ]
    for one, photos in sets.items():
        sets[one] = [photo for photo in photos if photo.path not in found]


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
    notes: list[str] = []
    tiny, tiny_names = tiny_photos(tiny_imagenet)
    sets = {IMAGENETTE: imagenette_photos(imagenette), FLICKR8K: flickr8k_photos(flickr8k, notes), TINY: tiny}
    common = [tiny_names[wnid] for wnid in tiny_names if wnid in IMAGENETTE_CLASSES]
    names = f": {', '.join(common)}" if common else ""
    notes.append(f"classes in both Imagenette and Tiny-ImageNet: {len(common)}{names}")
    with sample_bar(quiet=as_json) as tell:
        without_duplicates(sets, notes, tell)
    classes = {IMAGENETTE: IMAGENETTE_CLASSES, FLICKR8K: {}, TINY: tiny_names}
    document: dict[str, Any] = {"output": str(output), "notes": notes, "sets": {}}
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
    lines += notes
    lines += [f"{one.title}: from {one.origin}; license: {one.license}" for one in sets]
    print_summary(document, as_json, [*lines, "Do not redistribute these shards."])


if __name__ == "__main__":
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
