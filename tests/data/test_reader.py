"""The quick reader of plain members gives what webdataset gives, or nothing."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import tar_file_iterator
from webdataset.writer import TarWriter

from m3i_scale.data.reader import plain_members
from m3i_scale.data.scan import head_of
from m3i_scale.data.tar import MAX_HEADER_BYTES

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def tar_of(members, kind=tarfile.GNU_FORMAT, **fields):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pax_header(records):
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def damaged(draw, whole, end):
    """Some bytes of the first header, or behind it, are others; its checksum holds, as those of an index do."""
    whole = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 3))):
        whole[draw.draw(st.integers(0, end - 1))] = draw.draw(st.integers(0, 255))
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    return bytes(whole)


def of_webdataset(data):
    return list(tar_file_iterator(io.BytesIO(data)))


def as_indexed(data):
    """The bytes of all members, without the padding of the last one."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: max(member.offset_data + member.size for member in tar)]


def agrees_with_webdataset(data):
    """Whether it gives the same, or nothing; what tarfile refuses is in no index, and so never comes here."""
    found = plain_members(data)
    try:
        return found is None or found[0] == of_webdataset(data)
    except tarfile.TarError:
        return True


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1200)), min_size=1, max_size=4), FORMATS)
def test_it_agrees_with_webdataset(members, kind):
    try:
        data = tar_of(members, kind)
    except ValueError:  # a name too long for the format
        return
    found = plain_members(as_indexed(data))
    assert found is None or found == (of_webdataset(data), head_of(as_indexed(data)))


def test_webdatasets_own_members_are_plain():
    """Its writer puts a pax header with a broken time before every member."""
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False) as writer:
        writer.write({"__key__": "a", "png": b"1" * 700, "cls": b"3"})
    assert b"mtime=" in buffer.getvalue()
    data = as_indexed(buffer.getvalue())
    assert plain_members(data) == (of_webdataset(buffer.getvalue()), head_of(data))


@given(st.data())
def test_no_damage_to_a_pax_header_makes_it_read_what_tarfile_would_not(data):
    whole = damaged(data, tar_of([("a.png", b"1" * 700)], tarfile.PAX_FORMAT, mtime=1.5), 541)
    assert agrees_with_webdataset(whole)


@pytest.mark.parametrize(
    "records",
    [
        b"17 path=b/c.json\n",
        b"13 size=9999\n",
        b"12 mtime=1.5\n",  # one too short
        b"13 mtime=1.5\n14 comment=ab\n",
        b"13 mtime=x.5\n",
        b"22 GNU.sparse.major=1\n",
        b"13 mtime=1.5",
        b"",
    ],
)
def test_a_pax_header_that_tells_more_than_times_is_left_to_tarfile(records):
    members = tar_of([("a.png", b"1")])
    assert plain_members(pax_header(records) + as_indexed(members)) is None
    assert plain_members(pax_header(b"13 mtime=1.5\n") + as_indexed(members))[0] == of_webdataset(members)


def test_a_pax_header_that_no_index_has_is_not_parsed():
    times = b"13 mtime=1.5\n"
    members = as_indexed(tar_of([("a.png", b"1")]))
    assert plain_members(pax_header(times * (MAX_HEADER_BYTES // len(times))) + members) is not None
    assert plain_members(pax_header(times * (MAX_HEADER_BYTES // len(times) + 1)) + members) is None


def test_a_pax_header_without_a_member_is_left_to_tarfile():
    times = pax_header(b"13 mtime=1.5\n")
    assert plain_members(times) is None
    assert plain_members(times + bytes(1024)) is None
    assert plain_members(times + times + tar_of([("a.png", b"1")])) is None


@given(st.data())
def test_no_damage_makes_it_read_what_tarfile_would_not(data):
    whole = damaged(data, tar_of([("a.png", b"1" * 700), ("a.txt", b"one")]), 512)
    assert agrees_with_webdataset(whole)


def test_ordinary_members_are_plain():
    members = [("a/b.png", b"1" * 700), ("a/b.txt", b""), ("é.cls", b"3")]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
        data = as_indexed(tar_of(members, kind))
        assert plain_members(data) == ([{"fname": name, "data": data} for name, data in members], head_of(data))


@pytest.mark.parametrize(
    "data",
    [
        tar_of([("x" * 300 + ".png", b"1")]),
        tar_of([("x" * 300 + ".png", b"1")], tarfile.PAX_FORMAT),
        tar_of([("a.png", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar_of([("a.png", b"")], type=tarfile.GNUTYPE_SPARSE),
        tar_of([("a.png/", b"")], type=tarfile.AREGTYPE),
        tar_of([("__meta__.json", b"{}")]),
        tar_of([("d/" * 70 + "a.png", b"1")], tarfile.USTAR_FORMAT),
        tar_of([("a.png", b"1" * 700)])[:900],
        tar_of([("a.png", b"1")]) + b"more",
        b"text" * 200,
    ],
)
def test_what_is_not_plain_is_left_to_tarfile(data):
    assert plain_members(data) is None
