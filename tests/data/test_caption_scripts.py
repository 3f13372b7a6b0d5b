"""What `shards stats` says of captions in several scripts, and what the trained tokenizer makes of them."""

import json
import unicodedata

import foreign
import pytest
from typer.testing import CliRunner

from m3i_scale.data.samples import read_caption
from m3i_scale.errors import ConfigError
from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.make import train_tokenizer
from m3i_scale.shards.stats import stats_of

ENGLISH = ["a red bird on a branch", "a blue car in the rain", "two dogs and a cafe"]
CHINESE, ARABIC = ["一只红色的鸟站在树枝上", "雨中的蓝色汽车"], ["طائر أحمر على غصن", "سيارة زرقاء"]
RUSSIAN, JAPANESE = ["красная птица на ветке"], ["赤いとりがいる"]
THAI, HINDI = ["นกสีแดงบนกิ่งไม้"], ["शाखा पर एक लाल पक्षी"]


def shards(folder, captions, learnt=None):
    """Shards with these captions, and a tokenizer beside that was trained on others."""
    members = [pair for n, text in enumerate(captions) for pair in foreign.sample(f"k{n}", n, txt=text.encode())]
    foreign.write_tar(folder / "train" / "0.tar", members)
    if learnt is not None:
        train_tokenizer(learnt, folder / "tokenizer", 8_192)
    return str(folder / "train")


def tokens_of(source, **options):
    return stats_of(source, max_pixels=10**6, **options)["tokens"]


@pytest.mark.parametrize("captions", [CHINESE, ARABIC, RUSSIAN, JAPANESE, THAI, HINDI])
def test_a_tokenizer_of_another_script_knows_nothing(tmp_path, captions):
    found = tokens_of(shards(tmp_path, captions, ENGLISH))
    assert (found["unknown_tokens"], found["captions_with_unknown"]) == (1, 1)
    assert "unknown" in found["warnings"][0]


@pytest.mark.parametrize("captions", [ENGLISH, CHINESE, RUSSIAN])
def test_one_that_was_trained_on_the_captions_knows_all(tmp_path, captions):
    found = tokens_of(shards(tmp_path, captions, captions))
    assert (found["unknown_tokens"], found["captions_cut"], found["captions_stripped"]) == (0, 0, 0)
    assert found["warnings"] == []


@pytest.mark.parametrize("captions", [THAI, HINDI, JAPANESE, ARABIC[:1]])
def test_scripts_whose_marks_are_stripped(tmp_path, captions):
    found = tokens_of(shards(tmp_path, captions, captions))
    assert (found["unknown_tokens"], found["captions_stripped"]) == (0, 1)
    assert len(found["warnings"]) == 1


def test_shares_of_a_mixture(tmp_path):
    found = tokens_of(shards(tmp_path, [*ENGLISH, *ARABIC[1:]], ENGLISH))
    words = sum(len(text.split()) for text in ENGLISH) + 2
    assert found["unknown_tokens"] == round(2 / words, 6)
    assert found["captions_with_unknown"] == 0.25


def test_captions_that_are_cut(tmp_path):
    source = shards(tmp_path, ["bird " * 30, "bird"], ["bird"])
    assert tokens_of(source)["captions_cut"] == 0
    found = stats_of(source, max_pixels=10**6, max_tokens=31)
    assert (found["tokens"]["captions_cut"], found["caption_tokens"]["100%"]) == (0.5, 32)  # [CLS] and [SEP] count
    assert found["tokens"]["warnings"]
    assert tokens_of(source, max_tokens=32)["captions_cut"] == 0


def test_captions_are_not_composed_anew(tmp_path):
    composed = "Café au lait, Ångström"
    taken_apart = unicodedata.normalize("NFD", composed)
    assert composed != taken_apart
    for text in (composed, taken_apart):
        assert read_caption({"txt": text.encode()}) == text
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (("a", composed), ("b", taken_apart)):
        (folder / f"{name}.png").write_bytes(foreign.image_bytes(1, kind="PNG"))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    command = ["make", "imagefolder", "--input", str(folder), "--output", str(tmp_path / "o"), "--workers", "1"]
    assert CliRunner().invoke(shards_app, [*command, "--multiple-of", "1"]).exit_code == 0
    data = (tmp_path / "o" / "train" / "images-000000.tar").read_bytes()
    assert composed.encode() in data
    assert taken_apart.encode() in data
    found = tokens_of(str(tmp_path / "o" / "train"))  # accents of European scripts are left out by an uncased tokenizer
    assert (found["unknown_tokens"], found["captions_stripped"]) == (0, 0)


def test_the_tokenizer_is_named_or_lies_beside(tmp_path):
    bare = shards(tmp_path / "bare", CHINESE)
    assert tokens_of(bare) is None
    with pytest.raises(ConfigError):
        tokens_of(bare, max_tokens=9)
    with pytest.raises(ConfigError):
        tokens_of(bare, tokenizer=str(tmp_path / "nowhere"))
    train_tokenizer(CHINESE, tmp_path / "own", 8_192)
    assert tokens_of(bare, tokenizer=str(tmp_path / "own"))["unknown_tokens"] == 0


def test_the_command(tmp_path):
    source = shards(tmp_path, CHINESE, ENGLISH)
    text = CliRunner().invoke(shards_app, ["stats", source, "--workers", "1"]).stdout
    assert "100.0%" in text
    as_json = CliRunner().invoke(shards_app, ["stats", source, "--workers", "1", "--json", "--max-tokens", "8"]).stdout
    assert json.loads(as_json)["tokens"]["captions_cut"] == 1


def test_several_processes_count_the_same(tmp_path):
    folder = tmp_path / "two"
    source = shards(folder, [*ENGLISH, *CHINESE], ENGLISH)
    foreign.write_tar(folder / "train" / "1.tar", foreign.sample("z", 1, txt=ARABIC[0].encode()))
    assert tokens_of(source, workers=2) == tokens_of(source)
