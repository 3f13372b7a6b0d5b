"""Tiling of large images while shards are created; every tile becomes a sample."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from m3i_scale.data.deep_images import SIXTEEN_AS_I, ValueRange, check_header, check_values
from m3i_scale.data.images import DECODE_FAULTS, fault_text, open_any_size, orientation, upright, upright_size
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.layout import Outline
from m3i_scale.shards.records import Contents, Input, InputWrapper, Record, contents_of


@dataclass(frozen=True)
class Tiling:
    """Options for cutting large images into tiles."""

    side: int
    """Tile size in pixels. Images that do not exceed it in height or width stay uncut."""
    overlap: int = 0
    """Minimum overlap of neighboring tiles in pixels."""
    max_pixels: int = MAX_IMAGE_PIXELS
    """Larger images are an error. Images are decoded completely before cutting, with 3 or more bytes per pixel."""

    def check(self) -> None:
        """Validate the values."""
        if self.side < 1 or not 0 <= self.overlap < self.side or self.max_pixels < 1:
            raise ConfigError(
                f"tiles of {self.side} pixels that share {self.overlap}, of images of {self.max_pixels} pixels at most",
                fix="--tile above 0, --tile-overlap from 0 to below --tile, --tile-max-pixels above 0",
            )

    def starts(self, length: int) -> list[int]:
        """Return the start offsets of tiles along one axis. The last tile is shifted inwards to keep its full size; a
        shorter axis has one tile."""
        step = self.side - self.overlap
        return [*range(0, max(0, length - self.side), step), max(0, length - self.side)]

    def boxes(self, width: int, height: int) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """Yield the key suffix and the box (left, top, right, bottom) of every tile, row by row."""
        for row, top in enumerate(self.starts(height)):
            for column, left in enumerate(self.starts(width)):
                yield f"_r{row}_c{column}", (left, top, min(width, left + self.side), min(height, top + self.side))


class TiledInput(InputWrapper):
    """Input that cuts large images of another input into tiles with the same label and caption.

    All tiles of an image stay in one split. An image is decoded once, in this process; workers encode its tiles.

    Args:
        source: wrapped input.
        tiling: tiling options.
        value_range: see `encoded_image`; checked here because the tiles of an 8-bit image would not reveal the error.

    Raises:
        ConfigError: invalid tiling values, or an input with boxes.
    """

    def __init__(self, source: Input, tiling: Tiling, value_range: ValueRange | None = None) -> None:
        tiling.check()
        if source.categories is not None:
            raise ConfigError("--tile cuts no boxes", fix="cut images and annotations before, or leave out --tile")
        super().__init__(source)
        self._tiling, self._value_range = tiling, value_range

    def outlines(self) -> Iterator[Outline]:
        """See `Input`. Reads the header of every image."""
        for outline, record in zip(self._source.outlines(), self._source.records(), strict=True):
            found = self._size(record)
            if isinstance(found, DataError) or not self._is_large(found):
                yield outline
                continue
            group = outline.group or outline.key
            for ending, (left, top, right, bottom) in self._tiling.boxes(*found):
                size = 3 * (right - left) * (bottom - top)  # upper estimate; a PNG often exceeds its source
                yield replace(outline, key=outline.key + ending, size=size, group=group)

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        for record in map(_named, self._source.records()):
            found = self._size(record)
            if isinstance(found, DataError):
                yield replace(record, fault=found)
            elif not self._is_large(found):
                yield record
            else:
                yield from self._tiles(record, found)

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return self._source.info() | {"tile": self._tiling.side, "tile_overlap": self._tiling.overlap}

    def _is_large(self, size: tuple[int, int]) -> bool:
        return max(size) > self._tiling.side

    def _size(self, record: Record) -> tuple[int, int] | DataError:
        """Return width and height of the upright image, or the error if it is unusable."""
        if record.fault is not None:
            return record.fault
        try:
            with _opened(record.image) as image:
                width, height = upright_size(image.size, orientation(image))
        except (OSError, *DECODE_FAULTS) as error:
            return DataError(f"the image does not decode: {fault_text(error)}", where=_where(record))
        except DataError as error:
            return error
        return self._fault(record, width, height) or (width, height)

    def _fault(self, record: Record, width: int, height: int) -> DataError | None:
        """Return the error if an image of this size cannot be cut."""
        where, side = _where(record), self._tiling.side
        if width * height > self._tiling.max_pixels:
            return DataError(
                f"the image is too large: {width} × {height} pixels, --tile-max-pixels is {self._tiling.max_pixels}",
                where=where,
                why="it is decoded whole before it is cut",
                fix="raise --tile-max-pixels if the memory is there (3 bytes a pixel and more), or cut it before",
            )
        if not self._is_large((width, height)):
            return None
        if min(width, side) * min(height, side) > MAX_IMAGE_PIXELS:
            return DataError(f"its tiles are of more than {MAX_IMAGE_PIXELS} pixels", where=where, fix="a lower --tile")
        if record.mask is not None:
            return DataError("--tile cuts no masks", where=where, fix="cut images and masks before")
        return None

    def _tiles(self, record: Record, size: tuple[int, int]) -> Iterator[Record]:
        fault: DataError | None = None
        try:
            with _opened(record.image) as opened:
                check_header(opened, self._value_range, _where(record))
                lies = orientation(opened)
                opened.load()
                check_values(opened, _where(record))
                image = upright(opened, lies)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                elif image.mode == "I" and opened.format in SIXTEEN_AS_I:
                    image = image.convert("I;16")
        except DECODE_FAULTS as error:
            fault = DataError(f"the image does not decode: {fault_text(error)}", where=_where(record))
        except DataError as error:
            fault = error
        for ending, box in self._tiling.boxes(*size):
            tile = replace(record, key=record.key + ending, where=f"{_where(record)}{ending}", fault=fault)
            if fault is None:
                data = _as_tiff(image.crop(box))
                meta = record.meta | {"tile": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
                tile = replace(tile, image=data, size=len(data), meta=meta)
            yield tile


def _named(record: Record) -> Record:
    """Add a `concept`, the unit of confidence intervals: existing concept, else family, else the image's key."""
    named = (record.meta.get(name) for name in ("concept", "family"))
    concept = next((value for value in named if value is not None), record.key)
    return replace(record, meta=record.meta | {"concept": concept})


def _opened(contents: Contents) -> Image.Image:
    return open_any_size(contents if isinstance(contents, Path) else io.BytesIO(contents_of(contents)))


def _as_tiff(tile: Image.Image) -> bytes:
    """Encode a tile as TIFF with its full bit depth; workers convert it to PNG like any TIFF."""
    buffer = io.BytesIO()
    tile.info = {}
    tile.save(buffer, "TIFF")
    return buffer.getvalue()


def _where(record: Record) -> str:
    return str(record.image) if isinstance(record.image, Path) else record.where or record.key
