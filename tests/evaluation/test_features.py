import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    ConvNextModel,
    Dinov2WithRegistersModel,
    SiglipVisionModel,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTImageProcessor,
    ViTImageProcessorPil,
    ViTModel,
)

from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import DataError, ExportError
from m3i_scale.evaluation.encoding import compute_of
from m3i_scale.evaluation.features import load_vision, pixel_features, pool_tokens
from m3i_scale.evaluation.job import Encoders, read_side
from m3i_scale.evaluation.samples import open_table, read_samples

CPU = torch.device("cpu")


def test_pooling_by_hand():
    hidden = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]])  # class token, two patches
    assert pool_tokens(hidden, 2, "mean").tolist() == [[2.0, 4.0]]
    assert pool_tokens(hidden, 2, "cls").tolist() == [[9.0, 9.0]]
    assert pool_tokens(hidden, 2, "both").tolist() == [[2.0, 4.0, 9.0, 9.0]]
    registers = torch.cat([hidden[:, :1], torch.full((1, 4, 2), 100.0), hidden[:, 1:]], dim=1)
    assert pool_tokens(registers, 2, "mean").tolist() == [[2.0, 4.0]]


def test_pooling_of_a_map():
    hidden = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert pool_tokens(hidden, 4, "mean").tolist() == [[1.5, 5.5]]
    with pytest.raises(ExportError) as caught:
        pool_tokens(hidden, 4, "cls")
    assert caught.value.where == "--pool cls"


def test_features_are_those_of_the_stock_classes(vit_folder, shards):
    table = open_table(str(shards / "val"), "--data")
    vision = load_vision(vit_folder, "mean", CPU)
    found = read_side(
        table, [Encoders(vision, {"pixels": pixel_features})], compute_of("cpu", batch_size=7), "data"
    ).features
    assert found["model"].shape == (len(table), 32)
    assert found["pixels"].shape == (len(table), 3072)
    samples = list(read_samples(open_table(str(shards / "val"), "--data"), None))
    processor = ViTImageProcessorPil.from_pretrained(vit_folder)
    model = AutoModel.from_pretrained(vit_folder, add_pooling_layer=False).eval()
    for number in (0, len(samples) - 1):
        image = Image.fromarray(samples[number].pixels.transpose(1, 2, 0))
        with torch.no_grad():
            hidden = model(**processor(image, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(found["model"][number], hidden[0, 1:].mean(dim=0).numpy(), atol=1e-5)
        pixels = processor(image, do_normalize=False, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(found["pixels"][number], pixels.reshape(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "config", "width"),
    [
        (Dinov2WithRegistersModel, {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, 16),
        (ConvNextModel, {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}, 8),
        (SwinModel, {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}, 16),
    ],
)
def test_other_stock_models(tmp_path, kind, config, width):
    kind(kind.config_class(image_size=32, patch_size=4, **config)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    vision = load_vision(tmp_path, "mean", CPU)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features, _ = vision.encode(images)
    assert features.shape == (2, width)
    pixels = vision.processor(list(images), return_tensors="pt")["pixel_values"]
    hidden = vision.model(pixel_values=pixels).last_hidden_state
    # DINOv2 has a class token and registers before its 64 patches; the others have patches only
    patches = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, -64:]
    torch.testing.assert_close(features, patches.mean(dim=1).detach())


def test_missing_tensors_are_refused(vit_folder, tmp_path):
    for path in vit_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "layernorm" in name or "dense" in name)
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ExportError) as caught:
        load_vision(tmp_path, "mean", CPU)
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_missing_files_are_named(vit_folder, tmp_path, name):
    for path in vit_folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ExportError, match=name):
        load_vision(tmp_path, "mean", CPU)


@pytest.mark.parametrize(
    "values",
    [
        {"do_center_crop": True, "crop_size": {"shortest_edge": 32}},
        {"resample": 9},
        {"resample": 4},
        {"size": {"height": -32, "width": -32}},
        {"image_std": None},
    ],
    ids=["crop without height", "unknown filter", "box filter", "negative", "no deviation"],
)
def test_values_of_a_processor_that_cannot_be_used_are_errors(vit_folder, tmp_path, values):
    for path in vit_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ExportError) as caught:
        load_vision(tmp_path, "mean", CPU)
    assert caught.value.where == str(file)


def test_a_deviation_of_zero_of_timm_is_an_error(tmp_path):
    network = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    values = {"input_size": (3, 32, 32), "crop_mode": "center", "interpolation": "bicubic", "crop_pct": 1.0}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args=network,
        pretrained_cfg=values | {"mean": [0.5] * 3, "std": [0.0] * 3},
    )
    TimmWrapperModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    with pytest.raises(ExportError) as caught:
        load_vision(tmp_path, "mean", CPU)
    assert caught.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize("kind", [ViTModel, SiglipVisionModel])
def test_an_image_size_that_the_model_does_not_have_is_an_error(tmp_path, kind):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind(kind.config_class(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="64 × 64") as caught:
        load_vision(tmp_path, "mean", CPU)
    assert caught.value.where == str(tmp_path / "preprocessor_config.json")


def test_what_cannot_be_used_is_counted(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    members = {
        "a.png": picture.getvalue(),
        "a.cls": b"1",
        "b.png": b"no image",
        "c.txt": b"a caption without an image",
        "d.png": picture.getvalue(),
        "d.cls": b"7",
        "e.png": picture.getvalue(),
        "e.json": b"{torn",
        "f.png": picture.getvalue(),
        "f.json": json.dumps({"group": "flags"}).encode(),
    }
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "labels.json").write_text(json.dumps(["zero", "one"]))
    table = open_table(str(tmp_path), "--data")
    samples = list(read_samples(table, CenterCrop(16, 16), exclude_groups=("flags",)))
    assert [sample.key for sample in samples] == ["x.tar/a", "x.tar/e"]
    assert table.label_array.tolist() == [1, -1]
    assert sum(table.left_out.values()) == 4
    assert table.left_out["group 'flags' excluded"] == 1
    assert table.column("concept") is None


def test_hostile_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError) as caught:
        list(read_samples(open_table(str(tmp_path), "--data"), CenterCrop(16, 16)))
    assert str(caught.value.where).endswith("/x.tar")
