"""`evaluate --pictures`: the folder, the document, the samples."""

import io
import json

import pytest
from rich.console import Console

from m3i_scale.errors import ConfigError
from m3i_scale.evaluate import NotMeasuredError
from m3i_scale.evaluate.commands import evaluate
from m3i_scale.evaluate.pictures import collect
from m3i_scale.evaluate.report import render


@pytest.fixture(scope="module")
def drawn(vit_folder, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "of" / "vit"
    return evaluate(vit_folder, str(shards / "val"), train_data=str(shards / "train"), pictures=folder), folder


def test_what_can_be_shown_is(drawn):
    result, folder = drawn
    listed = json.loads((folder / "pictures.json").read_text())
    shown = ["dense_pca", "attention", "similarity"]
    assert [one["name"] for one in listed["pictures"]] == result["pictures"]["shown"] == shown
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["pictures.json", *(one["file"] for one in listed["pictures"])]
    )
    assert result["pictures"]["not_shown"] == {}


def test_the_rest_has_reasons(vit_folder, shards, tmp_path, monkeypatch):
    def without(*_):
        raise NotMeasuredError("none is given")

    monkeypatch.setattr(collect, "attention_of", without)
    result = evaluate(vit_folder, str(shards / "val"), measures=("knn",), pictures=tmp_path / "new")
    assert result["pictures"]["shown"] == ["dense_pca", "similarity"]
    assert result["pictures"]["not_shown"] == {"attention": "none is given"}
    console = Console(width=160, file=io.StringIO())
    console.print(render(result), soft_wrap=True)
    assert "not shown: attention: none is given" in console.file.getvalue()


def test_the_samples_depend_on_the_data_alone(drawn, vit_folder, shards, tmp_path):
    first = drawn[0]["pictures"]["samples"]
    again = evaluate(vit_folder, str(shards / "val"), pool="cls", pictures=tmp_path / "new", batch_size=5)
    assert again["pictures"]["samples"] == first
    assert len(set(first)) == 8
    assert again["measures"] == {}


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


def test_a_number_of_pictures_without_a_folder_has_no_effect(vit_folder, shards):
    with pytest.raises(ConfigError) as caught:
        evaluate(vit_folder, str(shards / "val"), picture_count=3)
    assert caught.value.where == "--pictures"
