"""The same samples in the layout that every library reads; made once, so that all are compared on the same bytes.

A sample is an image and a number, 0 … N − 1, which stands for its category and tells afterwards which samples came.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from webdataset.writer import TarWriter

from m3i_scale.data.index import build_index
from m3i_scale.errors import ConfigError, DataError

SHARDS = 64
"""A multiple of the streams, so that each stream holds as many samples as the others, and a pass ends at sample N."""


@dataclass(frozen=True)
class Corpus:
    """Where the samples lie. Every layout is a folder of its own, empty where nobody reads it."""

    folder: Path
    samples: int
    """N."""
    kind: str
    """png or jpg."""

    @property
    def shards(self) -> list[Path]:
        """Of the tar layout, in order."""
        return sorted((self.folder / "tar").glob("*.tar"))

    def encoded(self) -> Iterator[tuple[int, bytes]]:
        """Number and image bytes of every sample, in the order of their numbers."""
        for shard in self.shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(self.kind):
                        stream = tar.extractfile(member)
                        if stream is not None:
                            yield int(member.name.split(".")[0]), stream.read()


def make_corpus(source: Path, folder: Path, samples: int, kind: str, crop: int) -> Corpus:
    """Shards of `samples` samples, rounded down to equal ones, from the images of other shards, over and over.

    Raises:
        DataError: no images there, or smaller ones than the crop.
        ConfigError: fewer samples than shards.
    """
    if samples < SHARDS:
        raise ConfigError(f"{samples} samples do not fill {SHARDS} shards", where="--samples")
    images = _images(source, kind, crop)
    corpus = Corpus(folder, samples // SHARDS * SHARDS, kind)
    (folder / "tar").mkdir(parents=True)
    each = corpus.samples // SHARDS
    for shard in range(SHARDS):
        with TarWriter(str(folder / "tar" / f"{shard:03d}.tar"), encoder=False) as tar:
            for number in range(shard * each, (shard + 1) * each):
                name = f"{number:08d}"
                tar.write({"__key__": name, kind: images[number % len(images)], "cls": str(number).encode()})
    (folder / "tar" / "labels.json").write_text(json.dumps([str(number) for number in range(corpus.samples)]))
    build_index(corpus.shards, folder / "tar" / "index")
    return corpus


def _images(source: Path, kind: str, crop: int) -> list[bytes]:
    found = []
    for shard in sorted(source.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, _, extension = Path(member.name).name.partition(".")
                stream = tar.extractfile(member) if extension in ("png", "jpg", "jpeg") and stem else None
                if stream is not None:
                    found.append(_as_kind(stream.read(), kind, crop, f"{shard}: {member.name}"))
    if not found:
        raise DataError("no shards with images", where=str(source), fix="name the folder that holds the .tar files")
    return found


def _as_kind(data: bytes, kind: str, crop: int, where: str) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) < crop:
            raise DataError(f"an image of {image.size} pixels is smaller than the crop of {crop}", where=where)
        if (image.format, kind) in (("PNG", "png"), ("JPEG", "jpg")):
            return data
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind], quality=90)
        return buffer.getvalue()


def write_files(corpus: Corpus) -> None:
    """Loose files, a thousand in a folder."""
    for number, data in corpus.encoded():
        path = corpus.folder / "files" / f"{number // 1000:05d}" / f"{number:08d}.{corpus.kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_energon(corpus: Corpus) -> None:
    """The tar layout once more, by links, with the database that Energon's own tool makes."""
    folder = corpus.folder / "energon"
    folder.mkdir()
    for shard in corpus.shards:
        os.link(shard, folder / shard.name)
    tool = str(Path(sys.executable).parent / "energon")
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--no-progress", "--num-workers", "2"]
    subprocess.run([tool, "prepare", str(folder), *options, "--sample-type", "CrudeWebdataset"], check=True)


def write_streaming(corpus: Corpus) -> None:
    """MDS, the format of mosaicml-streaming, with its own kinds of images kept as they are."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "number": "int"}
    with MDSWriter(out=str(corpus.folder / "streaming"), columns=columns) as writer:
        for number, data in corpus.encoded():
            writer.write({"image": data, "number": number})


def write_litdata(corpus: Corpus) -> None:
    """Chunks of litdata."""
    from litdata.streaming import Cache

    cache = Cache(str(corpus.folder / "litdata"), chunk_bytes="32MB")
    for number, data in corpus.encoded():
        cache[number] = {"image": data, "number": number}
    cache.done()
    cache.merge()
