import dataclasses
import importlib
import json
import logging
import shutil
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerFast, ViTModel, pipeline
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import known_recipes, read_yaml, resource_folder
from m3i_scale.errors import CheckpointError, ConfigError, ExportError, UserError
from m3i_scale.exports import export as export_module
from m3i_scale.exports import source as source_module
from m3i_scale.exports.card import cell, compute_of, curve_of, evaluation_rows, render_card
from m3i_scale.exports.export import export
from m3i_scale.exports.source import find_source, hash_folder
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.output import leave_out_accelerator_warning


def left_behind(target):
    return [path.name for path in target.parent.iterdir()]


def test_stock_classes_give_the_trained_outputs(exported, run_dir):
    folder, _ = exported
    objective = run_dir[1]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder / "text")(
        ["thing number 3", "cold"], padding=True, return_tensors="pt"
    )
    text = AutoModel.from_pretrained(folder / "text", add_pooling_layer=False).eval()
    with torch.no_grad():
        pixels = objective.pixel_norm(images)
        wanted = objective.student.encode(torch.cat(objective.student.embed(pixels), dim=1))
        found = model(**processor(list(images), return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(found, wanted)
        wanted = objective.text.model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        torch.testing.assert_close(text(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state, wanted)


def test_folder_and_provenance(exported, run_dir):
    folder, result = exported
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"], config["image_size"]) == (["ViTModel"], "float32", 32)
    assert config["id2label"] == {}  # the classifier lies in heads/
    provenance = json.loads((folder / "export.json").read_text())
    files = hash_folder(folder)
    del files["export.json"]
    assert provenance["files"] == files == result["files"]
    assert (provenance["step"], provenance["weights"], provenance["samples"]) == (10, "student", 40_960)
    # the record of step 20 is of a later model than the checkpoint of step 10
    assert provenance["figures"]["loss"] == 1.25
    assert provenance["data"][0]["samples"] == 54
    assert result["warning"] is None
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {folder.stat().st_mode & 0o666}
    for path in folder.rglob("*"):
        # nothing of the training machine goes with the weights
        assert path.is_dir() or str(run_dir[0]).encode() not in path.read_bytes(), path


def test_card(exported):
    text = (exported[0] / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert "datasets" not in front  # the Hub would look for one called "things"
    assert "intra" in body
    assert exported[1]["data"][0]["manifest_sha256"] in body
    assert exported[1]["files"]["model.safetensors"] in body
    assert "had not been evaluated" in body
    assert "| things | things | 54 | 54 | 54 |" in body
    assert [row["step"] for row in exported[1]["curve"]] == [1, 10]
    assert "| 10 | 1.25 | 2.5 |" in body
    assert "memory" not in body  # what a run looks like from inside is no figure of the model


@pytest.mark.parametrize("name", known_recipes())
def test_the_card_of_every_recipe_tells_its_targets(exported, run_dir, name):
    folder, provenance = exported
    recipe = parse_recipe(read_yaml(resource_folder("recipes") / f"{name}.yaml")["recipe"])
    source = dataclasses.replace(find_source(run_dir[0]), recipe=recipe)
    card = render_card(source, provenance, json.loads((folder / "config.json").read_text()))
    assert all(f"| {target.name}: {target.modality}" in card for target in recipe.targets)


def test_a_pipeline_does_not_answer_from_a_head_that_nobody_trained(exported):
    with pytest.raises(KeyError):
        pipeline("image-classification", str(exported[0]))(Image.new("RGB", (40, 40)))


@pytest.mark.usefixtures("same_process")
def test_a_recipe_with_a_class_of_ones_own_is_read_once_its_module_is_named(make_run, shards, tmp_path, monkeypatch):
    (tmp_path / "own_export.py").write_text(
        "from m3i_scale.objective.regularizers import DenseUniGrad\n\nclass Quiet(DenseUniGrad):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("own_export")
    folder, _ = make_run(tmp_path / "run", regularizer="own_export.Quiet")
    out, data = str(tmp_path / "out"), str(shards / "val")
    for command in (
        ["export", str(folder), "--output", out],
        ["evaluate", out, "--data", data, "--measure", "retrieval"],
    ):
        monkeypatch.delitem(sys.modules, "own_export")
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, UserError)
        assert "--import own_export" in str(refused.exception)
        assert "own_export" not in sys.modules
        done = CliRunner().invoke(app, [*command, "--import", "own_export"])
        assert done.exit_code == 0, done.exception
    missing = CliRunner().invoke(app, [*command, "--import", "nowhere_to_be_found"])
    assert isinstance(missing.exception, ConfigError)
    assert missing.exception.where == "--import"


def test_the_curve_is_short_however_long_the_run(run_dir, make_run, tmp_path):
    folder, _ = make_run(tmp_path / "run", steps=(1000,))
    lines = [{"kind": "train", "step": step, "loss": float(step)} for step in range(1, 1101)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = curve_of(find_source(folder))
    assert [row["step"] for row in curve] == [1, *range(100, 1001, 100)]


def test_a_record_of_no_step_counts_as_one_of_the_start(run_dir, make_run, tmp_path):
    folder, _ = make_run(tmp_path / "run")
    lines = [{"kind": "train", "loss": 2.0}, {"kind": "train", "step": 10, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["step"] for row in curve_of(find_source(folder))] == [0, 10]


def test_a_cell_cannot_break_the_table():
    assert cell("a | b\n\n# <script>") == "a \\| b # &lt;script>"
    assert cell({"x": 0.123456789}) == "x: 0.123457"


def test_momentum_weights_in_bfloat16(run_dir, tmp_path, same_process):
    result = export(run_dir[0], tmp_path / "ema", weights="ema", dtype="bfloat16", license_id="cc-by-4.0")
    model = AutoModel.from_pretrained(tmp_path / "ema", add_pooling_layer=False)
    averaged = run_dir[1].momentum.backbone.model.state_dict()
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averaged[name].bfloat16()), name
    assert result["dtype"] == "bfloat16"
    assert yaml.safe_load((tmp_path / "ema" / "README.md").read_text().split("---\n")[1])["license"] == "cc-by-4.0"
    with safe_open(tmp_path / "ema" / "heads" / "heads.safetensors", framework="pt") as heads:
        assert not any(name.startswith(("momentum.", "student.", "text.model.")) for name in heads.keys())  # noqa: SIM118


def test_newest_good_checkpoint_is_taken_and_the_torn_one_named(make_run, tmp_path, same_process):
    folder, _ = make_run(tmp_path / "run", steps=(10, 20))
    with (folder / "checkpoints" / "step-00000020" / "meta.json").open("a") as file:
        file.write(" ")
    result = export(folder, tmp_path / "out")
    assert result["step"] == 10
    assert "step-00000020" in result["warning"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["passed_over"][0]["checkpoint"] == "step-00000020"
    with pytest.raises(CheckpointError) as caught:
        export(folder / "checkpoints" / "step-00000020", tmp_path / "other")
    assert caught.value.where == str(folder / "checkpoints" / "step-00000020")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("word", ["Setting accelerator to CPU. If you have", "the disk is slow"])
def test_an_export_does_not_warn_of_a_missing_gpu(word):
    leave_out_accelerator_warning()
    logger = logging.getLogger("DeepSpeed")
    record = logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, word, (), None)
    assert bool(logger.filter(record)) is ("accelerator" not in word)


def test_libraries_are_silent(run_dir, tmp_path, same_process, capfd):
    export(run_dir[0], tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step-00000010"])
def test_nothing_to_export(tmp_path, name):
    with pytest.raises((CheckpointError, ConfigError)):
        export(tmp_path / name, tmp_path / "out")
    assert left_behind(tmp_path / "out") == []


def test_taken_target(run_dir, exported, tmp_path, same_process):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "mine")
    assert str(caught.value.where).endswith("/mine")
    assert "--overwrite" in caught.value.fix
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "mine", overwrite=True)
    assert str(caught.value.where).endswith("/mine")
    assert "export.json" in caught.value.what
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    shutil.copytree(exported[0], tmp_path / "old")
    (tmp_path / "old" / "stale.txt").write_text("x")
    export(run_dir[0], tmp_path / "old", overwrite=True)
    assert not (tmp_path / "old" / "stale.txt").exists()
    assert sorted(left_behind(tmp_path / "old")) == ["mine", "old"]


def test_a_failed_overwrite_keeps_the_old_export(run_dir, exported, tmp_path, monkeypatch):
    shutil.copytree(exported[0], tmp_path / "old")
    before = hash_folder(tmp_path / "old")
    write = export_module.write_folder

    def torn(folder, *args):
        write(folder, *args)
        (folder / "config.json").unlink()

    monkeypatch.setattr(export_module, "write_folder", torn)
    with pytest.raises(ExportError, match="cannot load the export"):
        export(run_dir[0], tmp_path / "old", overwrite=True)
    assert hash_folder(tmp_path / "old") == before
    assert left_behind(tmp_path / "old") == ["old"]


@pytest.mark.parametrize("wrong", [{"weights": "teacher"}, {"dtype": "float16"}])
def test_wrong_options(run_dir, tmp_path, wrong):
    with pytest.raises(ExportError, match=r"teacher|float16"):
        export(run_dir[0], tmp_path / "out", **wrong)


def test_another_tokenizer_is_refused(make_run, shards, tmp_path):
    folder, _ = make_run(tmp_path / "run", vocab_size=500)
    tokens = len(PreTrainedTokenizerFast.from_pretrained(shards / "tokenizer"))
    with pytest.raises(ExportError) as caught:
        export(folder, tmp_path / "out")
    assert "500" in caught.value.what
    assert str(tokens) in caught.value.what


def test_empty_tensor_in_the_checkpoint(run_dir, tmp_path, monkeypatch):
    load = source_module.saved_weights

    def emptied(*args):
        weights = dict(load(*args))
        weights["student.model.layernorm.weight"] = torch.zeros(0)
        return weights

    monkeypatch.setattr(source_module, "saved_weights", emptied)
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "out")
    assert caught.value.where == "student.model.layernorm.weight"
    assert left_behind(tmp_path / "out") == []


def test_weights_of_one_flat_buffer_are_all_written(run_dir, tmp_path, monkeypatch, same_process):
    """Consolidation may hand out views of one buffer, which safetensors would take for tied weights."""
    load = source_module.saved_weights

    def views(*args):
        weights = dict(load(*args))
        flat = torch.cat([tensor.flatten() for tensor in weights.values()])
        parts = flat.split([tensor.numel() for tensor in weights.values()])
        return {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}

    monkeypatch.setattr(source_module, "saved_weights", views)
    export(run_dir[0], tmp_path / "out")
    wanted = len(ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).state_dict())
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == wanted


def test_evaluation_goes_into_the_card(make_run, tmp_path, same_process):
    folder, _ = make_run(tmp_path / "run")
    estimate = {"value": 0.5, "low": 0.4, "high": 0.625}
    measures = {
        "linear": {"accuracy": estimate, "chance": 0.125, "majority": 0.25},
        "retrieval": {"image_to_text": {"R@1": {**estimate, "chance": 0.01}}},
    }
    evaluation = {"measures": measures, "data": {"samples": 80, "cluster_unit": "concept"}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    export(folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| linear accuracy | 0.500 | 0.400 … 0.625 | 0.125, majority 0.25 |" in text
    assert "| retrieval image to text R@1 | 0.500 | 0.400 … 0.625 | 0.01 |" in text
    for wrong in ([], {"measures": measures}, {"data": evaluation["data"]}):
        (folder / "evaluation.json").write_text(json.dumps(wrong))
        with pytest.raises(ExportError) as caught:
            export(folder, tmp_path / "other")
        assert str(caught.value.where).endswith("/run/evaluation.json")
        assert "m3i-scale evaluate" in caught.value.fix


def test_an_evaluation_of_other_weights_stays_out_of_the_card(make_run, tmp_path, same_process):
    folder, _ = make_run(tmp_path / "run")
    facts = export(folder, tmp_path / "student")
    of = {key: facts[key] for key in ("checkpoint", "checkpoint_manifest_sha256", "weights")}
    figures = {"knn": {"k=10": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    data = {"samples": 80, "cluster_unit": "concept"}
    file = folder / "evaluation.json"
    file.write_text(json.dumps({"model": {"export": of}, "measures": figures, "data": data}))
    again = export(folder, tmp_path / "again")
    assert (again["evaluation"]["measures"], again["warning"]) == (figures, None)
    other = export(folder, tmp_path / "momentum", weights="ema")
    assert other["evaluation"] is None
    assert "evaluation.json is of the student weights" in other["warning"]
    with pytest.raises(ExportError) as caught:
        export(folder, tmp_path / "given", weights="ema", evaluation_file=file)
    assert caught.value.where == str(file)
    assert "student" in caught.value.what
    file.write_text(json.dumps({"model": {"export": of | {"weights": "momentum"}}, "measures": figures, "data": data}))
    old = export(folder, tmp_path / "of the previous format", weights="ema", evaluation_file=file)
    assert old["evaluation"]["measures"] == figures


def test_steps_between_the_last_record_and_a_stop_count_with_the_next_one(make_run, tmp_path):
    folder, _ = make_run(tmp_path / "run")
    run = {"kind": "run", "name": "tiny", "world_size": 1}
    train = {"kind": "train", "time/step": 360.0}
    records = [run | {"step": 0}, train | {"step": 2}, run | {"step": 5}, train | {"step": 10}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compute_of(find_source(folder))["rank_hours"] == pytest.approx(1.0)
    gone_on = [run | {"step": 5}, train | {"step": 10}]  # from a checkpoint of another run, which is not known here
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in gone_on))
    assert compute_of(find_source(folder))["rank_hours"] == pytest.approx(0.5)


def test_a_figure_with_a_guess_of_its_own_does_not_take_that_of_its_measure():
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    dense = {"accuracy": estimate, "mean_iou": {**estimate, "majority": 0.06}, "chance": 0.1, "majority": 0.44}
    rows = list(evaluation_rows({"dense": dense}))
    assert rows[0] == ("dense accuracy", "0.500", "0.400 … 0.600", "0.1, majority 0.44")
    assert rows[1] == ("dense mean iou", "0.500", "0.400 … 0.600", "majority 0.06")
