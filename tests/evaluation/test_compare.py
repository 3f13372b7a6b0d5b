"""`compare`: two models on the same samples, by paired intervals, and the page with dense features."""

import base64
import copy
import importlib
import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import SegformerConfig, SegformerForSemanticSegmentation, ViTConfig, ViTImageProcessor, ViTModel

from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, DataError, ExportError
from m3i_scale.evaluation import features
from m3i_scale.evaluation.command_line import comparison_table, write_comparison
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.compare import compare, compared
from m3i_scale.evaluation.dense import mean_iou
from m3i_scale.evaluation.intervals import LEVEL, RESAMPLES, SEED, Clusters, mean_of
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

COMMAND = importlib.import_module("m3i_scale.evaluation.compare")

SIDE = 48
COLORS = np.array([(220, 60, 40), (40, 80, 220)])


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def masked_record(number):
    """One color above another. Of every third image a mask names but a square of 7 pixels, which fills most of no
    large patch."""
    noise = np.random.default_rng(number).integers(-30, 30, (SIDE, SIDE, 3))
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[SIDE // 2 :] = 1
    image = np.clip(COLORS[mask if number % 2 else 1 - mask] + noise, 0, 255)
    classes = mask if number % 2 else 1 - mask
    if number % 3 == 0:
        small = np.full_like(mask, NO_CLASS)
        small[:7, :7] = classes[:7, :7]
        classes = small
    return Record(
        f"m{number}",
        png(image),
        label=number % 2,
        meta={"concept": f"c{number}"},
        split="val" if number % 4 == 0 or number % 4 == 3 else "train",
        mask=png(classes),
    )


def vit(folder, *, size=32, patch=8, zero=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**shape, image_size=size, patch_size=patch), add_pooling_layer=False)
    for parameter in model.parameters() if zero else ():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "masked"
    options = ShardOptions(multiple_of=2, vocabulary=0)
    records = [masked_record(number) for number in range(40)]
    make_shards(ListedInput(records, ["above", "below"]), output, name="m", options=options)
    return output


@pytest.fixture(scope="module")
def destroyed(tmp_path_factory):
    return vit(tmp_path_factory.mktemp("models") / "destroyed", zero=True)


@pytest.fixture(scope="module")
def forgotten(vit_folder, destroyed, shards, masked):
    return compare(vit_folder, destroyed, str(shards), general=str(masked), draw=True)


def test_what_it_does_is_told_while_it_does_it(vit_folder, shards):
    told = []
    compare(
        vit_folder,
        vit_folder,
        str(shards),
        measures=("knn",),
        progress=lambda what, samples: told.append((what, samples)),
    )
    for role in ("before", "after"):
        assert max(samples for what, samples in told if what == f"{role}: data") == 18
        assert max(samples for what, samples in told if what == f"{role}: train data") == 54
        assert any(role in what and "knn" in what for what, _ in told)


def test_a_model_is_no_better_than_itself(vit_folder, masked):
    document, pictures = compare(vit_folder, vit_folder, str(masked))
    found = document["sets"]["data"]["measures"]
    probes = {
        "knn k=10",
        "knn k=20",
        "few_shot k=1",
        "few_shot k=5",
        "linear accuracy",
        "dense accuracy",
        "dense mean_iou",
    }
    assert set(found) == probes
    for figures in found.values():
        difference = figures["difference"]
        assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
        assert figures["before"] == figures["after"]
        assert figures["change"] == "no difference shown"
    assert pictures == {}
    alone = evaluate(vit_folder, str(masked / "val"), train_data=str(masked / "train"))
    assert found["linear accuracy"]["after"] == alone["measures"]["linear"]["accuracy"]
    iou = {key: value for key, value in alone["measures"]["dense"]["mean_iou"].items() if key != "majority"}
    assert found["dense mean_iou"]["before"] == iou
    assert document["before"] == alone["model"]
    assert document["sets"]["data"]["data"] == alone["data"]


def test_destroyed_weights_lose_on_both_sets(forgotten, vit_folder, destroyed, shards):
    document, _ = forgotten
    assert set(document) == {"before", "after", "level", "bootstrap", "sets"}
    assert (document["before"]["name"], document["after"]["name"]) == ("vit", "destroyed")
    assert set(document["sets"]) == {"data", "general"}
    for of_set in document["sets"].values():
        linear = of_set["measures"]["linear accuracy"]
        assert linear["change"] == "lost"
        assert linear["difference"]["value"] == pytest.approx(linear["after"]["value"] - linear["before"]["value"])
        assert linear["difference"]["high"] < 0
    assert "dense mean_iou" not in document["sets"]["data"]["measures"]
    assert document["sets"]["general"]["measures"]["dense mean_iou"]["change"] == "lost"
    json.dumps(document, allow_nan=False)
    back = compare(destroyed, vit_folder, str(shards), measures=("linear",))[0]["sets"]["data"]["measures"]
    assert list(back) == ["linear accuracy"]
    assert back["linear accuracy"]["change"] == "gained"
    assert any("before: linear probe" in warning for warning in document_warnings(destroyed, vit_folder, shards))


def document_warnings(before, after, shards):
    return compare(before, after, str(shards), measures=("linear",))[0]["sets"]["data"]["warnings"]


def two_models(clusters=40, size=6):
    """What two models get right: the second one is better, and both find the same clusters hard."""
    generator = np.random.default_rng(7)
    easy = np.repeat(generator.random(clusters), size)
    luck = generator.random(clusters * size)
    return luck < 0.8 * easy, luck < 0.9 * easy, Clusters("concept", np.repeat(np.arange(clusters), size))


def by_hand(figure, clusters):
    """The difference of `figure(rows of drawn clusters)`, by the same draws."""
    generator, ids = np.random.default_rng(SEED), np.unique(clusters.of)
    rows = {one: np.flatnonzero(clusters.of == one) for one in ids}
    values = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(ids), len(ids))
        values.append(figure(np.concatenate([rows[ids[place]] for place in drawn])))
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def test_the_interval_is_that_of_differences_on_the_same_draws():
    before, after, clusters = two_models()
    found = compared(mean_of(before, clusters), mean_of(after, clusters))
    low, high = by_hand(lambda rows: after[rows].mean() - before[rows].mean(), clusters)
    assert (found["difference"]["low"], found["difference"]["high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["change"] == "gained"
    assert low > 0
    apart = found["after"]["low"] - found["before"]["high"]
    assert apart < 0  # two intervals of their own overlap, and would show nothing


def test_that_of_a_mean_iou_is_computed_anew_of_every_draw():
    generator = np.random.default_rng(3)
    truth, of = generator.integers(0, 3, 300), Clusters("image", np.repeat(np.arange(30), 10))
    before, after = (np.where(generator.random(300) < share, (truth + 1) % 3, truth) for share in (0.4, 0.3))

    def iou(predicted, rows):
        pairs = [(truth[rows] == one, predicted[rows] == one) for one in np.unique(truth[rows])]
        return np.mean([(left & right).sum() / (left | right).sum() for left, right in pairs])

    found = compared(mean_iou(before, truth, of), mean_iou(after, truth, of))["difference"]
    low, high = by_hand(lambda rows: iou(after, rows) - iou(before, rows), of)
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_figures_of_other_clusters_have_no_difference():
    figures = [mean_of(np.ones(4), Clusters("concept", np.array(of))) for of in ([0, 0, 1, 1], [0, 0, 1, 2])]
    with pytest.raises(ValueError, match="different clusters"):
        compared(*figures)


def test_each_model_sees_its_own_size_and_images_with_patches_for_one_alone_do_not_count(vit_folder, masked, tmp_path):
    fine = vit(tmp_path / "fine", size=48, patch=6)
    document, _ = compare(vit_folder, fine, str(masked), measures=("dense",))
    assert [document[role]["image_size"] for role in ("before", "after")] == [32, 48]
    same, _ = compare(vit_folder, vit_folder, str(masked), measures=("dense",))
    told = set(document["sets"]["data"]["warnings"]) - set(same["sets"]["data"]["warnings"])
    assert any("16" in warning and "64" in warning for warning in told)  # patches of one and of the other
    pictures = {
        name: evaluate(folder, str(masked / "val"), train_data=str(masked / "train"), measures=("dense",))["measures"]
        for name, folder in (("coarse", vit_folder), ("fine", fine))
    }
    coarse, many = (pictures[name]["dense"]["images"] for name in ("coarse", "fine"))
    assert coarse < many
    for figure in ("accuracy", "mean_iou"):
        found = document["sets"]["data"]["measures"][f"dense {figure}"]
        assert {found[key]["clusters"] for key in ("before", "after", "difference")} == {coarse}
        value = found["after"]["value"] - found["before"]["value"]
        assert found["difference"]["value"] == pytest.approx(value)


def test_what_one_model_lacks_is_told_with_its_name(vit_folder, shards, tmp_path, forgotten):
    reasons = forgotten[0]["sets"]["data"]["not_measured"]
    assert list(reasons) == ["dense", "zero_shot", "retrieval"]
    assert not any("before" in reason or "after" in reason for reason in reasons.values())  # both lack them
    with_text = shutil.copytree(vit_folder, tmp_path / "text")
    for name in ("text/model.safetensors", "heads/objective.json"):  # they are not read: there is nothing to compare
        (with_text / name).parent.mkdir()
        (with_text / name).write_bytes(b"")
    found = compare(vit_folder, with_text, str(shards), measures=("knn", "retrieval"))[0]["sets"]["data"]
    assert found["not_measured"]["retrieval"].startswith("before: ")
    assert "after" not in found["not_measured"]["retrieval"]


class Page(HTMLParser):
    """Sources of images, and words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.addresses, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.images += [(dict(attrs)["src"], dict(attrs)["alt"])] if tag == "img" else []

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_the_figures_and_pictures_of_both_sets(forgotten, tmp_path):
    document, pictures = forgotten
    assert set(pictures) == {"data", "general"}
    write_comparison(document, pictures, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert page.words.count("lost") >= 2
    assert len(page.images) == 2
    for address, alt in page.images:
        assert "before, after" in alt
        with Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2]))) as image:
            # the features of a destroyed model are all equal, and its column black
            pixels = np.asarray(image.convert("RGB"), dtype=int)
        black = (pixels.max(axis=2) < 12).mean(axis=0)
        assert black[-100:-20].min() > 0.9
        assert black[:-200].max() < 0.5


def test_names_of_others_are_text_in_the_page(forgotten, tmp_path):
    document = json.loads(json.dumps(forgotten[0]))
    document["after"]["name"] = document["after"]["path"] = "<script>alert(1)</script>"
    document["sets"]["data"]["data"]["shards"] = "https://me:secret@host/<b>/val"
    write_comparison(document, {}, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not {"script", "b", "img"} & set(page.tags)
    assert "secret" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_features_that_are_no_grid_have_figures_and_no_picture(vit_folder, shards, monkeypatch):
    monkeypatch.setattr(features.VisionModel, "patch_count", lambda self: 15)
    document, pictures = compare(vit_folder, vit_folder, str(shards), draw=True)
    assert pictures == {}
    assert "15 patches" in document["sets"]["data"]["not_shown"]
    assert "linear accuracy" in document["sets"]["data"]["measures"]


def test_the_command_prints_tables_or_a_document(forks, vit_folder, destroyed, shards, tmp_path):
    arguments = ["compare", str(vit_folder), str(destroyed), "--data", str(shards), "--measure", "knn"]
    done = forks.run(*arguments, "--output", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    assert "lost" in done.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000
    document = json.loads(forks.run(*arguments, "--json").stdout)
    assert document["sets"]["data"]["measures"]["knn k=10"]["change"] == "lost"
    for wrong in (["--output", str(tmp_path / "page.txt")], ["--output", str(tmp_path / "none" / "page.html")]):
        refused = forks.run(*arguments, *wrong)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "wrong", [{"measures": ("classifier",)}, {"measures": ()}, {"pool": "max"}, {"batch_size": 0}, {"device": "tpu9"}]
)
def test_wrong_options(vit_folder, shards, wrong):
    with pytest.raises(ConfigError):
        compare(vit_folder, vit_folder, str(shards), **wrong)


def test_models_that_are_none(vit_folder, shards, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compare(vit_folder, tmp_path / "none", str(shards))
    assert caught.value.where == "AFTER"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError) as caught:
        compare(tmp_path / "empty", vit_folder, str(shards))
    assert caught.value.where.startswith("BEFORE")
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "num_attention_heads": [1]}
    few = {"patch_sizes": [3], "strides": [4], "mlp_ratios": [1], "decoder_hidden_size": 8}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, **few)).save_pretrained(tmp_path / "segmenter")
    with pytest.raises(ConfigError) as caught:
        compare(tmp_path / "segmenter", vit_folder, str(shards))
    assert caught.value.where.startswith("BEFORE")


def test_folders_that_are_no_sets(vit_folder, shards, masked, tmp_path):
    for folder in (tmp_path / "none", shards / "val"):
        with pytest.raises(DataError) as caught:
            compare(vit_folder, vit_folder, str(shards), general=str(folder))
        assert caught.value.where.startswith("--general")
    (tmp_path / "linked").symlink_to(shards)
    (tmp_path / "crossed").mkdir()
    (tmp_path / "crossed" / "train").symlink_to(masked / "train")
    (tmp_path / "crossed" / "val").symlink_to(shards / "train")
    for same in (shards, tmp_path / "linked", f"{shards}/", tmp_path / "crossed"):
        with pytest.raises(ConfigError):
            compare(vit_folder, vit_folder, str(shards), general=str(same))
    shutil.copytree(shards / "val", tmp_path / "twice" / "val")
    (tmp_path / "twice" / "train").symlink_to(tmp_path / "twice" / "val")
    with pytest.raises(DataError) as caught:
        compare(vit_folder, vit_folder, str(tmp_path / "twice"))
    assert str(caught.value.where).endswith(".tar")


def test_nothing_to_compare_is_an_error_with_reasons(vit_folder, shards):
    with pytest.raises(DataError) as caught:
        compare(vit_folder, vit_folder, str(shards), measures=("dense", "zero_shot"))
    assert "no masks" in caught.value.why
    assert "text" in caught.value.why


def test_a_set_without_figures_leaves_those_of_the_other(vit_folder, shards, masked):
    document, _ = compare(vit_folder, vit_folder, str(masked), general=str(shards), measures=("dense",))
    assert document["sets"]["data"]["measures"]
    assert document["sets"]["general"]["measures"] == {}
    assert set(document["sets"]["general"]["not_measured"]) == {"dense"}


def test_a_path_with_brackets_is_printed_as_it_is(forgotten):
    document = copy.deepcopy(forgotten[0])
    document["sets"]["data"]["data"]["shards"] = "/data/q[/x] [bold]y"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(document))
    assert "/data/q[/x] [bold]y" in console.export_text()


def test_shards_that_change_between_the_models_are_refused(vit_folder, shards, tmp_path, monkeypatch):
    larger, original = vit(tmp_path / "larger", size=48), COMMAND.read_side

    def changed(table, replicas, **options):
        side = original(table, replicas, **options)
        if replicas[0].vision.size == 48:
            table.keys[0] = "another"
        return side

    monkeypatch.setattr(COMMAND, "read_side", changed)
    with pytest.raises(DataError) as caught:
        compare(vit_folder, larger, str(shards), measures=("knn",))
    assert str(caught.value.where).endswith("/shards")
