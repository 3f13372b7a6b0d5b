import io
import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.intervals import Clusters, mean_of
from m3i_scale.evaluation.measures import measure_advantage
from m3i_scale.evaluation.report import render
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput


@pytest.fixture(scope="module")
def result(vit_folder, shards):
    return evaluate(vit_folder, str(shards / "val"), train_data=str(shards / "train"), baseline="pixels")


def text_of(result):
    console = Console(width=160, file=io.StringIO())
    console.print(render(result), soft_wrap=True)
    return console.file.getvalue()


def test_the_command_prints_a_table_and_writes_the_document(vit_folder, shards, tmp_path):
    arguments = ["evaluate", str(vit_folder), "--data", str(shards / "val"), "--train-data", str(shards / "train")]
    arguments += ["--measure", "few_shot"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "evaluation.json")])
    assert done.exit_code == 0, done.output
    assert "few shot k=5" in done.output
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert 0 <= document["measures"]["few_shot"]["k=5"]["value"] <= 1
    missing = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "missing" / "evaluation.json")])
    assert isinstance(missing.exception, ConfigError)


def test_probes_learn_colours(result):
    for block in (result["measures"], result["baseline"]["measures"]):
        # 18 test pictures; the classes differ in color, so even a random network and the pixels tell them apart
        assert block["linear"]["accuracy"]["value"] > 0.9
        assert block["knn"]["k=10"]["value"] > 0.9
        assert block["linear"]["chance"] == pytest.approx(1 / 3)
        assert block["linear"]["C_selected_by"] == "family"
    assert result["data"]["cluster_unit"] == "concept"
    assert result["measures"]["linear"]["accuracy"]["clusters"] == 6


def test_the_advantage_over_pixels_is_that_on_the_same_samples(result):
    advantage = result["baseline"]["advantage_of_model"]
    assert set(advantage) == {"knn", "few_shot", "linear"}
    for name, figures in advantage.items():
        ours, theirs = (block[name] for block in (result["measures"], result["baseline"]["measures"]))
        for label, figure in figures.items():
            assert figure["value"] == pytest.approx(ours[label]["value"] - theirs[label]["value"])
            assert figure["clusters"] == ours[label]["clusters"]
        assert "right" not in ours
        assert "right" not in theirs
    assert "linear accuracy minus pixels" in text_of(result)


def test_equal_predictions_leave_no_doubt_and_opposite_ones_do():
    clusters = Clusters("sample", np.arange(20))
    half, other = (mean_of(np.arange(20) % 2 == rest, clusters) for rest in (0, 1))
    same = measure_advantage({"accuracy": half}, {"accuracy": half})["accuracy"]
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    opposite = measure_advantage({"accuracy": half}, {"accuracy": other})["accuracy"]
    assert opposite["value"] == 0
    assert opposite["low"] < -0.2 < 0.2 < opposite["high"]


def test_what_lacks_is_listed(result):
    assert set(result["measures"]) | set(result["not_measured"]) == {
        "knn",
        "few_shot",
        "linear",
        "dense",
        "classifier",
        "zero_shot",
        "retrieval",
    }
    assert "no masks in the training data (mask.png members)" in result["not_measured"]["dense"]
    assert "text/model.safetensors" in result["not_measured"]["zero_shot"]
    text = text_of(result)
    assert "not measured: zero shot" in text
    assert "pixels: linear accuracy" in text
    assert "6 × concept" in text


def test_same_call_same_document(vit_folder, shards, result):
    again = evaluate(
        vit_folder, str(shards / "val"), train_data=str(shards / "train"), baseline="pixels", batch_size=64
    )
    assert json.dumps(again, allow_nan=False) == json.dumps(result, allow_nan=False)


def test_excluded_group_is_left_out_of_both_sides(vit_folder, shards):
    found = evaluate(
        vit_folder,
        str(shards / "val"),
        train_data=str(shards / "train"),
        measures=("knn",),
        exclude_groups=("green",),
    )
    assert found["data"]["left_out"] == {"group 'green' excluded": 6}
    assert found["measures"]["knn"]["chance"] == 0.5
    assert "left out of train data" in text_of(found)


def test_unknown_group_is_refused(vit_folder, shards):
    with pytest.raises(DataError) as caught:
        evaluate(vit_folder, str(shards / "val"), train_data=str(shards / "train"), exclude_groups=("gren",))
    assert "green" in caught.value.fix


def test_nothing_to_measure_is_an_error_with_reasons(vit_folder, shards):
    with pytest.raises(DataError) as caught:
        evaluate(vit_folder, str(shards / "val"))
    assert str(caught.value.where).endswith("/shards/val")
    for reason in ("no training data", "no text tower"):
        assert reason in caught.value.why


def test_training_on_the_test_data_is_refused(vit_folder, shards):
    with pytest.raises(DataError) as caught:
        evaluate(vit_folder, str(shards / "val"), train_data=str(shards / "val"))
    assert str(caught.value.where).endswith(".tar")


def test_shared_families_are_told(vit_folder, shards, tmp_path, records_of):
    make_shards(
        ListedInput(records_of(count=6), ["warm", "cold", "green"]),
        tmp_path / "other",
        name="o",
        options=ShardOptions(multiple_of=1, vocabulary=0),
    )
    found = evaluate(
        vit_folder, str(tmp_path / "other" / "train"), train_data=str(shards / "train"), measures=("linear",)
    )
    assert any("test values of `family` are in the training data" in warning for warning in found["warnings"])


def test_without_concepts_it_says_so(vit_folder, shards, tmp_path, records_of):
    make_shards(
        ListedInput(records_of(meta=False), ["warm", "cold", "green"]),
        tmp_path / "bare",
        name="b",
        options=ShardOptions(multiple_of=1, vocabulary=0),
    )
    found = evaluate(
        vit_folder, str(tmp_path / "bare" / "val"), train_data=str(tmp_path / "bare" / "train"), measures=("linear",)
    )
    assert found["data"]["cluster_unit"] == found["measures"]["linear"]["C_selected_by"] == "sample"
    assert sum("too narrow" in warning for warning in found["warnings"]) == 1  # of both sides together
    assert "warning:" in text_of(found)


@pytest.mark.parametrize(
    "wrong",
    [
        {"measures": ("knm",)},
        {"measures": ()},
        {"pool": "max"},
        {"baseline": "pixel"},
        {"batch_size": 0},
        {"device": "tpu9"},
    ],
)
def test_wrong_options(vit_folder, shards, wrong):
    with pytest.raises(ConfigError):
        evaluate(vit_folder, str(shards / "val"), **wrong)
