"""Pictures written by a run or an evaluation, with their training steps."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from m3i_scale.data.images import DECODE_ERRORS
from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json
from m3i_scale.host.output_dir import PICTURE_LIST, PICTURES
from m3i_scale.report.run_files import RunFiles

_MOST_BYTES = 50_000_000
"""Maximum file size of a picture."""
_SMALL_SIDE = 800
"""Longer side in pixels of a picture that is scaled down."""
_SUFFIXES = (".jpg", ".jpeg", ".png")
_FIRST_BYTES = {"image/jpeg": b"\xff\xd8\xff", "image/png": b"\x89PNG\r\n\x1a\n"}


@dataclass(frozen=True)
class _Set:
    """Pictures of one training step."""

    label: str
    pictures: list[dict[str, str]]
    """`name, title, alt, address` of each."""
    size: int
    """Total file size in bytes."""
    is_whole: bool
    """Whether all pictures fit."""


def albums_of(runs: list[RunFiles], folders: list[Path], room: int) -> list[dict[str, Any]]:
    """Return `title, steps, pictures, notes` for every folder in `folders` and every run with pictures.

    The newest pictures of a run are unchanged; all others and overlays are scaled down. If they exceed `room`, in bytes
    on disk, the newest and the first are included, and the ones in between as far as they fit. Base64 in a page adds a
    third.
    """
    wanted = [(folder.name, [folder], True) for folder in folders]
    wanted += [(run.name, places, False) for run in runs if (places := _places(run.folder / PICTURES))]
    albums = []
    for place, (title, places, is_given) in enumerate(wanted):
        album, size = _album(title, places, room // (len(wanted) - place), is_given=is_given)
        room -= size
        albums.append(album)
    return albums


def _places(root: Path) -> list[Path]:
    """Return the picture folders below a run's folder, in the order of their steps."""
    try:
        return sorted(
            path for path in root.iterdir() if path.name.startswith("step-") and (path / PICTURE_LIST).is_file()
        )
    except FileNotFoundError:
        return []
    except OSError:
        return [root]  # reading it reports the error


def _album(title: str, places: list[Path], room: int, *, is_given: bool) -> tuple[dict[str, Any], int]:
    kept: dict[int, _Set] = {}
    notes: list[str] = []
    for number in _by_weight(len(places)):
        found = _read(places[number], room, notes, smaller=bool(kept))
        if found.pictures and (found.is_whole or not kept):
            kept[number] = found
            room -= found.size
        if not found.is_whole:
            notes.append(f"of {len(places)} sets of pictures {len(kept)} fit into this page")
            break
    if is_given and not kept:
        raise ConfigError(
            "no pictures in the folder", where=str(places[0]), why="; ".join(notes) or None,
            fix="use a folder that `m3i-scale evaluate --pictures` wrote",
        )  # fmt: skip
    sets = [kept[number] for number in sorted(kept)]
    names = dict.fromkeys(picture["name"] for one in sets for picture in one.pictures)
    album = {
        "title": title,
        "steps": [one.label for one in sets],
        "pictures": [_through_steps(name, sets) for name in names],
        "notes": list(dict.fromkeys(notes)),
    }
    return album, sum(one.size for one in sets)


def _by_weight(count: int) -> Iterator[int]:
    """Yield all numbers below `count`: the last, the first, then the ones halfway between, and so on."""
    seen: set[int] = set()
    parts = 1
    while len(seen) < count:
        for number in (round((count - 1) * (1 - part / parts)) for part in range(parts + 1)):
            if number not in seen:
                seen.add(number)
                yield number
        parts *= 2


def _through_steps(name: str, sets: list[_Set]) -> dict[str, Any]:
    images = [
        {**picture, "place": place}
        for place, one in enumerate(sets)
        for picture in one.pictures
        if picture["name"] == name
    ]
    return {"title": images[-1]["title"], "images": images}


def _read(folder: Path, room: int, notes: list[str], *, smaller: bool) -> _Set:
    pictures, size, is_whole, step = [], 0, True, None
    try:
        is_listed = (folder / PICTURE_LIST).is_file()
        listed: Any = read_json(folder / PICTURE_LIST) if is_listed else {"step": None, "pictures": _overlays(folder)}
        entries, step = listed["pictures"], listed["step"]
        for entry in entries:
            name, file, title, alt = (str(entry[key]) for key in ("name", "file", "title", "alt"))
            path = folder / file
            if Path(file).name != file or path.is_symlink() or not path.is_file():
                notes.append(f"{folder.name}: {file[:100]} is no file of this folder")
                continue
            content = _bytes(path, smaller=smaller or not is_listed)
            media_type = next((name for name, first in _FIRST_BYTES.items() if content.startswith(first)), None)
            if media_type is None:
                notes.append(f"{folder.name}: {file[:100]} is no picture")
            elif len(content) > room - size:
                is_whole = False
            else:
                size += len(content)
                address = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
                pictures.append({"name": name, "title": title, "alt": alt, "address": address})
    except (*DECODE_ERRORS, KeyError, TypeError, RecursionError) as error:
        notes.append(f"{folder.name}: the pictures cannot be read ({type(error).__name__})")
    return _Set(f"{step:,}" if isinstance(step, int) else folder.name, pictures, size, is_whole)


def _overlays(folder: Path) -> list[dict[str, str]]:
    """Return entries for the prediction overlays, which have no list."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    return [
        {"name": path.name, "file": path.name, "title": path.stem, "alt": f"Truth and prediction: {path.stem}"}
        for path in files
    ]


def _bytes(path: Path, *, smaller: bool) -> bytes:
    """Return a picture unchanged, or as a smaller JPEG. Raise one of `DECODE_ERRORS` if it is too large or damaged."""
    if path.stat().st_size > _MOST_BYTES:
        raise OSError("too large")
    if not smaller:
        return path.read_bytes()
    buffer = io.BytesIO()
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        picture = image.convert("RGB")
        picture.thumbnail((_SMALL_SIDE, _SMALL_SIDE))
        picture.save(buffer, "JPEG", quality=65)
    return buffer.getvalue()
