"""The comparison of one stage with its parts: equal compute, honest intervals, one small run of all of it."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3i_scale.data.make import ShardOptions, make_shards
from m3i_scale.data.records import FileImage, FileMask, Record
from m3i_scale.errors import DataError

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
    """Discs of three colours with masks, labels and captions."""
    root = tmp_path_factory.mktemp("discs")
    records = []
    for number in range(80):
        label, generator = number % 3, np.random.default_rng(number)
        centre = generator.integers(14, 34, 2)
        rows, columns = np.mgrid[:48, :48]
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 150
        pixels = np.full((48, 48, 3), 230) + generator.integers(-20, 20, (48, 48, 3))
        pixels[inside] = np.array([(220, 60, 40), (40, 80, 220), (40, 200, 60)])[label]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number}.png")
        Image.fromarray((inside * (label + 1)).astype(np.uint8)).save(root / f"{number}-mask.png")
        records.append(
            Record(
                f"d{number}",
                FileImage(root / f"{number}.png"),
                caption=f"a {LABELS[label]} disc, number {number % 8}",
                label=label,
                meta={"concept": f"c{number}", "family": f"f{number // 2}"},
                split="val" if number % 4 == 0 else "train",
                mask=FileMask(root / f"{number}-mask.png"),
            )
        )
    options = ShardOptions(multiple_of=4, vocabulary=64)
    make_shards(records, root / "shards", labels=LABELS, name="d", options=options)
    return root / "shards"


def job(name, folder, budget=1e12, **fields):
    from _one_stage import RECIPES, Job, flop_per_sample, open_data, run_values

    data, entry = open_data(folder), next(entry for entry in RECIPES if entry.name == name)
    flop = flop_per_sample(run_values(entry, data, 0, folder), data.classes)
    return Job(entry, fields.pop("seed", 0), data, folder.parent / "runs", flop, budget, **{"curve": False} | fields)


def test_every_recipe_gets_the_same_compute(folder):
    from _one_stage import BATCH, RECIPES

    spent = {}
    for entry in RECIPES:
        found = job(entry.name, folder)
        spent[entry.name] = found.steps * found.flop * BATCH
    assert max(spent.values()) / min(spent.values()) < 1.1
    assert spent["m3i"] == pytest.approx(1e12, rel=0.05)


def test_the_count_is_that_of_the_matrix_products(folder):
    """`supervised`: three products of every size forward and backward (two for the first layer, whose input needs no
    gradient), four matrices of attention, two of the MLP, and two products of attention itself."""
    from _one_stage import IMAGE, LAYERS, PATCH, WIDTH

    tokens = (IMAGE // PATCH) ** 2 + 1
    layer = 12 * WIDTH**2 * tokens + 2 * WIDTH * tokens**2
    patches = 2 * (tokens - 1) * 3 * PATCH**2 * WIDTH
    classes = 3 * WIDTH * len(LABELS)
    wanted = 2 * (3 * LAYERS * layer + patches + classes)
    assert job("supervised", folder).flop == pytest.approx(wanted, rel=0.01)


def test_all_train_the_same_backbone_on_the_same_data(folder):
    from _one_stage import ABLATIONS, RECIPES, open_data, run_values

    data = open_data(folder)
    found = [run_values(entry, data, 0, folder) for entry in (*RECIPES, *ABLATIONS)]
    for values in found:
        assert values["data"] == found[0]["data"]
        assert values["backbone"]["config"] == found[0]["backbone"]["config"]
    assert {values["backbone"]["attention"] for values in found} == {"own", "mixed"}
    recipes = [json.dumps([values["recipe"], values["backbone"]], sort_keys=True) for values in found]
    assert len(set(recipes)) == len(recipes)  # no ablation is the default under another name


def test_a_result_belongs_to_its_settings(folder):
    one = job("mae", folder)
    assert one.key() == job("mae", folder).key()
    for other in (job("mae", folder, seed=1), job("mae", folder, budget=2e12), job("sim", folder)):
        assert other.key() != one.key()


def test_the_interval_is_students():
    from one_stage import mean_interval
    from scipy import stats

    values = [0.5, 0.56, 0.53]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=statistics.fmean(values), scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["mean"] == pytest.approx(0.53)


@pytest.mark.parametrize("missing", ["split", "captions"])
def test_data_that_cannot_be_compared_on_are_refused(folder, tmp_path, missing):
    from _one_stage import open_data

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


def test_a_small_comparison_end_to_end(folder, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "one_stage.py"), "--json", "--data", str(folder), "--only", "clip"]
    command += ["--budget", "0.1", "--seeds", "2", "--output", str(tmp_path / "runs")]
    command += ["--markdown", str(tmp_path / "tables.md"), "--plot", str(tmp_path / "curves.svg")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document["clip"]) == {"linear", "knn", "dense", "zero_shot", "retrieval"}
    for figure in document["clip"].values():
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert len(figure["seeds"]) == 2
    assert set(document["pixels"]) == {"linear", "knn", "dense"}
    assert set(document["untrained"]) == {"linear", "knn", "dense"}
    assert len(document["curves"]["clip"]) == 3
    assert document["curves"]["clip"][-1]["tflop"] == pytest.approx(0.1)
    assert document["curves"]["clip"][-1]["linear"] == document["clip"]["linear"]["seeds"][0]
    assert "| `clip` |" in (tmp_path / "tables.md").read_text()
    assert "</svg>" in (tmp_path / "curves.svg").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(again.stdout) == document  # from what the first call kept
    wrong = subprocess.run([*command, "--only", "clap"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "did you mean 'clip'" in wrong.stderr
