"""Members of a sample are hostile until checked."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.io import write_png

from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.samples import open_image, quick_pixels, read_caption, read_label

LIMIT = 1_000_000


def huge_png(side):
    """A PNG whose header claims side × side pixels: a few bytes that would unpack to gigabytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_before_decoding():
    with pytest.raises(BadSampleError, match="image too large") as caught:
        open_image({"png": huge_png(60_000)}, LIMIT)
    assert "60000 × 60000" in caught.value.detail


def test_pillows_own_limit_does_not_get_in_the_way():
    before = Image.MAX_IMAGE_PIXELS
    assert open_image({"png": huge_png(60_000)}, 60_000**2).size == (60_000, 60_000)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(BadSampleError, match="does not decode"):
        open_image({"jpg": data}, LIMIT)


def test_the_same_bytes_are_told_in_the_same_words():
    told = []
    for _ in range(2):
        with pytest.raises(BadSampleError) as caught:
            open_image({"jpg": b"hello"}, LIMIT)
        told.append(caught.value.detail)
    assert told == ["cannot identify image file"] * 2


def test_formats_beyond_jpeg_png_webp_are_refused(tools):
    with pytest.raises(BadSampleError, match="does not decode"):
        open_image({"png": tools.encode(kind="TIFF")}, LIMIT)


def test_a_name_with_several_dots_is_explained():
    with pytest.raises(BadSampleError, match="no image") as caught:
        open_image({"__key__": b"photo", "left.jpg": b"", "txt": b"hello"}, LIMIT)
    assert caught.value.detail.startswith("members: left.jpg, txt; a key ends at the first dot of the name, so .left")
    with pytest.raises(BadSampleError) as caught:
        open_image({"mask.png": b""}, LIMIT)
    assert caught.value.detail == "members: mask.png"


def test_a_sample_without_image():
    with pytest.raises(BadSampleError, match="no image"):
        open_image({"__key__": b"k", "txt": b"hello"}, LIMIT)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_images_by_extension(tools, extension):
    kind = {"jpg": "JPEG"}.get(extension, extension.upper())
    with open_image({extension: tools.encode(kind=kind)}, LIMIT) as image:
        assert image.convert("RGB").size == (20, 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x", "not an integer"),
        (b"1.5", "not an integer"),
        (b"", "not an integer"),
        (b"--1", "not an integer"),
        (b"9" * 5000, "not an integer"),
        (b"3", "out of range"),
        (b"-1", "out of range"),
    ],
)
def test_bad_labels(data, reason):
    with pytest.raises(BadSampleError, match=reason):
        read_label({"cls": data}, 3)


def test_labels_and_captions():
    assert read_label({"cls": b" 2\n"}, 3) == 2
    assert read_label({}, 3) is read_label({"cls": b"junk"}, None) is None
    assert read_caption({"txt": "é ".encode()}) == "é"
    assert read_caption({}) is read_caption({"txt": b" \n"}) is None
    with pytest.raises(BadSampleError) as caught:
        read_caption({"txt": b"\xff\xfe"})
    assert caught.value.reason == "caption is not UTF-8"
    with pytest.raises(BadSampleError) as caught:
        read_caption({"txt": b"a" * 100}, 0, 99)
    assert caught.value.reason == "caption too large"


def test_one_of_several_captions_is_drawn():
    members = {"txt": b"\n one \n\ntwo\nthree\n"}
    assert [read_caption(members, draw) for draw in range(4)] == ["one", "two", "three", "one"]
    assert read_caption(members) == "one \n\ntwo\nthree"
    assert read_caption({"txt": b" \n"}, 5) is read_caption({}, 5) is None


def test_open_image_reads_the_header_only(tools):
    data = tools.encode(size=(64, 64))
    image = open_image({"png": data[: len(data) // 2]}, LIMIT)
    assert image.size == (64, 64)
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(data[: len(data) // 2])).load()


def encoded(kind, mode="RGB", size=(37, 22), **options):
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        encoded("PNG"),
        encoded("JPEG", quality=90),
        encoded("JPEG", quality=60, subsampling=0, progressive=True),
        encoded("JPEG", size=(33, 47), subsampling=2),
    ],
)
def test_the_quick_decoder_gives_pillows_pixels(data):
    members = {"png": data}
    found = quick_pixels(open_image(members, LIMIT))
    assert found is not None
    assert np.array_equal(found, np.asarray(open_image(members, LIMIT)))


def text():
    info = PngInfo()
    info.add_text("title", "a")
    return info


@pytest.mark.parametrize(
    "data",
    [
        encoded("PNG", "RGBA"),
        encoded("PNG", "P"),
        encoded("PNG", "L"),
        encoded("PNG", transparency=(1, 2, 3)),
        encoded("PNG", pnginfo=text()),
        encoded("JPEG", "L"),
        encoded("JPEG", "CMYK"),
        encoded("WEBP", lossless=True),
        encoded("PNG")[:-40],
        encoded("JPEG")[:-40],
    ],
)
def test_all_others_are_left_to_pillow(data):
    assert quick_pixels(open_image({"png": data}, LIMIT)) is None


def test_an_image_that_is_no_file_is_left_to_pillow():
    assert quick_pixels(Image.new("RGB", (4, 4))) is None


def test_sixteen_bits_a_channel_are_left_to_pillow(tmp_path):
    write_png(torch.zeros(3, 4, 4, dtype=torch.uint8), str(tmp_path / "eight.png"))
    assert quick_pixels(open_image({"png": (tmp_path / "eight.png").read_bytes()}, LIMIT)) is not None
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    image = open_image({"png": data}, LIMIT)
    assert image.mode == "RGB"
    assert quick_pixels(image) is None
    assert np.asarray(image)[0, 0].tolist() == [0, 2, 4]
