"""`evaluate --pictures`: the folder, the document, the samples."""

import io
import json

import pytest
from rich.console import Console

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluation import commands
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.pictures import collect
from m3i_scale.evaluation.report import render

GROUPS = ["warm", "cold", "green"]


@pytest.fixture(scope="module")
def drawn(vit_folder, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "of" / "vit"
    return evaluate(vit_folder, str(shards / "val"), train_data=str(shards / "train"), pictures=folder), folder


def test_what_can_be_shown_is_and_the_rest_has_reasons(drawn):
    result, folder = drawn
    listed = json.loads((folder / "pictures.json").read_text())
    shown = ["dense_pca", "attention", "similarity", "neighbours"]
    assert [one["name"] for one in listed["pictures"]] == result["pictures"]["shown"] == shown
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["pictures.json", *(one["file"] for one in listed["pictures"])]
    )
    assert set(result["pictures"]["not_shown"]) == {"text_to_image", "image_to_text"}
    assert "text/model.safetensors" in result["pictures"]["not_shown"]["text_to_image"]
    console = Console(width=160, file=io.StringIO())
    console.print(render(result), soft_wrap=True)
    assert "not shown: text to image: no text tower" in console.file.getvalue()
    by_name = {one["name"]: one for one in listed["pictures"]}
    assert "right at rank 1" in by_name["neighbours"]["alt"]  # the classes differ in color
    assert "5, 6" not in by_name["neighbours"]["alt"]  # of six of a class, one is the query


def test_the_samples_depend_on_the_data_alone(drawn, vit_folder, shards, tmp_path):
    first = drawn[0]["pictures"]["samples"]
    again = evaluate(vit_folder, str(shards / "val"), pool="cls", pictures=tmp_path / "new", batch_size=5)
    assert again["pictures"]["samples"] == first
    assert len(set(first)) == 8
    assert again["measures"] == {}


def test_named_samples_are_shown_in_their_order(vit_folder, shards, tmp_path, drawn):
    asked = list(reversed(drawn[0]["pictures"]["samples"][:3]))
    found = evaluate(vit_folder, str(shards / "val"), pictures=tmp_path / "new", picture_samples=[*asked, asked[0]])
    assert found["pictures"]["samples"] == asked


def test_an_unknown_sample_is_refused_before_the_model_is_loaded(vit_folder, shards, tmp_path, drawn, monkeypatch):
    monkeypatch.delattr(commands, "load_vision")
    wrong = drawn[0]["pictures"]["samples"][0][:-1] + "x"
    with pytest.raises(DataError) as caught:
        evaluate(vit_folder, str(shards / "val"), pictures=tmp_path / "new", picture_samples=[wrong])
    assert caught.value.where == "--picture-samples"
    assert ".tar/" in caught.value.fix


def test_a_sample_that_is_left_out_cannot_be_shown(vit_folder, shards, tmp_path, drawn):
    key = drawn[0]["pictures"]["samples"][0]  # of a concept `c3`, whose class is 3 % 3
    group = GROUPS[int(key.rpartition("-c")[2]) % 3]
    with pytest.raises(DataError) as caught:
        evaluate(
            vit_folder,
            str(shards / "val"),
            pictures=tmp_path / "new",
            picture_samples=[key],
            exclude_groups=(group,),
        )
    assert caught.value.where == "--picture-samples"
    assert group in str(caught.value.why)


def test_folders_that_take_no_pictures(vit_folder, shards, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "old.jpg").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "taken", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError) as caught:
            evaluate(vit_folder, str(shards / "val"), pictures=folder)
        assert caught.value.where == f"--pictures {folder}"


def test_a_disk_that_refuses_is_told(vit_folder, shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collect, "write_pictures", full)
    with pytest.raises(ConfigError) as caught:
        evaluate(vit_folder, str(shards / "val"), pictures=tmp_path / "new")
    assert str(caught.value.where).endswith("/new")
    assert "No space left" in caught.value.what


def test_more_samples_than_a_picture_shows(vit_folder, shards, tmp_path):
    keys = [f"x.tar/{number}" for number in range(9)]
    with pytest.raises(ConfigError) as caught:
        evaluate(vit_folder, str(shards / "val"), pictures=tmp_path / "new", picture_samples=keys)
    assert caught.value.where == "--picture-samples"


def test_samples_without_a_folder_have_no_effect(vit_folder, shards):
    with pytest.raises(ConfigError) as caught:
        evaluate(vit_folder, str(shards / "val"), picture_samples=["x.tar/a"])
    assert caught.value.where == "--pictures"
