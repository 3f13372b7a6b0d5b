"""An export goes into `evaluate` with its text tower and its heads."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import ExportError
from m3i_scale.evaluation import towers
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.compare import compare
from m3i_scale.evaluation.samples import open_table, read_samples
from m3i_scale.evaluation.towers import load_objective, towers_of


def test_towers_are_the_trained_ones(exported, run_dir):
    folder, objective = exported[0], run_dir[1]
    filled, run, _ = load_objective(folder, torch.device("cpu"))
    towers = towers_of(filled, run, folder, torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(towers.images(images), objective.embed_images(images, "text"))
    captions = ["thing number 3", "cold things of a kind that is cut after some tokens and more"]
    tokens = AutoTokenizer.from_pretrained(folder / "text")(
        captions, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    wanted = objective.embed_text(tokens["input_ids"], tokens["attention_mask"].bool())
    np.testing.assert_allclose(towers.texts(captions), wanted.numpy(), atol=1e-6)


def test_all_measures_of_an_export(exported, shards):
    found = evaluate(exported[0], str(shards / "val"), train_data=str(shards / "train"))
    assert list(found["not_measured"]) == ["dense"]  # these shards have no masks
    retrieval = found["measures"]["retrieval"]
    # three pictures stand under every caption
    assert (retrieval["images"], retrieval["distinct_captions"]) == (18, 6)
    assert retrieval["image_to_text"]["R@1"]["chance"] == pytest.approx(1 / 6)
    assert retrieval["text_to_image"]["R@1"]["chance"] == pytest.approx(1 / 6)
    assert retrieval["text_to_image"]["R@1"]["clusters"] == 6
    # of 6 captions, 10 would be all of them
    assert list(retrieval["image_to_text"]) == ["R@1", "R@5"]
    assert list(retrieval["text_to_image"]) == ["R@1", "R@5", "R@10"]
    zero_shot = found["measures"]["zero_shot"]
    assert zero_shot["classes"] == ["warm-things", "cold-things", "green-things"]
    assert zero_shot["majority"] == pytest.approx(1 / 3)


def test_text_is_compared_where_both_models_have_a_tower(exported, shards, tmp_path):
    other = shutil.copytree(exported[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, other / "model.safetensors")
    found = compare(exported[0], other, str(shards), measures=("zero_shot", "retrieval"))[0]["sets"]["data"]
    assert found["train_data"] is None  # no probe is asked for
    recalls = [f"retrieval image_to_text R@{depth}" for depth in (1, 5)]
    recalls += [f"retrieval text_to_image R@{depth}" for depth in (1, 5, 10)]
    assert list(found["measures"]) == ["zero_shot accuracy", *recalls]
    alone = evaluate(exported[0], str(shards / "val"), measures=("zero_shot", "retrieval"))["measures"]
    before = {name: figures["before"] for name, figures in found["measures"].items()}
    assert before["zero_shot accuracy"] == alone["zero_shot"]["accuracy"]
    assert before["retrieval text_to_image R@5"].items() <= alone["retrieval"]["text_to_image"]["R@5"].items()
    # ties count against the model: equal embeddings find nothing
    assert found["measures"]["retrieval image_to_text R@1"]["after"]["value"] == 0


def test_the_trained_head_of_an_export(exported, run_dir, shards):
    """It lies in heads/, and is asked about the data's classes."""
    found = evaluate(exported[0], str(shards / "val"), measures=("classifier",))["measures"]["classifier"]
    samples = list(read_samples(open_table(str(shards / "val"), "--data"), CenterCrop(32, 32)))
    logits = run_dir[1].embed_images(torch.from_numpy(np.stack([sample.pixels for sample in samples])), "category")
    right = logits.argmax(dim=1).numpy() == [sample.label for sample in samples]
    assert found["top-1"]["value"] == pytest.approx(right.mean())
    assert (found["classes"], found["label_set"], found["top-1"]["samples"]) == (3, "things", 18)


def test_an_export_that_lost_its_heads(exported, shards, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    (folder / "heads" / "heads.safetensors").unlink()
    with pytest.raises(ExportError) as caught:
        evaluate(folder, str(shards / "val"))
    assert caught.value.where == str(folder)
    found = evaluate(folder, str(shards / "val"), train_data=str(shards / "train"), measures=("classifier", "knn"))
    assert list(found["measures"]) == ["knn"]
    assert "parameters are missing" in found["not_measured"]["classifier"]


def test_without_a_category_target_no_head_is_built(exported, shards, tmp_path, monkeypatch):
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    path = folder / "heads" / "objective.json"
    values = json.loads(path.read_text())
    for target in values["run"]["recipe"]["targets"]:
        target["kind"] = "dense"
    path.write_text(json.dumps(values))
    monkeypatch.setattr(towers, "build_objective", None)
    found = evaluate(folder, str(shards / "val"), train_data=str(shards / "train"), measures=("classifier", "knn"))
    assert found["not_measured"]["classifier"] == "the model folder has no trained classifier"
