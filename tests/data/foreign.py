"""Shards as others make them: by hand, by GNU tar, by img2dataset; some odd but legal, some hostile."""

import io
import json
import struct
import subprocess
import tarfile
import zlib

import numpy as np
from PIL import Image

BLOCK = tarfile.BLOCKSIZE


def image_bytes(seed=0, size=(20, 16), kind="JPEG", mode="RGB"):
    """A noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def mask_bytes(size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("L", size, 1).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(side):
    """A PNG whose header claims side × side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def sample(key, seed=0, **members):
    """(name, bytes) pairs of one sample: a picture, a caption, a label, unless told otherwise."""
    content = {"jpg": image_bytes(seed), "txt": f"picture {key}".encode(), "cls": str(seed % 3).encode()}
    content |= {name.replace("__", "."): data for name, data in members.items()}
    return [(f"{key}.{name}", data) for name, data in content.items() if data is not None]


def write_tar(path, members, **options):
    """members: (name, bytes) pairs, or whole TarInfo headers with bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime, info.uid, info.uname = 1_700_000_000, 1000, "somebody"
            tar.addfile(info, io.BytesIO(data))
    return path


def gnu_tar(folder, path, *options):
    """What `tar cf` makes of a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-cf", str(path), "-C", str(folder), *options, "."], check=True)
    return path


def img2dataset_folder(folder, shards=2, per_shard=4, broken=True):
    """The layout of img2dataset's `webdataset` output: tars, a table and statistics per shard."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    for shard in range(shards):
        rows, members = [], []
        for number in range(per_shard):
            key = f"{shard:05d}{number:04d}"
            failed = broken and number == 2
            facts = {
                "url": f"https://example.org/{key}.jpg",
                "caption": f"a photo, number {number} of {shard}",
                "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404" if failed else None,
                "width": None if failed else 20,
                "height": None if failed else 16,
                "sha256": None,
            }
            rows.append(facts)
            if not failed:
                members += [
                    (f"{key}.jpg", image_bytes(10 * shard + number)),
                    (f"{key}.json", json.dumps(facts).encode()),
                    (f"{key}.txt", facts["caption"].encode()),
                ]
        write_tar(folder / f"{shard:05d}.tar", members)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        successes = sum(row["status"] == "success" for row in rows)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": per_shard, "successes": successes}))
    return folder


def raw_header(name, size=0, kind=b"0"):
    """A header as nobody writes it: any size, also a negative one."""
    info = tarfile.TarInfo(name)
    info.type = kind
    buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = (256**12 + size).to_bytes(12, "big") if size < 0 else b"%011o\0" % size
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    return bytes(buffer)


def pax_record(name, value):
    """An extended header with one record."""
    body = f" {name}={value}\n"
    length = len(body) + len(str(len(body) + 2))
    record = f"{length}{body}".encode()
    return raw_header("pax", len(record), b"x") + record.ljust(-(-len(record) // BLOCK) * BLOCK, b"\0")


def by_webdataset(path):
    """Samples as webdataset itself reads them."""
    import webdataset

    return {item["__key__"]: item for item in webdataset.WebDataset([str(path)], shardshuffle=False)}
