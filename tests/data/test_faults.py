"""Every fault of a sample: skipped, replaced, counted by reason and written down; order and batches as without it."""

import itertools
import json
import os
import struct
import zlib

import numpy as np
import pytest

from m3i_scale.data.batch import Batch
from m3i_scale.data.scan import scan_shard
from m3i_scale.data.state import Quarantine
from m3i_scale.errors import DataError

MAX_SAMPLE_BYTES, MAX_CAPTION_BYTES = 1_000_000, 5_000


def bomb():
    """A whole PNG of 20,990 × 29,700 pixels: one bit each, so that it is small until it is decoded."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = 20_990, 29_700
    packer, row = zlib.compressobj(1), bytes(1 + -(-width // 8))
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def without_image(members):
    return {kind: data for kind, data in members.items() if kind != "png"}


FAULTS = {
    3: ("image does not decode", lambda members: {**members, "png": members["png"][:30] + b"\0" * 40}),
    11: ("image does not decode", lambda members: {**members, "png": members["png"][:-40]}),
    17: ("image too large", lambda members: {**members, "png": bomb()}),
    22: ("label out of range", lambda members: {**members, "cls": b"3"}),
    29: ("label is not an integer", lambda members: {**members, "cls": b"three"}),
    34: ("caption is not UTF-8", lambda members: {**members, "txt": b"\xff\xfe"}),
    38: ("sample too large", lambda members: {**members, "json": bytes(MAX_SAMPLE_BYTES)}),
    41: ("no image", without_image),
    44: ("caption too large", lambda members: {**members, "txt": b"a" * (MAX_CAPTION_BYTES + 1)}),
}
UNREAD = 38
"""A sample of which nothing is known but where it lies."""
EMPTY_CAPTION = 46


def spoil(number, members):
    if number == EMPTY_CAPTION:
        return {**members, "txt": b" \n"}
    return FAULTS[number][1](members) if number in FAULTS else members


@pytest.fixture(scope="module")
def spoilt(tools, tmp_path_factory):
    return tools.write_folder(tmp_path_factory.mktemp("spoilt"), [6] * 8, change=spoil)


def two_passes(tools, folder, cache, world, workers, quarantine=None):
    """Global batches over a little more than two passes, and the loaders of all ranks."""
    loaders = [
        tools.make_loader(
            {"s": folder},
            cache,
            world=world,
            rank=rank,
            micro=8 // world,
            streams=4,
            workers=workers,
            max_corrupt_fraction=0.5,
            max_sample_bytes=MAX_SAMPLE_BYTES,
            max_caption_bytes=MAX_CAPTION_BYTES,
            quarantine=quarantine,
        )
        for rank in range(world)
    ]
    taken = [list(itertools.islice(loader, 12)) for loader in loaders]
    return [Batch.cat(list(parts)) for parts in zip(*taken, strict=True)], loaders


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_faults_are_replaced_counted_and_written_down(tools, spoilt, cache, tmp_path, world, workers):
    path = tmp_path / "quarantine.jsonl"
    batches, loaders = two_passes(tools, spoilt, cache, world, workers, path)
    assert [len(batch) for batch in batches] == [8] * 12
    expected, _ = two_passes(tools, spoilt, cache, 1, 0)
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]

    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(entry["key"], entry["reason"]) for entry in entries} == {
        ("?" if number == UNREAD else f"k{number:04d}", reason) for number, (reason, _) in FAULTS.items()
    }
    assert len(entries) == len(FAULTS)
    assert set().union(*(loader.quarantined for loader in loaders)) == {reason for reason, _ in FAULTS.values()}
    for entry in entries:
        number = UNREAD if entry["key"] == "?" else int(entry["key"][1:])
        assert entry["url"] == str(spoilt / f"s-{number // 6:03d}.tar")
        assert entry["offset"] == scan_shard(spoilt / f"s-{number // 6:03d}.tar").ranges_N2[number % 6, 0]


def test_the_good_samples_come_in_the_order_in_which_they_would_come_without_the_bad(tools, spoilt, cache, tmp_path):
    whole = tools.write_folder(tmp_path / "whole", [6] * 8)
    found, _ = two_passes(tools, spoilt, cache, 1, 0)
    wanted, _ = two_passes(tools, whole, cache, 1, 0)
    bad = {f"k{number:04d}" for number in FAULTS}
    per_stream = 2
    for stream in range(4):
        rows = slice(stream * per_stream, (stream + 1) * per_stream)
        good = [key for batch in wanted for key in batch.keys[rows] if key.rsplit("/", 1)[1] not in bad]
        got = [key for batch in found for key in batch.keys[rows]]
        assert got[: len(good)] == good


def test_of_a_sample_that_is_too_large_nothing_is_read(tools, spoilt, cache, monkeypatch):
    sizes, read = [], os.pread

    def noted(descriptor, size, offset):
        sizes.append(size)
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", noted)
    two_passes(tools, spoilt, cache, 1, 0)
    assert 0 < max(sizes) <= MAX_SAMPLE_BYTES


def test_an_empty_caption_is_an_absent_one(tools, spoilt, cache):
    batches, loaders = two_passes(tools, spoilt, cache, 1, 0)
    rows = {key[-5:]: captions for batch in batches for key, captions in zip(batch.keys, batch.captions_B, strict=True)}
    assert f"k{EMPTY_CAPTION:04d}" in rows
    assert not any("caption is empty" in reason for reason in loaders[0].quarantined)


def test_a_key_that_is_not_utf8_is_a_fault_like_others(tools, tmp_path, cache):
    folder = tmp_path / "keys"
    for shard in range(4):
        members = [(f"k{shard}{number}.png", tools.encode(number)) for number in range(4)]
        tools.write_tar(folder / f"s-{shard}.tar", [*members, (f"x{shard}\udcff.png", tools.encode(9))])
    path = tmp_path / "quarantine.jsonl"
    loader = tools.make_loader({"s": folder}, cache, streams=4, max_corrupt_fraction=0.5, quarantine=path)
    assert [len(batch) for batch in itertools.islice(loader, 6)] == [8] * 6
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["reason"] for entry in entries} == {"key is not UTF-8"}
    assert {entry["key"] for entry in entries} == {rf"x{shard}\udcff" for shard in range(4)}


def test_too_many_stop_the_run_with_the_table(tools, spoilt, cache, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    limits = {"max_sample_bytes": MAX_SAMPLE_BYTES, "max_caption_bytes": MAX_CAPTION_BYTES}
    loader = tools.make_loader({"s": spoilt}, cache, streams=4, max_corrupt_fraction=0.1, quarantine=path, **limits)
    with pytest.raises(DataError) as caught:
        list(itertools.islice(loader, 40))
    for reason in {reason for reason, _ in FAULTS.values()}:
        assert reason in caught.value.why
    assert caught.value.where == str(path)


def test_no_damage_to_an_image_gets_through_as_another_error(tools):
    from m3i_scale.config import AugmentConfig
    from m3i_scale.data.reader import BadSampleError
    from m3i_scale.data.samples import open_image
    from m3i_scale.data.views import ViewMaker

    views = ViewMaker(AugmentConfig(), views=1, image_size=8, augment=True)
    random_numbers = np.random.default_rng(0)
    outcomes = set()
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = tools.encode(size=(40, 32), kind=kind)
        for _ in range(300):
            data = bytearray(whole[: random_numbers.integers(1, len(whole) + 1)])
            for place in random_numbers.integers(0, min(len(data), 200), 3):
                data[place] = random_numbers.integers(0, 256)
            try:
                views(open_image({"png": bytes(data)}, 10**6), 1)
                outcomes.add("good")
            except BadSampleError as error:
                outcomes.add(error.reason)
    assert "image does not decode" in outcomes


def test_foreign_lines_of_the_quarantine_file_count_for_nothing_and_one_on_its_way_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    entry = {"url": "s-0.tar", "key": "k", "offset": 0, "reason": "image does not decode"}
    foreign = [{**entry, name: [value]} for name, value in entry.items()]
    line = json.dumps(entry)
    path.write_text("".join(json.dumps(one) + "\n" for one in foreign) + line[:20])
    opened = Quarantine(path)
    with path.open("a") as stream:  # the other rank ends its line
        stream.write(line[20:] + "\n")
    before = path.read_bytes()
    opened.add([entry])
    assert path.read_bytes() == before
