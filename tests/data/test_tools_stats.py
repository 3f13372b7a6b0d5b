"""`shards stats` on shards that others made."""

import json
from collections import Counter

import foreign
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from m3i_scale.shards.commands import shards_app
from m3i_scale.shards.digests import Digests, digest_of, rows_of
from m3i_scale.shards.stats import quantiles, rounded, stats_of


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "s"
    wide = foreign.image_bytes(7, (40, 10))
    foreign.write_tar(
        root / "0.tar",
        [
            *foreign.sample("a", 0, jpg=wide, txt=b"one two three"),
            *foreign.sample("b", 1, txt=b"same words"),
            *foreign.sample("c", 2, jpg=None, png=foreign.image_bytes(2, kind="PNG"), txt=None),
        ],
    )
    foreign.write_tar(
        root / "1.tar",
        [
            *foreign.sample("d", 3, jpg=wide, txt=b"same words\n", cls=None),
            *foreign.sample("e", 4, jpg=b"junk", mask__png=foreign.mask_bytes(), json=b"{}"),
        ],
    )
    (root / "labels.json").write_text(json.dumps(["x", "y", "z", "never"]))
    return root


def test_counts(folder):
    found = stats_of(str(folder), max_pixels=10**6)
    assert (found["samples"], found["shards"]) == (5, 2)
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert found["share_with"] == {"label": 0.8, "caption": 0.8, "mask": 0.2, "instances": 0.0, "json": 0.2}
    assert found["formats"] == {"JPEG": 3, "PNG": 1}
    assert (found["width"]["0%"], found["width"]["100%"], found["width"]["mean"]) == (20, 40, 30)
    assert (found["aspect_ratio"]["0%"], found["aspect_ratio"]["100%"]) == (1.25, 4)
    assert (found["caption_words"]["100%"], found["caption_characters"]["0%"]) == (3, 9)
    assert found["classes"]["counts"] == {"x": 1, "y": 2, "z": 1, "never": 0}
    assert (found["classes"]["absent"], found["classes"]["present"]) == (1, 3)
    assert found["duplicates"]["images"] == {"groups": 1, "beyond_first": 1, "examples": [["0.tar/a", "1.tar/d"]]}
    assert found["duplicates"]["captions"]["examples"] == [["0.tar/b", "1.tar/d"]]
    assert found["bad"] == {"image does not decode": 1}


def test_a_label_without_a_name_is_no_class(folder):
    whole = stats_of(str(folder), max_pixels=10**6)
    (folder / "labels.json").write_text(json.dumps(["x"]))
    found = stats_of(str(folder), max_pixels=10**6)
    assert found["classes"]["counts"] == {"x": 1}
    assert (found["classes"]["present"], found["classes"]["effective"], found["classes"]["largest_share"]) == (1, 1, 1)
    assert found["share_with"] == whole["share_with"] | {"label": 0.2}
    assert found["bad"] == {"label out of range": 3, "image does not decode": 1}
    (folder / "labels.json").unlink()  # then every number may be one
    assert stats_of(str(folder), max_pixels=10**6)["classes"]["present"] == 3


def test_the_command(folder):
    result = CliRunner().invoke(shards_app, ["stats", str(folder), "--workers", "1", "--json"])
    assert json.loads(result.stdout)["samples"] == 5
    text = CliRunner().invoke(shards_app, ["stats", str(folder), "--workers", "1"]).stdout
    assert "equal images: 1 groups, 1 beyond the first, e.g. 0.tar/a = 1.tar/d" in text


def test_shards_of_img2dataset(tmp_path):
    found = stats_of(str(foreign.img2dataset_folder(tmp_path / "i")), max_pixels=10**6)
    assert found["share_with"] == {"label": 0.0, "caption": 1.0, "mask": 0.0, "instances": 0.0, "json": 1.0}
    assert found["classes"]["present"] == 0
    assert not found["bad"]


@given(st.lists(st.integers(0, 9_999), min_size=1, max_size=200))
def test_quantiles_are_those_of_the_values(values):
    counts = Counter(rounded(value, 4) for value in values)
    expected = np.quantile(values, [0.05, 0.5, 0.99], method="inverted_cdf")
    assert list(quantiles(counts, (0.05, 0.5, 0.99)).values())[:3] == expected.tolist()


@given(st.lists(st.lists(st.integers(0, 20), max_size=30), min_size=1, max_size=4))
def test_repeated_digests_are_those_of_a_dictionary(shards):
    places = {}
    with Digests() as digests:
        for shard, values in enumerate(shards):
            digests.add(rows_of([digest_of(bytes([value])) for value in values], shard, range(len(values))))
            for offset, value in enumerate(values):
                places.setdefault(value, []).append((shard, offset))
        found = sorted(digests.repeated())
    assert found == sorted(group for group in places.values() if len(group) > 1)
