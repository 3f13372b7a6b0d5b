"""Exports of the other backbones: a fresh process loads them as well, InternImage from the files in its folder."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2WithRegistersModel, DINOv3ViTModel

from m3i_scale.backbones.build import backbone_config, backbone_source
from m3i_scale.backbones.internimage import SOURCE_FILES
from m3i_scale.backbones.load_plan import plan_load
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ExportError
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.exports.export import export

pytestmark = pytest.mark.slow

BACKBONES = {
    "internimage": {
        "preset": "internimage-h",
        "attention": "across_images",
        "config": {
            "channels": 16,
            "depths": [1, 1, 2, 1],
            "groups": [1, 2, 4, 8],
            "level2_post_norm_block_ids": [1],
            "fusion_width": 64,
            "image_size": 64,
        },
    },
    "dinov2": {
        "preset": "dinov2-g/14",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    },
    "registers": {
        "preset": "dinov2-reg-b/14",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    },
    "dinov3": {
        "preset": "dinov3-s+/16",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
    },
    "siglip": {
        "preset": "siglip-b/16",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
    },
    "clip": {
        "preset": "clip-b/16",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
    },
}
CLASSES = {
    "internimage": "InternImageModel",
    "dinov2": "Dinov2Model",
    "registers": "Dinov2WithRegistersModel",
    "dinov3": "DINOv3ViTModel",
    "siglip": "SiglipVisionModel",
    "clip": "CLIPVisionModel",
}
LOADS = """
import sys
sys.modules["m3i_scale"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True").eval()
pixels = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model(pixels).last_hidden_state, sys.argv[4])
"""


@pytest.fixture(scope="module", params=BACKBONES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def made(kind, make_run, tmp_path_factory):
    """A run and its export, in which the first weights that are zero have moved, as after any training."""

    root = tmp_path_factory.mktemp(kind)
    folder, objective = make_run(root / "run", backbone=BACKBONES[kind])
    return root, folder, objective.eval(), export(folder, root / "export")


def test_a_fresh_process_loads_it(made, kind):
    root, _, objective, result = made
    assert result["verified"]["classes"]["vision"] == CLASSES[kind]
    images = torch.randint(0, 256, (2, 3, objective.student.image_size, objective.student.image_size)).byte()
    pixels = objective.pixel_norm(images)
    torch.save(pixels, root / "pixels.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADS, root / "export", str(kind == "internimage"), root / "pixels.pt"]
    subprocess.run([*map(str, command), str(root / "hidden.pt")], check=True, env=environment, cwd=root)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(root / "hidden.pt"), objective.student.last_hidden_state(pixels))


def test_the_folder_says_how(made, kind):
    folder = made[0] / "export"
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    own = kind == "internimage"
    assert ("auto_map" in config) is own
    assert ("trust_remote_code=True" in card) is own
    assert "add_pooling_layer" not in card
    assert ("hidden.mean(dim=(2, 3))" in card) is own
    assert ("class token, then 16 patch tokens" in card) is (kind in ("dinov2", "clip"))
    assert ("last hidden state: 16 patch tokens" in card) is (kind == "siglip")
    assert ("feature = hidden.mean(dim=1)" in card) is (kind == "siglip")
    assert config.get("vision_use_head", False) is False  # a head that nobody trained would be noise
    assert ("class token, 4 registers, then 16 patch tokens" in card) is (kind in ("registers", "dinov3"))
    for path in SOURCE_FILES:
        assert (folder / path.name).is_file() is own
        assert not own or (folder / path.name).read_bytes() == path.read_bytes()
        assert "m3i_scale" not in path.read_text().replace("\n", " ").split('"""', 2)[2]  # stands alone


def test_it_loads_here_without_remote_code(made):
    model, info = AutoModel.from_pretrained(made[0] / "export", trust_remote_code=False, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is type(made[2].student.model)


def test_it_is_evaluated(made, kind, shards):
    pictures = made[0] / "pictures"
    found = evaluate(made[0] / "export", str(shards / "val"), train_data=str(shards / "train"), pictures=pictures)
    shown = {one["name"]: one for one in json.loads((pictures / "pictures.json").read_text())["pictures"]}
    assert found["pictures"]["not_shown"] == {}
    assert {"dense_pca", "attention", "similarity", "neighbours"} < set(shown)
    assert ("no class token" in shown["attention"]["title"]) is (kind in ("internimage", "siglip"))
    for name in ("text_to_image", "image_to_text"):
        assert "right at rank" in shown[name]["alt"]
        assert "nothing known" not in shown[name]["alt"]
    assert {"linear", "knn", "zero_shot", "retrieval"} <= found["measures"].keys()
    facts = json.loads((made[0] / "export" / "export.json").read_text())
    of = found["model"]["export"]
    assert of.keys() == {"checkpoint", "checkpoint_manifest_sha256", "weights"}
    assert of.items() <= facts.items()


def test_a_class_token_where_there_is_none_is_refused(made, kind, shards):
    if kind in ("internimage", "siglip"):
        with pytest.raises(ExportError) as caught:
            evaluate(made[0] / "export", str(shards / "val"), train_data=str(shards / "train"), pool="cls")
        assert caught.value.where == "--pool cls"


@pytest.mark.parametrize("name", ["registers", "dinov3"])
def test_weights_that_were_not_trained_leave_as_they_came(make_run, tmp_path, name):
    """The mask token too, which no input reads."""
    kind = {"registers": Dinov2WithRegistersModel, "dinov3": DINOv3ViTModel}[name]
    torch.manual_seed(5)
    stock = kind(backbone_config(BackboneConfig(**BACKBONES[name])))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.1)
    stock.save_pretrained(tmp_path / "published")
    section = BackboneConfig(from_pretrained=str(tmp_path / "published"))

    def start(objective):
        plan = plan_load(backbone_source(section), backbone_config(section))
        objective.student.model.load_state_dict(dict(zip(plan.names, plan.tensors(), strict=True)), strict=True)

    folder, _ = make_run(tmp_path / "run", backbone=section.model_dump(), train=start)
    export(folder, tmp_path / "export")
    came, left = (load_file(tmp_path / place / "model.safetensors") for place in ("published", "export"))
    assert came.keys() == left.keys()
    assert [key for key in came if not torch.equal(came[key], left[key])] == []
    assert any("mask_token" in key for key in came)
