"""The comparison of going on with an anchor and without: its two sets, its trainings, and what is printed of them."""

import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import ViTConfig, ViTModel

from m3i_scale.errors import DataError
from m3i_scale.output import release_stdout
from m3i_scale.run.check import errors_of
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
KINDS = {
    "people-body": "hands",
    "objects": "tool",
    "animals-nature": "animal-bird",
    "food-drink": "drink",
    "flags": "flag",
}
SPLITS = ("train", "val", "style", "style_val")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The benchmark's own modules, as they import each other; standard output stays that of the tests."""
    sys.path.insert(0, str(BENCHMARKS))
    import _common  # noqa: F401

    release_stdout()
    yield
    sys.path.remove(str(BENCHMARKS))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def emoji(folder, groups=tuple(KINDS)):
    """Red squares with the members, groups and splits of the emoji set."""
    records = []
    for split in SPLITS:
        for number in range(4 * len(groups)):
            group = groups[number % len(groups)]
            image, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64))
            box = (number, number, number + 24, number + 24)
            image.paste((200, 30 + 5 * number, 20), box)
            mask.paste(1 + groups.index(group), box)
            meta = {
                "group": group,
                "subgroup": KINDS[group],
                "concept": f"{split}{number}",
                "family": f"{split}{number}",
            }
            sample = {"caption": f"{group} {number}", "label": groups.index(group), "meta": meta, "split": split}
            records.append(Record(f"{split}-{number}", png(image), mask=png(mask), **sample))
    options = ShardOptions(multiple_of=2, vocabulary=64)
    make_shards(ListedInput(records, groups), folder, name="emoji", options=options)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    from _domain import open_sets

    root = tmp_path_factory.mktemp("domain")
    return open_sets(emoji(root / "emoji"), root / "sets")


def samples(folder):
    """Members of all samples by their ending."""
    found = {}
    for shard in sorted(folder.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                found.setdefault((shard.parent.name, key), {})[ending] = tar.extractfile(member).read()
    return found


def test_the_two_sets_share_nothing_and_the_domain_is_seen_by_a_scanner(sets):
    general_classes, domain_classes = sets.general.classes["main"], sets.domain.classes["main"]
    assert (general_classes, domain_classes) == (["objects", "people-body"], ["animal-bird", "drink"])
    general, domain = samples(sets.general.folder), samples(sets.domain.folder)
    assert {split for split, _ in general} == {split for split, _ in domain} == {"train", "val"}
    assert not {key for _, key in general} & {key for _, key in domain}
    assert len(general) == len(domain) == 4 * 4 * 2  # two groups of four in each of the four splits
    for found, classes, color in ((general, general_classes, True), (domain, domain_classes, False)):
        for sample in found.values():
            facts = json.loads(sample["json"])
            label = classes.index(facts["group"] if color else facts["subgroup"])
            assert int(sample["cls"]) == label
            assert set(np.unique(np.asarray(Image.open(io.BytesIO(sample["mask.png"]))))) == {0, label + 1}
            pixels = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB")).astype(int)
            assert bool((pixels[..., 0] != pixels[..., 1]).any()) == color
            assert (pixels[0, -1].mean() > 128) == color  # the white ground is dark in a scan


def test_sets_are_made_once_and_the_same(sets, tmp_path):
    from _domain import open_sets

    before = {path: path.stat().st_mtime_ns for path in sets.domain.folder.rglob("*") if path.is_file()}
    beside = sets.domain.folder.parent.parent
    made_of = beside.parent / "emoji"
    assert open_sets(made_of, beside) == sets
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = open_sets(made_of, tmp_path)
    assert (again.general.sha256, again.domain.sha256) == (sets.general.sha256, sets.domain.sha256)


def test_an_emoji_set_without_the_domain_is_refused(tmp_path):
    from _domain import open_sets

    with pytest.raises(DataError) as caught:
        open_sets(emoji(tmp_path / "emoji", ("objects", "flags")), tmp_path / "sets")
    assert "domain" in caught.value.where


def both(sets, output, steps=4):
    """A start, and what goes on from it with the anchor and without."""
    from _domain import GoneOn, Start

    start = Start("start", 0, output, sets, 6)
    return start, *(GoneOn(name, 0, output, sets, steps, start, name == "after") for name in ("after", "free"))


def test_with_and_without_the_anchor_differ_in_nothing_else(sets, tmp_path):
    _, anchored, free = (one.values(tmp_path) for one in both(sets, tmp_path))
    (anchor,) = [target for target in anchored["recipe"]["targets"] if target["kind"] == "anchor"]
    anchored["recipe"]["targets"].remove(anchor)
    assert anchored["recipe"].pop("teachers") == {anchor["teacher"]: {"from_pretrained": "student"}}
    del anchored["recipe"]["decoders"][anchor["decoder"]]
    assert anchored == free


def test_their_run_files_hold_with_weights_of_the_start(sets, tmp_path):
    start, *gone_on = both(sets, tmp_path)
    shape = start.values(tmp_path)["backbone"]["config"]
    ViTModel(ViTConfig(**shape), add_pooling_layer=False).save_pretrained(start.export)
    for number, one in enumerate((start, *gone_on)):
        run_file = tmp_path / f"{number}.yaml"
        run_file.write_text(yaml.safe_dump(one.values(tmp_path / str(number))))
        assert errors_of(str(run_file), ranks=1) == []


def test_a_result_depends_on_its_start_and_on_both_sets(sets, tmp_path):
    start, anchored, free = both(sets, tmp_path)
    other_set = replace(sets, general=replace(sets.general, sha256="other"))
    others = [
        replace(anchored, start=replace(start, seed=1)),
        replace(anchored, sets=other_set),
        replace(anchored, steps=5),
    ]
    keys = [one.key() for one in (start, anchored, free, *others)]
    assert len(set(keys)) == len(keys)
    assert anchored.key() == both(sets, tmp_path / "elsewhere")[1].key()


def test_what_is_printed_and_that_nothing_is_done_twice(sets, tmp_path, monkeypatch):
    """With trainings that only write down what they were asked for."""
    import _domain
    import _trainings
    import domain

    asked = []

    def tool(arguments, log, environment):
        asked.append(arguments)
        if arguments[0] == "train":
            run = yaml.safe_load(Path(arguments[1]).read_text())
            (Path(run["output_dir"]) / "checkpoints" / f"step-{run['optim']['steps']:08d}").mkdir(parents=True)
        if arguments[0] == "export":
            Path(arguments[3]).mkdir()
        seed, anchored = int(log.parent.name.split("-")[-2]), not log.parent.name.startswith("after_without")
        before, gain = 0.5 + 0.01 * seed, {"data": 0.2, "general": -0.02 if anchored else -0.1 - 0.01 * seed}
        sides = {name: {"before": {"value": before}, "after": {"value": before + gain[name]}} for name in gain}
        return {"sets": {name: {"measures": dict.fromkeys(_domain.FIGURES.values(), sides[name])} for name in sides}}

    for module in (_domain, _trainings):
        monkeypatch.setattr(module, "tool", tool)
    document = domain.compared(sets, tmp_path, 2, 6, 4, 1)
    assert set(document["domain"]) == set(document["general"]) == {"knn", "linear", "dense"}
    figures = document["domain"]["linear"]
    assert figures["before"]["seeds"] == pytest.approx([0.5, 0.51])
    assert figures["after"]["seeds"] == pytest.approx([0.7, 0.71])
    for part in ("low", "mean", "high"):  # pairs of one seed differ alike, so that the interval has no width
        assert figures["difference"][part] == pytest.approx(0.2)
        assert figures["anchor"][part] == pytest.approx(0.0)
    lost = document["general"]["dense"]
    assert lost["difference"]["mean"] == pytest.approx(-0.02)
    assert lost["difference_without_anchor"]["seeds"] == pytest.approx([-0.1, -0.11])
    assert lost["anchor"]["seeds"] == pytest.approx([0.08, 0.09])
    assert lost["anchor"]["low"] < 0.08 < lost["anchor"]["high"]

    commands = [arguments[0] for arguments in asked]
    assert (commands.count("train"), commands.count("export"), commands.count("compare")) == (6, 6, 4)
    starts = {arguments[1] for arguments in asked if arguments[0] == "compare"}
    assert len(starts) == 2  # of each seed its own
    assert not list(tmp_path.rglob("step-*"))
    assert domain.compared(sets, tmp_path, 2, 6, 4, 1) == document
    assert len(asked) == len(commands)
    domain.compared(sets, tmp_path, 2, 6, 5, 1)
    assert [arguments[0] for arguments in asked[len(commands) :]].count("train") == 4  # the starts stay
