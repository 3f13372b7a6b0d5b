"""Headers of hostile tars: none ends a tool or hangs it, and what is called sound is sound for the loader."""

import io
import tarfile

import foreign
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from m3i_scale.data.scan import scan_shard
from m3i_scale.data.tar import MAX_NAME
from m3i_scale.errors import DataError
from m3i_scale.shards.existing_shards import key_at, read_members, read_shard
from m3i_scale.shards.rearrange import copy_samples
from m3i_scale.text import printable

GOOD = foreign.raw_header("a.jpg", 5) + b"hello".ljust(foreign.BLOCK, b"\0")
END = bytes(2 * foreign.BLOCK)
LONG_NAME = foreign.raw_header("n", 4_001, b"L") + (b"a/" * 2_000).ljust(4_096, b"\0")
many = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def reasons(path):
    shard = read_shard(path)
    return {fault.reason for fault in [*shard.problems, *(f for sample in shard.samples for f in sample.problems)]}


def sparse_member() -> bytes:
    """A sparse file of a terabyte in GNU's form 1.0, with its map in the data."""
    member = tarfile.TarInfo("b.jpg")
    member.size = 512
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"}
    return member.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n1\n".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD + foreign.raw_header("b.jpg", -1024) + END, "damaged header"),
        (GOOD + foreign.raw_header("p", -512, b"x") + END, "damaged header"),
        (GOOD + foreign.pax_record("size", -2048) + foreign.raw_header("b.jpg") + END, "damaged header"),
        (GOOD + foreign.raw_header("p", 2**20, b"x") + bytes(2**20) + END, "damaged header"),
        (GOOD + foreign.pax_record("comment", "a" * 19_997) + foreign.raw_header("b.jpg") + END, "damaged header"),
        (GOOD + foreign.raw_header("p", 0, b"x") * 5_000 + END, "damaged header"),
        (GOOD + foreign.raw_header("b.jpg", 2**33 - 1) + END, "cut off"),
        (GOOD + foreign.raw_header("b.jpg", 512, b"S") + bytes(512) + END, "member is sparse"),
        (GOOD + sparse_member() + END, "member is sparse"),
        (GOOD + foreign.pax_record("GNU.sparse.size", 10**12) + foreign.raw_header("b.jpg") + END, "member is sparse"),
        *((GOOD + foreign.raw_header("b.jpg", 0, kind) + END, "link or device") for kind in (b"1", b"2", b"3", b"6")),
        (GOOD + foreign.raw_header("/b.jpg") + END, "path leaves the folder"),
        (GOOD + foreign.raw_header("../b.jpg") + END, "path leaves the folder"),
        (GOOD + foreign.raw_header("x/../../b.jpg") + END, "path leaves the folder"),
        (GOOD + LONG_NAME + foreign.raw_header("b.jpg") + END, "name is too long"),
        (GOOD + foreign.raw_header("b.__key__") + END, "member has a reserved name"),
        (GOOD + GOOD + END, "duplicate member"),
        (GOOD + foreign.raw_header("b.jpg") + GOOD + END, "duplicate key in the shard"),
        (
            GOOD + foreign.raw_header("b.jpg") + foreign.raw_header("a.txt") + END,
            "members are not consecutive",
        ),
        (GOOD + END + GOOD + END, "data after the end of the tar"),
        (GOOD + b"x" * 512 + END, "damaged header"),
        (GOOD, "cut off"),
        (GOOD[:700], "cut off"),
        (GOOD + GOOD[:400], "cut off"),
        (GOOD[:100], "shard is not a tar"),
        (b"", "shard is not a tar"),
        (b"\x1f\x8b" + bytes(600), "shard is compressed"),
        (END, "shard holds no samples"),
    ],
)
def test_faults_have_names_and_training_refuses_those_of_the_tar(tmp_path, data, reason):
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    assert reason in reasons(path)
    if reason in ("member has a reserved name", "duplicate member"):  # the content will show it
        assert len(scan_shard(path)) > 0
    else:
        with pytest.raises(DataError) as caught:
            scan_shard(path)
        assert caught.value.where == str(path)


def test_a_shard_that_is_not_there(tmp_path):
    assert reasons(tmp_path / "s.tar") == {"shard cannot be read"}


def test_names_that_are_no_text_or_no_end(tmp_path):
    header = tarfile.TarInfo("\udcff.jpg")
    path = foreign.write_tar(tmp_path / "s.tar", [(header, b"1")], format=tarfile.GNU_FORMAT)
    assert reasons(path) == {"name is not UTF-8"}
    path = foreign.write_tar(tmp_path / "t.tar", [(f"{'x' * MAX_NAME}.jpg", b"1")])
    assert reasons(path) == {"name is too long"}
    assert printable("a\x1b[31m\udcff\n") == "a\\x1b[31m\\udcff\\n"


def test_a_global_header_that_renames_is_a_fault(tmp_path):
    path = tmp_path / "s.tar"
    record = foreign.pax_record("path", "b.jpg")
    path.write_bytes(record[:156] + b"g" + record[157:])
    header = bytearray(record[:512])
    header[156:157] = b"g"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + record[512:] + GOOD + END)
    assert "global header renames members" in reasons(path)


name_parts = st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=12)
folders = st.lists(name_parts, max_size=2).map(lambda parts: "".join(f"{part}/" for part in parts))
keys = (
    st.tuples(folders, st.one_of(name_parts, st.just("k" * 150)))
    .map("".join)
    .filter(
        lambda key: not key.startswith("__")  # what webdataset skips
    )
)
extensions = st.sampled_from(["jpg", "PNG", "txt", "cls", "json", "seg.png"])
samples = st.dictionaries(
    keys, st.dictionaries(extensions, st.binary(max_size=1500), min_size=1, max_size=3), min_size=1, max_size=5
)
formats = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@many
@given(samples, formats, st.booleans())
def test_legal_tars_are_read_as_webdataset_reads_them(tmp_path, content, kind, folders_too):
    members = [(f"{key}.{extension}", data) for key, parts in content.items() for extension, data in parts.items()]
    path = foreign.write_tar(tmp_path / "s.tar", members, format=kind)
    if folders_too:
        with tarfile.open(path, "a") as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    files = ({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(path.read_bytes())))
    theirs = {item.pop("__key__"): {k: v for k, v in item.items() if k != "__url__"} for item in group_by_keys(files)}
    shard = read_shard(path)
    with path.open("rb") as stream:
        ours = {sample.key: read_members(stream, sample) for sample in shard.samples}
    assert shard.problems == []
    assert ours == theirs
    assert all(key_at(path, sample.start) == printable(sample.key) for sample in shard.samples)


@many
@given(st.data())
def test_damage_never_raises_and_what_is_sound_is_sound_for_the_loader(tmp_path, data):
    path = foreign.write_tar(tmp_path / "s.tar", [pair for n in range(3) for pair in foreign.sample(f"k{n}", txt=b"x")])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the headers' fields, where it hurts.
        block = data.draw(st.integers(0, len(content) // foreign.BLOCK - 1)) * foreign.BLOCK
        place = block + data.draw(st.sampled_from([0, 3, 100, 124, 125, 130, 135, 148, 150, 156, 257, 345, 400]))
        content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
        if data.draw(st.booleans()):
            _mend_checksum(content, block)
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path.write_bytes(content)
    shard = read_shard(path)
    if not reasons(path):
        assert np.array_equal(
            scan_shard(path).ranges_N2,
            [[item.start, item.members[-1].data + item.members[-1].size] for item in shard.samples],
        )
    bad = {sample.start for sample in shard.samples if sample.problems}
    counts = copy_samples(path, tmp_path / "r.tar", bad)
    assert counts["samples"] == len(shard.samples) - len(bad)
    if counts["samples"]:
        assert len(scan_shard(tmp_path / "r.tar")) == counts["samples"]
        assert reasons(tmp_path / "r.tar") == set()


def _mend_checksum(content, block):
    header = content[block : block + foreign.BLOCK]
    header[148:156] = b" " * 8
    content[block + 148 : block + 156] = b"%06o\0 " % sum(header)


@many
@given(st.binary(max_size=3000))
def test_any_bytes_are_read_to_the_end(tmp_path, data):
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    assert read_shard(path).problems
    assert key_at(path, len(data) // 2) == "?"


def test_no_sample_begins_at_an_offset_that_no_file_has(tmp_path):
    (tmp_path / "s.tar").touch()
    assert key_at(tmp_path / "s.tar", 1 << 70) == "?"


def test_a_sample_of_a_shard_that_has_changed_meanwhile_has_no_key(tmp_path):
    assert key_at(tmp_path / "gone.tar", 0) == "?"
    (tmp_path / "a.tar").write_bytes(b"junk" * 1000)
    assert key_at(tmp_path / "a.tar", 512) == "?"
