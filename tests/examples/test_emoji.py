"""The emoji set of the examples, on a handful of packages made here."""

import hashlib
import io
import tarfile
from pathlib import Path

import emoji
import numpy as np
import pytest
from emoji import GROUPS, Art, ArtMask, Concept, Style, code_of, family_of, held_out_families, noto_art, read_concepts
from fontTools.fontBuilder import FontBuilder
from PIL import Image

from m3i_scale.errors import DataError

TABLE = """hexcode,group,subgroups,annotation,tags,skintone
1F600,smileys-emotion,face-smiling,grinning face,"happy, laugh",
1F468-200D-1F373,people-body,person-role,man cook,chef,
1F469-200D-1F373,people-body,person-role,woman cook,chef,
1F469-1F3FB-200D-1F373,people-body,person-role,woman cook: light skin tone,chef,1
0023-FE0F-20E3,symbols,keycap,keycap: #,,
E000,extras-openmoji,brand,logo,,
"""
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" fill="#f00"/></svg>'


def test_concepts_leave_out_skin_tones_and_extras():
    concepts = read_concepts(TABLE)
    assert [concept.code for concept in concepts] == ["1f600", "1f468-200d-1f373", "1f469-200d-1f373", "23-20e3"]
    assert concepts[0].caption == "grinning face: happy, laugh"
    assert concepts[3].caption == "keycap: #"
    assert len(read_concepts(TABLE, limit=2)) == 2


def test_one_spelling_of_codes():
    assert code_of("0023-FE0F-20E3") == code_of("23-20e3") == "23-20e3"


@pytest.mark.parametrize(
    "names",
    [
        [("man cook", "person-role"), ("woman cook", "person-role"), ("cook", "person-role")],
        [("one o’clock", "time"), ("twelve-thirty", "time")],
        [("keycap: #", "keycap"), ("keycap: 10", "keycap")],
        [("red heart", "heart"), ("light blue heart", "heart")],
        [("new moon", "sky-weather"), ("full moon face", "sky-weather")],
        [("person walking: facing right", "person-activity"), ("man walking", "person-activity")],
        [("bus", "transport-ground"), ("oncoming bus", "transport-ground")],
        [("mermaid", "person-fantasy"), ("merman", "person-fantasy")],
    ],
)
def test_twins_share_a_family(names):
    assert len({family_of(*name) for name in names}) == 1


def test_others_do_not():
    names = [
        ("cook", "person-role"),
        ("teacher", "person-role"),
        ("moon cake", "food-asian"),
        ("grinning cat", "cat-face"),
    ]
    names += [("flag: Chad", "country-flag"), ("flag: Peru", "country-flag"), ("full moon", "sky-weather")]
    assert len({family_of(*name) for name in names}) == len(names)


def test_families_are_held_out_whole_and_in_every_group():
    concepts = [
        Concept(f"{group}-{number}", str(number), "", group, "x", f"{group}/{number // 2}")
        for group in GROUPS
        for number in range(40)
    ]
    held_out = held_out_families(concepts)
    for group in GROUPS:
        share = sum(concept.family in held_out for concept in concepts if concept.group == group)
        assert share == 6
    assert held_out == held_out_families(list(reversed(concepts)))


def test_a_group_too_small_to_hold_out():
    concepts = [Concept(str(number), "", "", "flags", "x", f"f{number // 3}") for number in range(6)]
    with pytest.raises(DataError, match="small enough to hold out"):
        held_out_families(concepts)


def test_art_is_a_square_on_its_background():
    image = Image.open(io.BytesIO(Art(SVG, "svg", 32, (255, 255, 255)).read()))
    assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")
    assert image.getpixel((4, 16)) == (255, 0, 0)
    assert image.getpixel((28, 16)) == (255, 255, 255)
    buffer = io.BytesIO()
    Image.new("RGBA", (136, 68), (0, 0, 255, 255)).save(buffer, "WEBP", lossless=True)
    image = Image.open(io.BytesIO(Art(buffer.getvalue(), "bitmap", 32, (200, 210, 220)).read()))
    assert image.getpixel((16, 16)) == (0, 0, 255)
    assert image.getpixel((16, 2)) == (200, 210, 220)


def test_the_mask_is_where_the_art_is():
    art = Art(SVG, "svg", 32, (255, 255, 255))
    mask = Image.open(io.BytesIO(ArtMask(art, 7).read()))
    assert (mask.mode, mask.size) == ("L", (32, 32))
    classes, picture = np.asarray(mask), np.asarray(Image.open(io.BytesIO(art.read())))
    red = (picture == (255, 0, 0)).all(axis=-1)
    assert (classes == 7 * red).all()
    assert red.sum() == 32 * 16


def test_records_name_their_split_and_licence():
    concept = read_concepts(TABLE)[1]
    style = Style("noto", "bitmap", "a package", "OFL-1.1", {concept.code: b""})
    record = emoji._record(style, concept, False, 64, "plain")
    assert (record.key, record.split, record.label) == ("noto-1f468-200d-1f373", "style", 1)
    assert record.meta["family"] == "cook"
    assert record.meta["license"] == "OFL-1.1"
    assert record.mask.__self__ == ArtMask(record.image.__self__, 2)
    assert min(record.image.__self__.background) >= 128
    assert emoji._record(style, concept, True, 64, "white").split == "style_val"


def test_a_font_without_bitmaps_is_refused(tmp_path):
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.save(tmp_path / "font.ttf")
    with pytest.raises(DataError) as caught:
        noto_art(tmp_path / "font.ttf", [])
    assert str(caught.value.where).endswith("/font.ttf")
    assert "CBDT" in caught.value.fix
    (tmp_path / "font.ttf").write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        noto_art(tmp_path / "font.ttf", [])
    assert str(caught.value.where).endswith("/font.ttf")
    assert caught.value.fix is None


def test_without_npm_the_message_says_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError) as caught:
        emoji.fetch_npm(emoji.OPENMOJI, tmp_path)
    assert caught.value.where == "npm pack openmoji@17.0.0 --silent"
    assert "npm pack openmoji@17.0.0" in caught.value.fix
    with pytest.raises(DataError) as caught:
        emoji.fetch_noto(tmp_path)
    assert caught.value.where == "apt-get download fonts-noto-color-emoji"
    assert "--noto-font" in caught.value.fix


def test_a_failing_command_is_quoted(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'network is down' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DataError) as caught:
        emoji.fetch_npm(emoji.TWEMOJI, tmp_path)
    assert caught.value.where == "npm pack @twemoji/svg@15.0.0 --silent"
    assert "network is down" in caught.value.what


def test_another_archive_is_refused(tmp_path):
    (tmp_path / emoji.FLUENT.archive).write_bytes(b"something else")
    with pytest.raises(DataError) as caught:
        emoji.fetch_npm(emoji.FLUENT, tmp_path)
    assert str(caught.value.where).endswith("/lobehub-fluent-emoji-3d-1.1.0.tgz")
    assert hashlib.sha256(b"something else").hexdigest() in caught.value.what


def test_archives_are_read_without_unpacking(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name in ("package/1f600.svg", "../evil.svg", "package/deep/x.svg", "package/readme.md"):
            info = tarfile.TarInfo(name)
            info.size = len(SVG)
            tar.addfile(info, io.BytesIO(SVG))
    assert emoji.read_archive(tmp_path / "a.tgz", "package", ".svg") == {"1f600": SVG}
    with pytest.raises(DataError) as caught:
        emoji.read_archive(tmp_path / "a.tgz", "package", ".png")
    assert str(caught.value.where).endswith("/a.tgz")
    assert ".png" in caught.value.what


def test_a_relative_cache_serves_the_font(tmp_path, monkeypatch):
    programs = {
        "apt-get": f"#!/bin/sh\ntouch {emoji.NOTO_PACKAGE}_1_all.deb\n",
        "dpkg-deb": (
            '#!/bin/sh\nset -e\ntest -f "$2"\nmkdir -p "$3/usr/share/fonts/truetype/noto"\n'
            'touch "$3/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"\n'
        ),
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert emoji.fetch_noto(Path("cache")).is_file()
