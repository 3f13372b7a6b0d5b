"""Indices of shards, and tars that must be refused."""

import io
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_scale.config import DatasetConfig
from m3i_scale.data.index import build_index, load_index
from m3i_scale.data.reader import BadSampleError, ShardReader, parse_members, plain_members
from m3i_scale.data.scan import head_of, parse_index, save_index, scan_shard
from m3i_scale.data.shards import expand_shards, read_label_sets
from m3i_scale.errors import DataError


def test_ranges_hold_whole_samples(tools, tmp_path):
    path = tools.write_tar(
        tmp_path / "s.tar",
        [("a.png", b"1" * 600), ("a.txt", b"one"), ("__meta__.json", b"{}"), ("b.png", b"2"), ("dir/c.png", b"3")],
    )
    index, reader = scan_shard(path), ShardReader()
    assert len(index) == 3
    assert reader.members(index, 0) == {"__key__": "a", "__url__": str(path), "png": b"1" * 600, "txt": b"one"}
    assert reader.members(index, 2)["__key__"] == "dir/c"
    reader.close()


def test_long_names_are_kept(tools, tmp_path):
    key = "x" * 300
    index = scan_shard(tools.write_tar(tmp_path / "s.tar", [("a.png", b"1"), (f"{key}.png", b"2")]))
    assert ShardReader().members(index, 1)["__key__"] == key


def test_data_after_the_end_of_a_tar_are_an_error(tools, tmp_path):
    path = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    other = tools.write_tar(tmp_path / "other" / "t.tar", [("b.png", b"2")])
    path.write_bytes(path.read_bytes() + other.read_bytes())  # as `cat` joins them
    for read in (scan_shard, lambda path: load_index([path], tmp_path / "cache")):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.where == str(path)
    with tarfile.open(path, ignore_zeros=True) as both:  # as the fix recommends
        assert both.getnames() == ["a.png", "b.png"]


def test_padding_of_any_length_is_no_data_and_is_looked_at_once(tools, tmp_path, monkeypatch):
    path = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    path.write_bytes(path.read_bytes() + bytes(2**20))
    assert len(load_index([path], tmp_path / "cache")[0]) == 1
    monkeypatch.setattr("m3i_scale.data.index.scan_shard", None)
    assert len(load_index([path], tmp_path / "cache")[0]) == 1


def test_a_compressed_piece_is_not_unpacked(tools, tmp_path):
    """A member name that starts like a compressed file must not make tarfile decompress."""
    piece = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")]).read_bytes()[:513]
    assert parse_members(piece, "s.tar", head_of(piece))["png"] == b"1"
    plain = tools.write_tar(tmp_path / "s.tar", [("BZh91AY&SY.png", b"1")]).read_bytes()[:513]
    with_prefix = plain[:345] + b"folder" + plain[351:]
    assert plain_members(plain) is not None
    assert plain_members(with_prefix) is None
    for crafted in (plain, with_prefix):
        with pytest.raises(BadSampleError) as caught:
            parse_members(crafted, "s.tar", head_of(crafted))
        assert caught.value.detail == "compressed"


def test_other_headers_than_the_indexed_ones_are_no_sample(tools, tmp_path):
    long = "x" * 200  # for tarfile
    for name in ("a.png", f"{long}.png"):
        piece = tools.write_tar(tmp_path / "s.tar", [(name, b"1")]).read_bytes()
        piece = piece[: scan_shard(tmp_path / "s.tar").ranges_N2[0, 1]]
        assert parse_members(piece, "s.tar", head_of(piece))["png"] == b"1"
        with pytest.raises(BadSampleError):
            parse_members(piece, "s.tar", head_of(piece) ^ 1)


def test_index_lies_beside_the_shards_or_in_the_cache(tools, tmp_path):
    path = tools.write_tar(tmp_path / "data" / "s.tar", [("a.png", b"1")])
    (built,) = load_index([path], tmp_path / "cache")
    assert not (tmp_path / "data" / "index").exists()
    assert np.array_equal(
        built.ranges_N2, load_index([path], tmp_path / "cache", rank=1, wait_timeout_s=0)[0].ranges_N2
    )
    build_index([path], tmp_path / "data" / "index")
    assert len(load_index([path], tmp_path / "other")[0]) == 1
    assert not (tmp_path / "other").exists()


def test_a_stale_index_is_built_anew(tools, tmp_path):
    path = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    build_index([path], tmp_path / "index")
    tools.write_tar(path, [(f"{number}.png", b"1") for number in range(30)])
    assert len(load_index([path], tmp_path / "cache")[0]) == 30


def test_a_damaged_index_is_named(tools, tmp_path):
    path = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    build_index([path], tmp_path / "index")
    saved = tmp_path / "index" / "s.tar.npz"
    whole = saved.read_bytes()
    for damaged in (b"junk", b"", whole[: len(whole) // 2], whole[:-1], whole.replace(b"<i8", b"<U8", 1)):
        saved.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            load_index([path], tmp_path / "cache")
        assert caught.value.where == str(saved)


def test_no_changed_bit_of_an_index_goes_by_as_another_index(tools, tmp_path):
    index = scan_shard(tools.write_tar(tmp_path / "s.tar", [("a.png", b"1"), ("b.png", b"2")]))
    save_index(index, tmp_path / "s.npz")
    whole, refused = (tmp_path / "s.npz").read_bytes(), 0
    for place in range(0, len(whole), 2):
        data = bytearray(whole)
        data[place] ^= 1 << place // 2 % 8
        try:
            found = parse_index(index.path, bytes(data))
        except ValueError:
            refused += 1
        else:
            assert found is not None
            assert np.array_equal(found.ranges_N2, index.ranges_N2)
            assert (found.size, found.version, found.digest) == (index.size, index.version, index.digest)
    assert refused > len(whole) // 4


def index_file(path: Path, **parts: bytes | np.ndarray) -> Path:
    """An index of which every part is as given; bytes are those of the part's own file."""
    whole = {
        **{"format": np.int64(2), "size": np.int64(path.stat().st_size), "ranges": np.array([[0, 1024]])},
        **{"heads": np.zeros(1, np.uint32), "version": np.str_(path.stat().st_mtime_ns)},
    }
    saved = path.parent / "index" / f"{path.name}.npz"
    saved.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(saved, "w") as archive:
        for name, part in (whole | parts).items():
            buffer = io.BytesIO()
            if not isinstance(part, bytes):
                np.lib.format.write_array(buffer, np.asarray(part), allow_pickle=False)
            archive.writestr(f"{name}.npy", part if isinstance(part, bytes) else buffer.getvalue())
    return saved


def array_header(shape: tuple[int, ...], kind: str = "<i8") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "parts",
    [
        {"ranges": array_header((1 << 50, 2))},
        {"ranges": array_header((1, 2), "|O") + bytes(16)},
        {"ranges": array_header((1, 2)).replace(b"(1, 2)", b"((((((") + bytes(16)},
        {"ranges": np.array([[-512, 1024]])},
        {"ranges": np.array([[0, 1 << 60]])},
        {"ranges": np.array([[1024, 512]])},
        {"ranges": np.array([[0.0, 1024.0]])},
        {"heads": np.zeros(2, np.uint32)},
        {"size": np.zeros(3, np.int64)},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_a_hostile_index_is_refused_before_anything_is_read_by_it(tools, tmp_path, parts):
    path = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    saved = index_file(path, **parts)
    with pytest.raises(DataError) as caught:
        load_index([path], tmp_path / "cache")
    assert caught.value.where == str(saved)


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [1, 0, 2], [0, 0]])
def test_an_index_that_lists_a_sample_twice_is_refused(tools, tmp_path, order):
    path = tools.write_tar(tmp_path / "s.tar", [(f"{number}.png", b"1") for number in range(3)])
    (whole,) = build_index([path], tmp_path / "index")
    saved = tmp_path / "index" / "s.tar.npz"
    save_index(replace(whole, ranges_N2=whole.ranges_N2[order], heads_N=whole.heads_N[order]), saved)
    with pytest.raises(DataError) as caught:
        load_index([path], tmp_path / "cache")
    assert caught.value.where == str(saved)


def test_other_ranks_wait_for_rank_zero(tools, tmp_path):
    path = tools.write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    found = []
    waiting = threading.Thread(target=lambda: found.extend(load_index([path], tmp_path / "cache", rank=1)))
    waiting.start()
    load_index([path], tmp_path / "cache", rank=0)
    waiting.join(timeout=300)
    assert [len(index) for index in found] == [1]
    with pytest.raises(DataError) as caught:
        load_index([path], tmp_path / "nowhere", rank=1, wait_timeout_s=0)
    assert str(caught.value.where).endswith("/s.tar")


def test_shards_by_folder_pattern_and_path(folder):
    assert len(expand_shards(str(folder))) == 10
    assert [path.name for path in expand_shards(f"{folder}/s-{{000..002}}.tar")] == [
        "s-000.tar",
        "s-001.tar",
        "s-002.tar",
    ]
    assert len(expand_shards(f"{folder}/s-003.tar")) == 1


def test_shards_that_are_not_there(folder, tmp_path):
    with pytest.raises(DataError) as caught:
        expand_shards(f"{folder}/s-{{000..011}}.tar")
    assert str(caught.value.where).endswith("/s-010.tar")
    assert "2 of 12" in caught.value.what
    with pytest.raises(DataError) as caught:
        expand_shards(f"{folder}/s-{{000,000}}.tar")
    assert str(caught.value.where).endswith("/s-{000,000}.tar")
    with pytest.raises(DataError) as caught:
        expand_shards(f"{folder}/s-{{000..")
    assert str(caught.value.where).endswith("/s-{000..")
    for empty in (folder.parent, tmp_path):
        with pytest.raises(DataError) as caught:
            expand_shards(str(empty))
        assert caught.value.where == f"shards: {empty}"


def test_label_sets(folder, tools, tmp_path):
    other = tools.write_folder(tmp_path / "other", [1], labels=["x"])
    bare = tools.write_folder(tmp_path / "bare", [1])
    (bare / "labels.json").unlink()
    sources = {
        "a": DatasetConfig(path=str(folder)),
        "b": DatasetConfig(path=str(other)),
        "c": DatasetConfig(path=str(bare)),
    }
    assert read_label_sets(sources) == {"a": ["a", "b", "c"], "b": ["x"]}
    clash = {name: DatasetConfig(path=str(path), label_set="same") for name, path in (("a", folder), ("b", other))}
    with pytest.raises(DataError) as caught:
        read_label_sets(clash)
    assert str(caught.value.where).endswith("/other/labels.json")
    assert "'same'" in caught.value.what
    for broken in ("{}", "[" * 100_000):
        (other / "labels.json").write_text(broken)
        with pytest.raises(DataError) as caught:
            read_label_sets(sources)
        assert "labels.json" in caught.value.where
