"""`shards check` on shards that others made, and the clean copies that `--repair` writes."""

import json

import foreign
import pytest
from typer.testing import CliRunner

from m3i_scale.data.index import build_index, load_index
from m3i_scale.errors import DataError
from m3i_scale.shards.check import Rules, check_shards
from m3i_scale.shards.commands import shards_app

RULES = Rules(max_pixels=1_000_000)


@pytest.fixture
def odd(tmp_path):
    """One shard with a sample for each fault, one with scattered members, one cut off, one that is fine."""
    root = tmp_path / "odd"
    bad = {
        "b": {"jpg": foreign.image_bytes(1)[:300]},
        "c": {"txt": b"\xff"},
        "d": {"cls": b"9"},
        "e": {"cls": b"x"},
        "f": {"json": b"{"},
        "g": {"json": b"[" * 100_000},
        "h": {"mask__png": foreign.mask_bytes((3, 3))},
        "i": {"mask__png": foreign.mask_bytes()[:-30]},
        "j": {"jpg": None, "png": foreign.huge_png(60_000)},
        "k": {"jpg": None},
        "l": {"txt": b" \n"},
        "m": {"jpg": b"%!PS-Adobe-3.0"},
    }
    members = foreign.sample("a", 0) + [pair for key, parts in bad.items() for pair in foreign.sample(key, 1, **parts)]
    foreign.write_tar(root / "00.tar", members)
    one, two = foreign.sample("n", 1), foreign.sample("o", 2)
    foreign.write_tar(root / "01.tar", [one[0], two[0], one[1], two[1], one[2], two[2], *foreign.sample("p", 3)])
    cut = foreign.write_tar(root / "02.tar", foreign.sample("q", 4) + foreign.sample("r", 5))
    cut.write_bytes(cut.read_bytes()[:4200])
    foreign.write_tar(root / "03.tar", foreign.sample("s", 6) + foreign.sample("t", 7))
    (root / "labels.json").write_text(json.dumps(["x", "y", "z"]))
    return root


def found(report):
    return dict(report.reasons.items())


def test_every_fault_has_its_reason(odd, tmp_path):
    report = check_shards(str(odd), RULES, quarantine=tmp_path / "q.jsonl")
    assert found(report) == {
        "image does not decode": 2,
        "caption is not UTF-8": 1,
        "label out of range": 1,
        "label is not an integer": 1,
        "json does not parse": 2,
        "mask is not of the size of its image": 1,
        "mask does not decode": 1,
        "image too large": 1,
        "no image": 1,
        "caption is empty": 1,
        "members are not consecutive": 2,
        "cut off": 2,
    }
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(lines) == sum(report.reasons.values())
    assert set(lines[0]) == {"source", "url", "key", "offset", "reason", "detail"}
    line = next(line for line in lines if line["key"] == "d")
    assert (odd / "00.tar").read_bytes()[line["offset"] :].startswith(b"d.jpg\0")
    assert report.summary()["bad_samples"] == 15
    assert report.summary()["clean_shards"] == 1


def test_the_loader_refuses_what_check_refuses_and_takes_the_rest(odd, tools, tmp_path):
    """The same reasons as in the loader's quarantine, but for what training does not look at."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "0.tar").write_bytes((odd / "00.tar").read_bytes())
    (folder / "labels.json").write_text((odd / "labels.json").read_text())
    quarantine = tmp_path / "loader.jsonl"
    loader = tools.make_loader(
        {"s": folder},
        tmp_path,
        micro=16,
        streams=1,
        max_image_pixels=1_000_000,
        max_corrupt_fraction=1.0,
        quarantine=quarantine,
    )
    next(iter(loader))
    theirs = {(line["key"], line["reason"]) for line in map(json.loads, quarantine.read_text().splitlines())}
    check_shards(str(folder), RULES, quarantine=tmp_path / "q.jsonl")
    ours = {(line["key"], line["reason"]) for line in map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())}
    assert theirs
    assert theirs <= ours
    assert {reason for _, reason in ours - theirs} <= {
        "json does not parse",
        "mask does not decode",
        "mask is not of the size of its image",
        "caption is empty",
    }


def test_what_is_too_large_is_bad(tmp_path):
    members = [
        *foreign.sample("a", 1),
        *foreign.sample("b", 1, txt=b"b" * 3_000),
        *foreign.sample("c", 1, npy=bytes(90_000)),
    ]
    path = foreign.write_tar(tmp_path / "0.tar", members)
    for limits, wanted in (
        ([], set()),
        (["--max-caption-bytes", "2000"], {"caption too large"}),
        (["--max-sample-bytes", "80000", "--max-caption-bytes", "2000"], {"caption too large", "sample too large"}),
    ):
        result = CliRunner().invoke(shards_app, ["check", str(path), "--workers", "1", "--json", *limits])
        assert set(json.loads(result.stdout)["reasons"]) == wanted
        assert result.exit_code == (2 if wanted else 0)


def test_repair_keeps_good_bytes_and_trains(odd, tmp_path):
    before = {path.name: path.read_bytes() for path in odd.iterdir()}
    out = tmp_path / "clean"
    result = CliRunner().invoke(
        shards_app, ["check", str(odd), "--repair", str(out), "--link", "--workers", "1", "--json"]
    )
    assert result.exit_code == 2, result.output
    repair = json.loads(result.stdout)["repair"]
    assert repair["as_they_are"] == [str(odd / "03.tar")]
    assert {path: facts["samples"] for path, facts in repair["repaired"].items()} == {
        str(odd / "00.tar"): 1,
        str(odd / "01.tar"): 3,
        str(odd / "02.tar"): 1,
    }
    assert {path.name: path.read_bytes() for path in odd.iterdir()} == before
    kept = foreign.by_webdataset(out / "00.tar") | foreign.by_webdataset(out / "01.tar")
    assert set(kept) == {"a", "n", "o", "p"}
    assert kept["n"]["jpg"] == foreign.image_bytes(1)
    assert kept["n"]["txt"] == b"picture n"
    original = (odd / "00.tar").read_bytes()
    assert (out / "00.tar").read_bytes()[: 6 * foreign.BLOCK] == original[: 6 * foreign.BLOCK]
    assert CliRunner().invoke(shards_app, ["check", str(out), "--workers", "1"]).exit_code == 0
    assert json.loads((out / "sizes.json").read_text()) == {"00.tar": 1, "01.tar": 3, "02.tar": 1, "03.tar": 2}
    assert sum(map(len, load_index(sorted(out.glob("*.tar")), tmp_path))) == 7


def test_keys_across_shards(tmp_path):
    root = tmp_path / "numbered"
    for name in ("0.tar", "1.tar"):
        foreign.write_tar(root / name, foreign.sample("000", 1) + foreign.sample(name[0] * 3 + "x", 2))
    report = check_shards(str(root), RULES)
    assert found(report) == {"key in two shards": 1}
    example = report.examples["key in two shards"][0]
    assert (example["url"], example["key"]) == (str(root / "1.tar"), "000")
    assert not check_shards(str(root), RULES, keys_per_shard=True).bad


def test_what_lies_beside_is_held_against_the_shards(tmp_path):
    root = tmp_path / "x"
    for name in "012":
        foreign.write_tar(root / f"{name}.tar", foreign.sample(f"k{name}", 1))
    build_index(sorted(root.glob("*.tar")), root / "index")
    assert not check_shards(str(root), RULES).bad
    foreign.write_tar(root / "1.tar", foreign.sample("k1", 1) + foreign.sample("k1b", 1))
    digest = "0" * 64
    manifest = {"shards": {"0.tar": {"samples": 1, "sha256": digest}, "1.tar": {"samples": 1}, "2.tar": {"bytes": 7}}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "sizes.json").write_text(json.dumps({"0.tar": 1, "1.tar": 2, "9.tar": 4}))
    (root / "index" / "2.tar.npz").write_bytes(b"junk")
    assert found(check_shards(str(root), RULES)) == {
        "checksum differs": 2,
        "count differs": 1,
        "index is stale": 2,
        "shard is missing": 1,
        "shard is not listed": 1,
    }
    assert "shard is missing" not in found(check_shards(f"{root}/{{0,1}}.tar", RULES))
    (root / "manifest.json").write_text("{")
    assert "json does not parse" in found(check_shards(str(root), RULES))
    (root / "manifest.json").write_text('{"shards": 3}')  # of another kind
    assert "count differs" not in found(check_shards(str(root), RULES))


def test_class_names_of_masks_are_read_before_the_shards(tmp_path, monkeypatch):
    foreign.write_tar(tmp_path / "0.tar", foreign.sample("k", 1))
    (tmp_path / "mask_labels.json").write_text('{"0": "road"}')
    monkeypatch.setattr("m3i_scale.shards.check.read_shards", lambda *args: pytest.fail("has read shards"))
    with pytest.raises(DataError):
        check_shards(str(tmp_path), RULES)


def test_a_shard_that_cannot_be_read_does_not_stop_the_rest(tmp_path):
    root = tmp_path / "x"
    foreign.write_tar(root / "1.tar", foreign.sample("a", 1))
    (root / "0.tar").mkdir()
    manifest = {"shards": {"0.tar": {"sha256": "0" * 64}, "1.tar": {"samples": 1}}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    report = check_shards(str(root), RULES)
    assert found(report) == {"shard cannot be read": 1}
    assert report.summary()["samples"] == 1


def test_shards_of_img2dataset_are_clean(tmp_path):
    folder = foreign.img2dataset_folder(tmp_path / "i")
    report = check_shards(str(folder), RULES)
    assert not report.bad
    assert report.members == {"jpg": 6, "json": 6, "txt": 6}


def test_shards_of_gnu_tar(tmp_path):
    """`tar cf` puts files in the order of the folder, with folders and ./ before every name."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        for name, data in foreign.sample(f"k{number}", number):
            (folder / name).write_bytes(data)
    sorted_tar = foreign.gnu_tar(folder, tmp_path / "t" / "a.tar", "--sort=name")
    report = check_shards(str(sorted_tar), RULES)
    assert not report.bad
    assert report.summary()["samples"] == 3
    assert "belong to no sample" in " ".join(report.notes)


def test_what_a_sample_must_have(tmp_path):
    path = foreign.write_tar(tmp_path / "s.tar", foreign.sample("a", 1) + foreign.sample("b", 1, txt=None))
    report = check_shards(str(path), Rules(1_000_000, classes=1, required=("txt",)))
    assert found(report) == {"member is missing": 1, "label out of range": 2}
    big = foreign.write_tar(tmp_path / "t.tar", foreign.sample("a", 1, jpg=foreign.image_bytes(size=(64, 64))[:900]))
    assert found(check_shards(str(big), RULES)) == {"image does not decode": 1}
    assert not check_shards(str(big), Rules(1_000_000, decode=False)).bad


def test_processes_change_nothing(odd, tmp_path):
    """Also the exit code, the table, and that text of others is no markup and no escape sequence."""
    one = check_shards(str(odd), RULES, quarantine=tmp_path / "1.jsonl")
    two = check_shards(str(odd), RULES, quarantine=tmp_path / "2.jsonl", workers=2)
    assert one.summary() == two.summary()
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_text_of_others_is_shown_as_it_is(tmp_path):
    path = foreign.write_tar(tmp_path / "s.tar", foreign.sample("a[red]\x1b[31m", 1, jpg=b"no"))
    result = CliRunner().invoke(shards_app, ["check", str(path), "--workers", "1"])
    assert result.exit_code == 2
    assert "[red]\\x1b[31m" in result.stdout
    assert "\x1b[31m" not in result.stdout


def test_mistakes(odd, tmp_path):
    with pytest.raises(DataError) as caught:
        check_shards(str(odd), RULES, quarantine=tmp_path / "no" / "q.jsonl")
    assert str(caught.value.where).endswith("/no/q.jsonl")
    for arguments, match in (
        (["check", str(odd), "--link"], "has no effect without --repair"),
        (["check", str(odd), "--repair", str(odd)], "already exists"),
        (["check", str(odd), "--repair", str(tmp_path)], "already exists"),
        (["check", str(tmp_path)], r"no \.tar shards"),
    ):
        result = CliRunner().invoke(shards_app, [*arguments, "--workers", "1"])
        assert type(result.exception).__name__ in ("ConfigError", "DataError"), arguments
        assert match.replace("\\", "") in str(result.exception)


def test_a_file_that_is_not_there_is_a_fault_also_beside_a_bar(odd):
    (odd / "04.tar").symlink_to(odd / "nowhere.tar")
    done = CliRunner().invoke(shards_app, ["check", str(odd), "--json"])
    assert done.exit_code == 2
    assert any(
        example["url"].endswith("04.tar")
        for facts in json.loads(done.stdout)["reasons"].values()
        for example in facts["examples"]
    )
