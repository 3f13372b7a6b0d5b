"""Every way in which an export can differ from what was trained must be found in the fresh process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.errors import ExportError
from m3i_scale.exports.reference import make_reference
from m3i_scale.exports.source import find_source, source_tokenizer
from m3i_scale.exports.verify import verify
from m3i_scale.exports.write import ExportContents, plan_parts, write_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(run_dir, tmp_path_factory):
    source = find_source(run_dir[0])
    weights = dict(saved_weights(source.checkpoint, "student"))
    tokenizer = source_tokenizer(source)
    parts = plan_parts(source, ExportContents(), tokenizer)
    folder = tmp_path_factory.mktemp("reference")
    fingerprints = write_folder(folder, source, parts, weights, torch.float32, tokenizer, ExportContents())
    return make_reference(source, parts, fingerprints, weights, torch.float32, tokenizer)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported[0], tmp_path / "copy")


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def name_of(tensors, part):
    return next(name for name in tensors if part in name)


def refused(folder, reference, message):
    with pytest.raises(ExportError, match=message):
        verify(folder, reference)


def test_untouched_export_passes(folder, reference):
    proven = verify(folder, reference)
    assert proven["classes"] == {"vision": "ViTModel", "text": "BertModel", "image": "BitImageProcessor"}
    assert max(proven["largest_output_difference"].values()) < 1e-5


@pytest.mark.parametrize("file", ["model.safetensors", "text/model.safetensors"])
def test_one_tampered_number(folder, reference, file, same_process):
    def change(tensors):
        tensor = tensors[name_of(tensors, "intermediate.dense.weight")]
        tensor[3, 5] += 1e-4 * (1 + abs(tensor[3, 5]))

    change_tensors(folder / file, change)
    refused(folder, reference, "after loading, tensor .* is not that of the checkpoint")


def test_tampered_head(folder, reference, same_process):
    change_tensors(folder / "heads" / "heads.safetensors", lambda tensors: tensors["heads.text.log_scale"].add_(1))
    refused(folder, reference, "heads: tensor heads.text.log_scale is not that of the checkpoint")


def test_missing_tensor(folder, reference, same_process):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(name_of(tensors, "output.dense.weight")))
    refused(folder, reference, "vision model: 1 missing keys")


def test_unexpected_tensor(folder, reference, same_process):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update(stray=torch.ones(2)))
    refused(folder, reference, "vision model: 1 unexpected keys, e.g. stray")


def test_empty_tensor(folder, reference):
    def change(tensors):
        tensors[name_of(tensors, "output.dense.weight")] = torch.zeros(0, 32)

    change_tensors(folder / "model.safetensors", change)
    refused(folder, reference, "cannot load the export|mismatched")


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_values_that_no_training_leaves(folder, reference, value, same_process):
    change_tensors(
        folder / "model.safetensors", lambda tensors: tensors[name_of(tensors, "output.dense.weight")].fill_(value)
    )
    refused(folder, reference, "after loading, tensor .* is not that of the checkpoint")


def test_wrong_dtype_in_the_config(folder, reference, same_process):
    change_json(folder / "config.json", dtype="bfloat16")
    refused(folder, reference, "tensors are float32 and config.json says bfloat16")


def test_wrong_epsilon_in_the_config(folder, reference, same_process):
    """Every tensor is right, and the outputs are not."""
    change_json(folder / "config.json", layer_norm_eps=0.1)
    refused(folder, reference, "vision model: outputs differ")


def test_wrong_shape_in_the_config(folder, reference):
    change_json(folder / "config.json", hidden_size=64)
    refused(folder, reference, "cannot load the export|mismatched")


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5, 0.5, 0.5]},
        {"do_center_crop": False, "size": {"height": 32, "width": 32}},
        {"rescale_factor": 1.0},
    ],
)
def test_wrong_preprocessing(folder, reference, change, same_process):
    change_json(folder / "preprocessor_config.json", **change)
    refused(folder, reference, "image processor's '.*' picture differs")


def test_another_tokenizer(folder, reference, same_process):
    path = folder / "text" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    refused(folder, reference, "tokenizer cuts captions into other tokens")


def test_missing_text_tower(folder, reference, same_process):
    shutil.rmtree(folder / "text")
    refused(folder, reference, "text model is missing")


def test_code_of_the_package_is_not_at_hand(folder, reference):
    """A folder that would need the training package must not pass only because it is installed here."""
    change_json(folder / "config.json", auto_map={"AutoModel": "modeling.Model"}, model_type="m3i")
    (folder / "modeling.py").write_text("from m3i_scale.objective.information import Objective as Model\n")
    refused(folder, reference, "cannot load the export")


def test_tampered_number_in_a_fresh_process(folder, reference):
    change_tensors(
        folder / "model.safetensors", lambda tensors: tensors[name_of(tensors, "output.dense.bias")].add_(0.01)
    )
    refused(folder, reference, "after loading, tensor .* is not that of the checkpoint")


def test_not_a_folder_of_weights(folder, reference):
    (folder / "model.safetensors").write_bytes(b"torn")
    refused(folder, reference, "cannot load the export")
