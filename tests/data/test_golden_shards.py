"""The same input gives the same shards, to the byte, in every version of the package."""

import csv
import hashlib
import json
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from foreign import img2dataset_folder, write_tar
from typer.testing import CliRunner

from m3i_scale.cli import app


def png(number, channels=3, side=6):
    """A PNG that no library wrote: its data are stored, so no version of zlib packs them differently."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((number * 7 + x + y) % 251 for x in range(side * channels)) for y in range(side))
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    data = stored + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", side, side, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder of classes, one of splits, two tables, a data set, foreign shards and what img2dataset wrote."""
    for number in range(30):
        for root in ("classes/{0}", "splits/train/{0}", "splits/val/{0}"):
            folder = tmp_path / root.format(["cat", "dög", "un known"][number % 3])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"p{number:02d}.png").write_bytes(png(number))
            (folder / f"p{number:02d}.txt").write_text(f"picture {number} ü")
    masks = tmp_path / "masks"
    masks.mkdir()
    rows = []
    for number in range(40):
        (masks / f"{number}.png").write_bytes(png(number, 1))
        path = f"classes/cat/p{number % 10 * 3:02d}.png"
        label = [None, "a", "b"][number % 3]
        mask = f"masks/{number}.png" if number % 2 else None
        rows.append({"path": path, "caption": f"words {number}", "label": label, "seg": mask, "family": f"f{number}"})
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    split = [{**row, "split": ["one", "two"][number % 2]} for number, row in enumerate(rows)]
    (tmp_path / "split.jsonl").write_text("\n".join(map(json.dumps, split)), encoding="utf-8")
    pictures = [{"image": {"bytes": png(n), "path": None}, "text": f"row {n}", "who": n // 4} for n in range(50)]
    (tmp_path / "hub").mkdir()
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002")):
        table = pyarrow.Table.from_pylist(pictures[25 * number : 25 * number + 25])
        pyarrow.parquet.write_table(table, tmp_path / "hub" / f"{name}.parquet")
    (tmp_path / "wds").mkdir()
    for shard in range(3):
        members = []
        for number in range(12 * shard, 12 * shard + 12):
            content = {"png": png(number), "txt": b"hello", "cls": b"1", "json": b'{"who": %d}' % (number // 3)}
            members += [(f"k{number:03d}.{kind}", data) for kind, data in content.items()]
        write_tar(tmp_path / "wds" / f"{shard}.tar", members)
    (tmp_path / "wds" / "labels.json").write_text('["x", "y"]')
    monkeypatch.setattr("foreign.image_bytes", png)
    img2dataset_folder(tmp_path / "i2d", shards=3)
    (tmp_path / "odd").mkdir()
    good = (tmp_path / "wds" / "0.tar").read_bytes()
    write_tar(tmp_path / "odd" / "0.tar", [("a.png", png(1)), ("b.png", b"junk"), ("c.png", png(2)), ("c.txt", b"c")])
    scattered = [("a1.png", png(3)), ("b1.png", png(4)), ("a1.txt", b"one"), ("b1.txt", b"two")]
    write_tar(tmp_path / "odd" / "1.tar", scattered)
    (tmp_path / "odd" / "2.tar").write_bytes(good)
    return tmp_path


def digest(folder):
    """Of all files that the version of no library changes; of an index, of what it says of the samples."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "shards.json" and "tokenizer" not in path.parts:
            content = path.read_bytes()
            if path.suffix == ".npz":
                with np.load(path) as index:
                    content = index["ranges"].astype("<i8").tobytes() + index["heads"].astype("<u4").tobytes()
            total.update(f"{path.relative_to(folder).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


FEW = "--samples-per-shard 7 --multiple-of 2 --workers 1"


@pytest.mark.parametrize(
    ("arguments", "golden"),
    [
        (f"make imagefolder --input classes {FEW} --split train=0.7,val=0.3", "39a497a5915961ad"),
        (f"make imagefolder --input splits {FEW} --name s --vocabulary 0", "7482a9ab15f37db8"),
        (f"make manifest --input table.csv --mask-column seg {FEW} --split train=0.5,val=0.5", "e7f364fde48345ee"),
        (f"make manifest --input split.jsonl {FEW}", "de36d30f7bb3330e"),
        (f"make huggingface --input hub --group-column who {FEW}", "b3dd63dad29d2846"),
        (f"make webdataset --input wds {FEW} --split a=0.5,b=0.5 --group who", "ae73b4471f392c05"),
        (f"split wds {FEW} --shares a=0.5,b=0.5", "7f6c7ca962c2aa20"),
        ("split wds --shards 5 --keep-order --workers 1", "8b68cf4bfa9cae1f"),
        (f"merge wds i2d {FEW} --keys prefix", "d2a3dc09cfc2b9dc"),
        ("check odd --repair OUTPUT --link --workers 1", "4228568673aaa7fe"),
    ],
)
def test_the_bytes_are_those_of_before(given, monkeypatch, arguments, golden):
    monkeypatch.chdir(given)
    words = ["shards", *arguments.replace("OUTPUT", "out").split()]
    if "--repair" not in words:
        words += ["--output", "out"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == (2 if "--repair" in words else 0), (done.output, done.exception)
    assert digest(given / "out") == golden
