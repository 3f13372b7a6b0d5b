"""Images of more than eight bits, or of more channels than three."""

import io
import json
import struct
import tarfile
import zlib

import foreign
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from m3i_scale.config import AugmentConfig
from m3i_scale.data.images import on_white
from m3i_scale.data.samples import open_image
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import DataError
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.encode_image import encoded_image

LEVELS = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
"""From black to white in sixteen bits."""
EIGHT = (LEVELS >> 8).astype(np.uint8)


def file_of(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def png(pixels, color):
    """A PNG of sixteen bits a channel, which Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels_HWC, photometric=2, extra=0):
    """A TIFF of any number of channels of eight bits, which Pillow does not write either."""
    height, width, channels = pixels_HWC.shape
    start = 8 + 2 + 10 * 12 + 4
    bits = struct.pack(f"<{channels}H", *[8] * channels)
    extras = struct.pack(f"<{channels - 3}H", *[extra] * (channels - 3))
    data = start + len(bits) + len(extras)
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, start),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, data),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, pixels_HWC.size),
        (338, 3, channels - 3, start + len(bits) if channels > 5 else int.from_bytes(extras, "little")),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bits + extras + pixels_HWC.tobytes()


def grey_tiff(data, bits, white_is=1, sample_format=1):
    """A TIFF of 32 × 32 gray values, whatever their bits, which side is black, and what they stand for."""
    tags = [(256, 32), (257, 32), (258, bits), (259, 1), (262, white_is), (273, 8), (277, 1), (278, 32)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed(values):
    """Values of 12 bits, two in three bytes."""
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def pgm(magic, values, maximum):
    data = values.astype(">u2").tobytes() if magic == b"P5" else " ".join(map(str, values.ravel())).encode()
    return magic + b" 32 32 %d\n" % maximum + data


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(on_white(image))


PGM = b"P5 32 32 65535\n" + LEVELS.astype(">u2").tobytes()
GRAY = {
    "PNG": file_of(LEVELS, "PNG"),
    "TIFF": file_of(LEVELS, "TIFF"),
    "big-endian TIFF": file_of(LEVELS.astype(">u2"), "TIFF"),
    "PGM": PGM,
}


@pytest.mark.parametrize("name", GRAY)
def test_the_upper_eight_of_sixteen_bits_of_grey_are_taken(name):
    made, extension = encoded_image(GRAY[name], name)
    assert extension == "png"
    assert np.array_equal(pixels_of(made)[..., 0], EIGHT)
    with Image.open(io.BytesIO(GRAY[name])) as image:  # what Pillow alone would give: nearly all is white
        assert np.asarray(image.convert("RGB")).mean() > 200 > EIGHT.mean()


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bits_of_a_colour_are_its_upper_eight_too(color, channels):
    opaque = np.dstack([LEVELS] * 3 + [np.full_like(LEVELS, 65535)] * (channels - 3))
    made, _ = encoded_image(png(opaque, color), "x")
    assert np.array_equal(pixels_of(made), np.dstack([EIGHT] * 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_range_spreads_its_values_over_all_levels(kind):
    made, extension = encoded_image(file_of((LEVELS >> 4) + 1000, kind), "x", (1000, 5095))
    levels = pixels_of(made)[..., 0]
    assert extension == "png"
    assert (levels.min(), levels.max()) == (0, 255)
    assert np.array_equal(levels, np.rint((LEVELS >> 4) * (255 / 4095)))


def test_beyond_the_range_lies_black_or_white():
    values = np.array([[-5.0, 0.0, 0.5, 1.0, 7.5]], dtype=np.float32).repeat(4, axis=0)
    made, _ = encoded_image(file_of(values, "TIFF"), "x", (0.0, 1.0))
    assert pixels_of(made)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_twelve_bits_are_read_as_such():
    made, _ = encoded_image(grey_tiff(packed(LEVELS >> 4), 12), "x", (0, 4095))
    assert np.array_equal(pixels_of(made)[..., 0], np.rint((LEVELS >> 4) * (255 / 4095)))


def test_unsigned_and_signed_values_of_32_bits():
    unsigned = grey_tiff((LEVELS.astype(np.uint32) << 15).tobytes(), 32)
    assert np.array_equal(
        pixels_of(encoded_image(unsigned, "x", (0, 65535 << 15))[0])[..., 0], np.rint(LEVELS / 65535 * 255)
    )
    signed = file_of(LEVELS.astype(np.int32) - 32768, "TIFF")
    assert np.array_equal(
        pixels_of(encoded_image(signed, "x", (-32768, 32767))[0])[..., 0], np.rint(LEVELS / 65535 * 255)
    )


@pytest.mark.parametrize("magic", [b"P5", b"P2"])
def test_a_pgm_of_twelve_bits_spans_all_levels_without_a_range(magic):
    made, _ = encoded_image(pgm(magic, LEVELS >> 4, 4095), "x")
    assert np.abs(pixels_of(made)[..., 0].astype(int) - EIGHT).max() <= 1


def test_a_plain_pgm_of_sixteen_bits_takes_a_range():
    made, _ = encoded_image(pgm(b"P2", LEVELS, 65535), "x", (0, 65535))
    assert np.array_equal(pixels_of(made)[..., 0], np.rint(LEVELS / 65535 * 255))


FOUR, FIVE = (np.zeros((32, 32, channels), dtype=np.uint8) for channels in (4, 5))
FLOAT = LEVELS.astype(np.float32)
NO_RULE = {
    "float": (file_of(FLOAT, "TIFF"), None),
    "32 bits": (file_of(LEVELS.astype(np.int32), "TIFF"), None),
    "no number": (file_of(np.where(FLOAT > 9, np.nan, FLOAT), "TIFF"), (0, 9)),
    "infinite": (file_of(np.where(FLOAT > 9, np.inf, FLOAT), "TIFF"), (0, 9)),
    "eight bits and a range": (file_of(EIGHT, "PNG"), (0, 4095)),
    "sixteen bits of color and a range": (png(np.dstack([LEVELS] * 3), 2), (0, 4095)),
    "a fourth channel": (tiff(FOUR), None),
    "five channels": (tiff(FIVE), None),
    "12 bits": (grey_tiff(packed(LEVELS >> 4), 12), None),
    "a PGM of 12 bits and a range": (pgm(b"P5", LEVELS >> 4, 4095), (0, 4095)),
    "a plain PGM of 12 bits and a range": (pgm(b"P2", LEVELS >> 4, 4095), (0, 4095)),
    "unsigned beyond signed": (grey_tiff((LEVELS.astype(np.uint32) << 16).tobytes(), 32), (0, 2**32)),
    "16 bits, white at zero": (grey_tiff(LEVELS.tobytes(), 16, white_is=0), None),
    "16 bits, white at zero, and a range": (grey_tiff(LEVELS.tobytes(), 16, white_is=0), (0, 65535)),
    "floats, white at zero": (grey_tiff(FLOAT.tobytes(), 32, white_is=0, sample_format=3), (0, 65535)),
}


@pytest.mark.parametrize("name", NO_RULE)
def test_values_without_a_rule_are_refused(name):
    data, value_range = NO_RULE[name]
    with pytest.raises(DataError) as error:
        encoded_image(data, "scan", value_range)
    assert error.value.where == "scan"


def test_what_training_would_leave_out_for_its_size_is_refused():
    data = b"P4 9500 9500\n" + bytes(9500 * 1188)
    with pytest.raises(DataError) as error:
        encoded_image(data, "poster")
    assert error.value.where == "poster"


def test_a_fourth_channel_that_is_alpha_has_a_meaning():
    assert pixels_of(encoded_image(tiff(FOUR, extra=2), "x")[0]).min() == 255  # transparent


def test_training_and_check_read_the_same(tmp_path):
    path = foreign.write_tar(tmp_path / "0.tar", foreign.sample("a", 1, jpg=None, png=GRAY["PNG"], cls=None))
    with open_image({"png": GRAY["PNG"]}, 10**6) as image:
        view = ViewMaker(AugmentConfig(), views=1, image_size=32, augment=False)(image, 0)
    assert np.array_equal(view.pixels_VCHW[0], np.stack([EIGHT] * 3))
    assert CliRunner().invoke(shards_app, ["check", str(path), "--workers", "1"]).exit_code == 0


def test_shards_of_a_scanner_are_made_with_a_range(tmp_path):
    folder = tmp_path / "scans" / "ct"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.tif").write_bytes(file_of(LEVELS >> 4, "TIFF"))
    (folder / "color.png").write_bytes(foreign.image_bytes(1, kind="PNG"))
    command = ["make", "imagefolder", "--input", str(tmp_path / "scans"), "--workers", "1", "--json"]
    command += ["--value-range", "0,4095"]
    refused = CliRunner().invoke(shards_app, [*command, "--output", str(tmp_path / "no")])
    assert isinstance(refused.exception, DataError)
    made = CliRunner().invoke(shards_app, [*command, "--output", str(tmp_path / "out"), "--skip-bad"])
    assert json.loads(made.stdout)["splits"]["train"]["samples"] == 3
    with tarfile.open(next((tmp_path / "out" / "train").glob("*.tar"))) as tar:
        image = next(tar.extractfile(member).read() for member in tar if member.name.endswith(".png"))
    assert pixels_of(image).max() == 255


@pytest.mark.parametrize("text", ["5", "5,5", "9,0", "a,b", "0,inf", "nan,1", ""])
def test_what_is_no_range(tmp_path, text):
    command = ["make", "imagefolder", "--input", str(tmp_path), "--output", str(tmp_path / "o"), "--value-range", text]
    assert CliRunner().invoke(shards_app, command).exception.exit_code == 2
