"""The comparison of one stage with its parts: equal compute, honest intervals, one small run of all of it."""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError, DataError, UserError
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

pytestmark = pytest.mark.bench
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LABELS = ["warm", "cold", "green"]


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The benchmark's own modules, as they import each other."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Discs of three colors with masks, labels and captions."""
    root = tmp_path_factory.mktemp("discs")
    records = []
    for number in range(80):
        label, generator = number % 3, np.random.default_rng(number)
        center = generator.integers(14, 34, 2)
        rows, columns = np.mgrid[:48, :48]
        inside = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < 150
        pixels = np.full((48, 48, 3), 230) + generator.integers(-20, 20, (48, 48, 3))
        pixels[inside] = np.array([(220, 60, 40), (40, 80, 220), (40, 200, 60)])[label]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number}.png")
        Image.fromarray((inside * (label + 1)).astype(np.uint8)).save(root / f"{number}-mask.png")
        records.append(
            Record(
                f"d{number}",
                root / f"{number}.png",
                caption=f"a {LABELS[label]} disc, number {number % 8}",
                label=label,
                meta={"concept": f"c{number}", "family": f"f{number // 2}"},
                split="val" if number % 4 == 0 else "train",
                mask=root / f"{number}-mask.png",
            )
        )
    options = ShardOptions(multiple_of=4, vocabulary=64)
    make_shards(ListedInput(records, LABELS), root / "shards", name="d", options=options)
    return root / "shards"


def job(name, folder, budget=1e12, **fields):
    from _one_stage import ABLATIONS, RECIPES, Job, flop_per_sample, run_values
    from _one_stage_data import open_data

    data, entry = open_data(folder), next(entry for entry in (*RECIPES, *ABLATIONS) if entry.name == name)
    flop = flop_per_sample(run_values(entry, data, 0, folder), data)
    fields = {"price": flop, "points": 1} | fields
    return Job(name, fields.pop("seed", 0), folder.parent / "runs", entry, data, flop, budget=budget, **fields)


def by_hand(tokens):
    """Multiplications and additions of the backbone's forward pass on so many tokens, class token included."""
    from _one_stage_data import EMOJI

    layers, width, patch = EMOJI.layers, EMOJI.width, EMOJI.patch
    return 2 * (layers * (12 * width**2 * tokens + 2 * width * tokens**2) + (tokens - 1) * 3 * patch**2 * width)


def test_the_count_is_that_of_the_matrix_products(folder):
    """`supervised`: every product once forward and twice backward, but for the patches, whose input has no gradient."""
    from _one_stage_data import EMOJI

    patches = (EMOJI.image // EMOJI.patch) ** 2
    embed = 2 * patches * 3 * EMOJI.patch**2 * EMOJI.width
    classes = 2 * len(LABELS) * EMOJI.width
    wanted = 3 * by_hand(patches + 1) - embed + 3 * classes
    assert job("supervised", folder).flop == pytest.approx(wanted, rel=0.01)


def test_targets_are_counted_once_forward(folder):
    """What `sim` pays for its EMA teacher: the whole view, without a backward pass."""
    from _cost import recipe_step, synthetic_batch
    from _one_stage_data import EMOJI
    from torch.utils.flop_counter import FlopCounterMode

    from m3i_scale.config import RunConfig, parse_section

    values = job("sim", folder).values(folder)
    run = parse_section(RunConfig, values, where="test")
    batch = synthetic_batch(EMOJI.batch, 2, image=EMOJI.image, tokens=8, classes=3, vocabulary=100)
    with FlopCounterMode(display=False, depth=None) as counter:
        recipe_step(run, {"main": LABELS}, 100, batch)()
    counts = {name: sum(values.values()) for name, values in counter.get_flop_counts().items()}
    averaged = re.compile(r"Objective\.momentum\.backbone\.model\.(embeddings|layers\.\d+)")
    target = sum(count for name, count in counts.items() if averaged.fullmatch(name))
    assert target / EMOJI.batch == pytest.approx(by_hand((EMOJI.image // EMOJI.patch) ** 2 + 1), rel=0.02)
    assert counts["Global"] / EMOJI.batch == pytest.approx(job("sim", folder).flop, rel=1e-6)


def test_a_budget_is_judged_by_the_dearest_recipe(folder):
    """Whichever comes first; what the message says is enough for all."""
    from _one_stage import UNTRAINED
    from one_stage import check_budget

    one = job("mae", folder, budget=1e11)
    jobs = [one, replace(job("m3i", folder, budget=1e11), price=3 * one.price)]
    jobs.append(replace(one, entry=UNTRAINED, price=9 * one.price))
    with pytest.raises(ConfigError, match="steps of 'm3i'") as caught:
        check_budget(jobs)
    least = float(caught.value.fix.split()[1])
    check_budget([replace(one, budget=least * 1e12) for one in jobs])
    assert all(replace(one, budget=least * 1e12).steps >= 20 for one in jobs[:2])


def test_a_budget_that_keeps_nothing_equal_is_refused(folder):
    assert job("m3i", folder).steps > 40
    with pytest.raises(ConfigError, match=r"0.1 TFLOP are \d steps") as caught:
        _ = job("m3i", folder, budget=1e11).steps
    assert "fewer than 20 steps" in caught.value.why
    least = float(caught.value.fix.split()[1]) * 1e12
    assert job("m3i", folder, budget=least).steps >= 20


def test_decoders_and_projectors_are_at_most_a_third_of_the_backbone(folder):
    from _one_stage import ABLATIONS, RECIPES, run_values
    from _one_stage_data import EMOJI, open_data

    data = open_data(folder)
    for entry in (*RECIPES, *ABLATIONS):
        recipe = run_values(entry, data, 0, folder)["recipe"]
        depths = [decoder["depth"] for decoder in recipe["decoders"].values() if "depth" in decoder]
        depths += [recipe["ema"]["projector_depth"]] if "ema" in recipe else []
        assert all(1 <= depth <= EMOJI.layers / 3 for depth in depths)


def test_all_train_the_same_backbone_on_the_same_data(folder):
    from _one_stage import ABLATIONS, RECIPES, run_values
    from _one_stage_data import open_data

    data = open_data(folder)
    entries = (*RECIPES, *ABLATIONS)
    found = [run_values(entry, data, 0, folder) for entry in entries]
    for entry, values in zip(entries, found, strict=True):
        own = {kind: values["data"]["augment"].pop(kind) for kind in ("blur", "solarize")}  # as a run of it has
        assert own == load_run(entry.base).data.augment.model_dump(include={"blur", "solarize"})
        assert values["data"] == found[0]["data"]
        assert values["backbone"]["config"] == found[0]["backbone"]["config"]
    assert {values["backbone"]["attention"] for values in found} == {"within_image", "across_images"}
    recipes = [json.dumps([values["recipe"], values["backbone"]], sort_keys=True) for values in found]
    assert len(set(recipes)) == len(recipes)  # no ablation is the default under another name


def test_a_result_belongs_to_its_settings(folder):
    one = job("mae", folder)
    assert one.key() == job("mae", folder).key()
    for other in (job("mae", folder, seed=1), job("mae", folder, budget=2e12), job("sim", folder)):
        assert other.key() != one.key()


def test_the_interval_is_students():
    from _intervals import difference_interval, mean_interval
    from scipy import stats

    values, others = [0.5, 0.56, 0.53], [0.4, 0.48, 0.41]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=statistics.fmean(values), scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["mean"] == pytest.approx(0.53)
    gap = difference_interval(values, others)
    assert gap["mean"] == pytest.approx(0.1)
    spread = (statistics.variance(values) / 3, statistics.variance(others) / 3)
    degrees = sum(spread) ** 2 / sum(part**2 / 2 for part in spread)
    half = stats.t.ppf(0.975, degrees) * sum(spread) ** 0.5
    assert (gap["low"], gap["high"]) == pytest.approx((gap["mean"] - half, gap["mean"] + half))
    assert difference_interval([0.5, 0.5], [0.4, 0.4])["low"] == pytest.approx(0.1)


@pytest.mark.parametrize("missing", ["split", "captions"])
def test_data_that_cannot_be_compared_on_are_refused(folder, tmp_path, missing):
    from _one_stage_data import open_data

    if missing == "split":
        with pytest.raises(DataError, match="no train shards"):
            open_data(tmp_path)
        return
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        manifest = json.loads((folder / split / "manifest.json").read_text())
        for shard in manifest["shards"].values():
            shard["with_caption"] = 0
        (tmp_path / split / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no training sample is with caption"):
        open_data(tmp_path)


def test_every_row_of_the_whole_comparison(folder, tmp_path, monkeypatch):
    """With trainings and evaluations that only write down what they were asked for."""
    import _one_stage
    import _one_stage_data
    import _trainings
    import downstream
    import one_stage
    from _one_stage_report import TITLES, markdown, plot

    asked, fine_tuned = [], []

    def tool(arguments, log, environment, program=()):
        asked.append(arguments)
        if arguments[0] == "train":
            run = yaml.safe_load(Path(arguments[1]).read_text())
            every, steps = run["checkpoint"]["every_steps"], run["optim"]["steps"]
            for step in sorted({*range(every, steps, every), steps}):
                (Path(run["output_dir"]) / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        if arguments[0] == "export":
            Path(arguments[3]).mkdir(exist_ok=True)
            (Path(arguments[3]) / "model.safetensors").write_text(log.parent.name)
        if not program:
            return {}
        seed, trained = float(log.parent.name.split("-")[-2]), not log.parent.name.startswith("untrained")
        text = "text" in (log.parent / "run.yaml").read_text()
        return [probed(one, text, 0.5 if trained else 0.3, seed) for one in json.loads(arguments[1])]

    def probed(probe, text, level, seed):
        estimate = {"value": level + 0.01 * seed, "low": 0.4, "high": 0.7, "chance": 0.1}
        if probe["measures"] == ["retrieval"]:
            sides = {name: {"R@10": estimate} for name in ("image_to_text", "text_to_image")}
            absent = {} if text else {"retrieval": "no text tower"}
            return {"measures": {"retrieval": sides} if text else {}, "not_measured": absent}
        probes = {
            "linear": {"accuracy": estimate, "majority": 0.3},
            "knn": {"k=20": estimate, "majority": 0.3},
            "dense": {"mean_iou": {**estimate, "majority": 0.2}},
        }
        pixels = {**probes, "knn": {"k=20": {**estimate, "value": 0.45}, "majority": 0.3}}
        return {
            "measures": probes | ({"zero_shot": {"accuracy": estimate, "majority": 0.3}} if text else {}),
            "not_measured": {} if text else {"zero_shot": "no text tower"},
            **({"baseline": {"measures": pixels}} if "baseline" in probe else {}),
        }

    def fine_tune(arguments, log, environment):
        fine_tuned.append(Path(arguments[2]))
        (log.parent / "run").mkdir()
        seed = int(Path(arguments[2]).parent.name.split("-")[-2])
        return {"figures": {name: {"value": 0.1 + 0.1 * seed, "low": 0.0, "high": 0.3} for name in detection.metrics}}

    (detection,) = downstream.chosen(["detection"])
    for split in ("train", "val"):
        (tmp_path / "scenes" / split).mkdir(parents=True)
        (tmp_path / "scenes" / split / "manifest.json").write_text("{}")
    for module in (_one_stage, _trainings):
        monkeypatch.setattr(module, "tool", tool)
    monkeypatch.setattr(downstream, "tool", fine_tune)
    monkeypatch.setattr(downstream, "scene_shards", lambda: tmp_path / "scenes")
    data = _one_stage_data.open_data(folder)
    asked_for = one_stage.Comparison(data, tmp_path, "compute", [1.0], 2, 3, *one_stage._chosen([], ["all"]))
    assert [task.name for task in asked_for.tasks()] == ["classification_5_per_class", "detection"]  # no names of masks
    given = (2, [detection])
    document = asked_for.document(*given)
    rows = [entry.name for entry in (*_one_stage.RECIPES, *_one_stage.ABLATIONS)]
    assert set(document["m3i_minus"]) == {*rows} - {"m3i"}
    assert document["m3i_minus"]["mae"]["linear"]["mean"] == 0
    boxes = {f"detection {name}" for name in detection.metrics}
    probes = {"linear", "knn", "dense", "zero_shot", "retrieval", "text_to_image"}
    assert set(document["m3i"]) == {*probes, *boxes}
    # The interval of the trained is from 0.441; untrained weights reach 0.369, raw pixels 0.450 in kNN, and boxes vary.
    counted = [name for name, one in document["counted"].items() if one["counts"]]
    assert counted == ["linear", "dense", "zero_shot", "retrieval"]
    assert document["counted"]["knn"]["beaten_by"] == ["raw pixels"]
    assert document["counted"]["retrieval"]["baselines"] == {"chance": 0.1}
    # All are equal in what they can do: the means of all seven ranks, of the first three, and of the last four.
    assert document["mean_rank"]["m3i"]["mean"] == pytest.approx((2 * 4 + 2 * 2) / 4)
    assert document["mean_rank"]["mae"]["seeds"] == pytest.approx([(2 * 4 + 2 * 5.5) / 4] * 2)
    assert document["not_measured"]["mae"] == {"zero_shot": "no text tower", "retrieval": "no text tower"}
    assert set(document["mae"]) == set(document["untrained"]) == {"linear", "knn", "dense", *boxes}
    assert document["mae"]["detection box_AP"]["seeds"] == pytest.approx([0.1, 0.2])
    assert boxes <= set(document["m3i_minus"]["mae"])
    assert all(not boxes & set(row["measures"]) for row in document["ablations"].values())
    assert len(set(fine_tuned)) == len(fine_tuned) == 2 * (len(_one_stage.RECIPES) + 1)
    assert document["m3i"]["linear"]["seeds"] == [0.5, 0.51]
    assert [len(points) for points in document["curves"].values()] == [3] * len(_one_stage.RECIPES)
    trainings = [command for command in asked if command[0] == "train"]
    assert len(trainings) == 2 * (len(rows) + 1)
    table = markdown(document)
    assert "In the mean rank: linear probe, dense probe, zero-shot, retrieval." in table
    assert "- Not kNN: the best recipe, `supervised` 0.505 (0.441 … 0.569), does not beat raw pixels 0.450." in table
    assert all(TITLES.get(name, name) in table for name in boxes)
    assert all(f"`{name}`" in table or f"| {name} |" in table for name in rows)
    plot(document, tmp_path / "curves.svg")
    again = asked_for.document(*given)
    assert again == document
    assert len(fine_tuned) == 2 * (len(_one_stage.RECIPES) + 1)
    assert len([command for command in asked if command[0] == "train"]) == len(trainings)
    with pytest.raises(ConfigError, match="variants of m3i"):
        one_stage._chosen(["clip"], ["all"])

    few = one_stage._chosen(["mae", "m3i"], ["none"])
    ladder = replace(asked_for, protocol="samples", budgets=[1.0, 2.0], entries=few[0], others=few[1])
    before = {path.name for path in tmp_path.glob("m3i-*")}
    document = ladder.document(2, [])
    assert list(document["ladder"]) == ["1", "2"]
    assert document["ladder"]["2"]["m3i"] == document["m3i"]
    assert document["settings"]["steps"]["mae"] == document["settings"]["steps"]["m3i"]
    for points in document["curves"].values():
        assert points[1]["samples"] == pytest.approx(2 * points[0]["samples"], rel=0.05)
    own = document["curves"]["m3i"]
    assert [point["tflop"] for point in own] == pytest.approx([1.0, 2.0], rel=0.05)
    assert document["curves"]["mae"][1]["tflop"] < 1.9
    made = {path.name for path in tmp_path.glob("m3i-*")} - before
    assert len(made) == 2  # at 1 TFLOP they are those of equal compute
    assert "mean rank at | 1 TFLOP | 2 TFLOP" in markdown(document)
    plot(document, tmp_path / "ladder.svg")


def test_a_recipe_has_one_colour_in_all_panels(tmp_path):
    from _one_stage_report import plot

    points = [{"tflop": 1, "linear": 0.1, "retrieval": 0.2}, {"tflop": 2, "linear": 0.3, "retrieval": 0.4}]
    bare = [{"tflop": 1, "linear": 0.1}]
    plot({"curves": {"mae": bare, "clip": points}, "settings": {"protocol": "compute"}}, tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    # the second color: a line and markers in both panels, and in the legend; never the first one in the second panel
    assert text.count("#1f77b4") < text.count("#ff7f0e")


def test_a_failed_command_ends_the_comparison_with_its_words(folder, tmp_path):
    from _trainings import tool

    with pytest.raises(UserError, match="exit code 2") as caught:
        tool(["evaluate", str(tmp_path / "none"), "--data", str(folder / "val")], tmp_path / "log", {})
    assert "no such folder" in caught.value.why


def test_a_small_comparison_end_to_end(folder, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "one_stage.py"), "--json", "--data", str(folder), "--only", "clip"]
    command += ["--budget", "0.2", "--seeds", "2", "--downstream", "none", "--output", str(tmp_path / "runs")]
    command += ["--markdown", str(tmp_path / "tables.md"), "--plot", str(tmp_path / "curves.svg")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document["clip"]) == {"linear", "knn", "dense", "zero_shot", "retrieval", "text_to_image"}
    for figure in document["clip"].values():
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert len(figure["seeds"]) == 2
    assert set(document["pixels"]) == {"linear", "knn", "dense"}
    assert set(document["untrained"]) == {"linear", "knn", "dense"}
    assert len(document["curves"]["clip"]) == 3
    assert document["curves"]["clip"][-1]["tflop"] == pytest.approx(0.2, rel=0.05)
    assert set(document["counted"]) == {"linear", "knn", "dense", "zero_shot", "retrieval"}
    assert document["curves"]["clip"][-1]["linear"] == document["clip"]["linear"]["seeds"][0]
    assert "| `clip` |" in (tmp_path / "tables.md").read_text()
    assert "</svg>" in (tmp_path / "curves.svg").read_text()
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.log")}
    assert len(logs) > 4
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(again.stdout) == document
    assert logs == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.log")}  # nothing ran again
    wrong = subprocess.run([*command, "--only", "clap"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "did you mean 'clip'" in wrong.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory, folder):
    """The datasets of examples/photos.py, with 16 samples of noise per split; the discs are the scenes."""
    root = tmp_path_factory.mktemp("photos")
    splits = {"imagenette": ("train", "val"), "flickr8k": ("train", "test"), "tiny": ("train", "transfer", "val")}
    for name, of_set in splits.items():
        records = []
        for number in range(16 * len(of_set)):
            path, split = root / f"{name}-{number}.png", of_set[number // 16]
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(path)
            caption = f"photo number {number}" + ("\nthe same photo" if split == "train" else "")
            label = None if name == "flickr8k" else number % 3
            records.append(
                Record(path.stem, path, caption=caption if name == "flickr8k" else None, label=label, split=split)
            )
        classes = [] if name == "flickr8k" else LABELS
        make_shards(ListedInput(records, classes), root / "p" / name, options=ShardOptions(vocabulary=64))
    for split, name in (("train", "training"), ("val", "validation")):
        (root / name).symlink_to(folder / split)
    (root / "scenes-masks").symlink_to(root)
    return root


@pytest.fixture
def no_scenes(photos, monkeypatch):
    import _one_stage_data

    monkeypatch.setattr(_one_stage_data, "scene_shards", lambda kind: photos)


def test_photos_are_a_mixture_that_every_recipe_can_read(photos, no_scenes, tmp_path):
    from _one_stage import RECIPES, flop_per_sample, run_values
    from _one_stage_data import PHOTOS, open_photos

    from m3i_scale.run.data_checks import check_with_data

    data = open_photos(photos / "p")
    assert (data.samples, data.setting, data.fine_tuned) == (48, PHOTOS, False)
    read = {}
    for entry in RECIPES:
        values = run_values(entry, data, 0, tmp_path / entry.name)
        read[entry.name] = {
            name: {key: value for key, value in one.items() if key not in ("path", "weight")}
            for name, one in values["data"]["datasets"].items()
        }
        assert flop_per_sample(values, data) > 1e6
        path = tmp_path / f"{entry.name}.yaml"
        path.write_text(yaml.safe_dump(values | {"optim": {"steps": 10, "batch_size": 8, "micro_batch_size": 8}}))
        check_with_data(load_run(path), 1)
    lines, bare = {"captions": "lines"}, {"labels": False}
    assert read["m3i"] == {"imagenette": {}, "flickr8k": lines, "tiny": bare}
    assert read["clip"] == {"imagenette": {}, "flickr8k": lines, "tiny": {}}
    assert read["supervised"] == {"imagenette": {}, "flickr8k": {}, "tiny": bare}
    assert read["mae"] == {"imagenette": {}, "flickr8k": {}, "tiny": {}}


def test_a_small_comparison_on_photos_end_to_end(photos, tmp_path):
    """Trained on the mixture; probes, transfer and retrieval on held-out shards, dense on the discs as scenes."""
    command = [sys.executable, str(BENCHMARKS / "one_stage.py"), "--json", "--photos", str(photos / "p")]
    command += ["--only", "clip", "--budget", "0.5", "--seeds", "2", "--output", str(tmp_path / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "M3I_EMOJI_FOLDER": str(photos / "emoji")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    # 16 images of three classes are too few for 20 neighbors and for 20 per class.
    probes = {"linear", "few_shot_5", "transfer_linear", "transfer_few_shot_5", "dense"}
    assert set(document["clip"]) == probes | {"retrieval", "text_to_image"}
    assert set(document["pixels"]) == set(document["untrained"]) == probes
    assert set(document["counted"]) == {"linear", "dense", "retrieval"}


def test_photos_that_are_incomplete_are_an_error(photos, no_scenes, tmp_path):
    from _one_stage_data import open_photos

    with pytest.raises(DataError, match="no shards of 'imagenette/train'") as caught:
        open_photos(tmp_path)
    assert "examples/photos.py" in caught.value.fix


def test_a_metric_counts_if_the_best_recipe_beats_all_baselines():
    from _mean_rank import counted_metrics, mean_ranks

    def results(*seeds, pixels=0.2, chance=0.1):
        measures = [{name: {"value": value} for name in ("linear", "dense")} for value in seeds]
        both = {"linear": {"value": pixels}}
        return [{"measures": one, "pixels": both, "chance": {"linear": chance}} for one in measures]

    def counted(by_name, untrained):
        return counted_metrics(by_name, untrained)["linear"]

    good, bad = results(0.40, 0.41, 0.42), results(0.30, 0.31, 0.32)
    untrained = results(0.29, 0.305, 0.30)
    metrics = counted_metrics({"clip": good, "mae": bad}, untrained)
    assert metrics["linear"]["recipe"] == "clip"
    assert metrics["linear"]["counts"]
    assert set(metrics["linear"]["baselines"]) == {"raw pixels", "chance", "untrained weights"}
    assert set(metrics["dense"]["baselines"]) == {"untrained weights"}
    assert mean_ranks({"clip": good, "mae": bad}, ["linear"])["mae"]["mean"] == 2
    assert counted({"mae": bad}, untrained)["beaten_by"] == ["untrained weights"]
    pixels = counted({"clip": good}, results(0.1, 0.1, 0.1, pixels=0.4))
    assert (pixels["beaten_by"], pixels["low"] > 0.38) == (["raw pixels"], True)
    assert counted({"clip": results(0.40, 0.41, 0.42, chance=0.5)}, untrained)["beaten_by"] == ["chance"]
    assert mean_ranks({"clip": good}, []) == {}


def test_untrained_weights_are_compared_by_seed():
    """The intervals of both overlap; the difference is the same for every seed."""
    from _mean_rank import counted_metrics

    def results(*seeds):
        return [{"measures": {"knn": {"value": value}}, "pixels": {}, "chance": {}} for value in seeds]

    metrics = counted_metrics({"clip": results(0.32, 0.42, 0.52)}, results(0.30, 0.40, 0.50))
    assert metrics["knn"]["counts"]
    shuffled = counted_metrics({"clip": results(0.42, 0.52, 0.32)}, results(0.30, 0.40, 0.50))
    assert not shuffled["knn"]["counts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x"], "--photos cannot be combined with --data"),
        (["--downstream", "segmentation"], "--photos cannot be combined with --downstream"),
        (["--photos", "none"], "no shards of 'imagenette/train'"),
    ],
)
def test_options_that_photos_do_not_take(options, message):
    import one_stage
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(one_stage.main)
    result = CliRunner().invoke(app, ["--photos", "p", *options])
    assert result.exit_code == 2
    assert message in result.output
