"""Positions on another grid, names of transformers old and new, and how much of a model is held while it is read."""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path

import open_clip.model
import psutil
import pytest
import timm.models.vision_transformer
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from weights import VISION, open_clip_folder, open_clip_model, planned, shaken, started, timm_folder, timm_model

from m3i_scale.errors import ConfigError

IMAGES = {side: torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (16, 32, 64)}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("arguments", [{}, {"no_embed_class": True}], ids=["with class", "without"])
@torch.no_grad()
def test_positions_are_resized_as_timm_does(tmp_path: Path, side: int, arguments: dict[str, bool]) -> None:
    model = timm_model(**arguments)
    theirs = timm_model(img_size=side, **arguments)
    weights = timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), theirs)
    theirs.load_state_dict(weights)
    folder = timm_folder(tmp_path, model)
    ours = started(folder, image_size=side)
    torch.testing.assert_close(
        ours.last_hidden_state(IMAGES[side]), theirs.forward_features(IMAGES[side]), rtol=1e-5, atol=1e-5
    )
    report, places = planned(folder, image_size=side).report, (side // 8) ** 2
    assert report["resized"]["embeddings.position_embeddings"]["to"] == [1, places + 1, 64]


@pytest.mark.parametrize("side", [16, 64])
@torch.no_grad()
def test_positions_are_resized_as_open_clip_does(tmp_path: Path, side: int) -> None:
    model, config = open_clip_model()
    folder = open_clip_folder(tmp_path / "clip", model, config)
    theirs, _ = open_clip_model(image_size=side, output_tokens=True)
    weights = model.state_dict()
    open_clip.model.resize_pos_embed(weights, theirs)
    theirs.load_state_dict(weights)
    tokens = started(folder, image_size=side).encode_whole(IMAGES[side])[1]
    torch.testing.assert_close(tokens, theirs.visual(IMAGES[side])[1], rtol=1e-5, atol=1e-5)
    assert VISION["image_size"] == 32


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
@pytest.mark.parametrize("side", [16, 32, 64])
@torch.no_grad()
def test_a_published_folder_with_its_heads_in_shards(tmp_path: Path, kind: str, side: int) -> None:
    """Files have the names of older versions of transformers, and what no backbone has."""
    models: dict[str, PreTrainedModel] = {
        "vit": ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=96, num_labels=3)),
        "dinov2": Dinov2ForImageClassification(Dinov2Config(**SIZES, use_swiglu_ffn=True, num_labels=3)),
        "clip": CLIPModel(
            CLIPConfig(
                vision_config={**SIZES, "intermediate_size": 96},
                text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99},
            )
        ),
    }
    model = shaken(models[kind])
    model.save_pretrained(tmp_path, max_shard_size="70KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stock = model.vision_model if kind == "clip" else getattr(model, kind)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    wanted = stock(pixel_values=IMAGES[side], **options).last_hidden_state
    ours = started(tmp_path, image_size=side)
    torch.testing.assert_close(ours.last_hidden_state(IMAGES[side]), wanted, rtol=1e-5, atol=1e-5)
    left_out = planned(tmp_path).report["left_out"]
    if kind == "vit":
        assert left_out == {"classifier": ["classifier.bias", "classifier.weight"]}
    elif kind == "dinov2":
        assert {*left_out} == {"classifier", "mask token: the recipe trains a new one for inputs with mask tokens"}
    else:
        assert {*left_out} == {"text tower", "projection into the joint space"}


FOLDERS = {
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
    "dinov3": (
        DINOv3ViTModel,
        DINOv3ViTConfig(**SIZES, intermediate_size=96, num_register_tokens=3, use_gated_mlp=True, hidden_act="silu"),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("side", [16, 32, 64])
@torch.no_grad()
def test_folders_with_registers(tmp_path: Path, name: str, side: int) -> None:
    kind, config = FOLDERS[name]
    model = shaken(kind(config))
    model.save_pretrained(tmp_path)
    ours = started(tmp_path, image_size=side)
    wanted = model(pixel_values=IMAGES[side]).last_hidden_state
    torch.testing.assert_close(ours.last_hidden_state(IMAGES[side]), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.model.embeddings.mask_token, model.embeddings.mask_token)
    resized = planned(tmp_path, image_size=side).report["resized"]
    assert [*resized] == (["embeddings.position_embeddings"] if name == "registers" and side != 32 else [])


def test_published_names_of_dinov3(tmp_path: Path) -> None:
    """Those of its files on the Hub lack a level."""
    model = DINOv3ViTModel(FOLDERS["dinov3"][1])
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "layer.0.attention.q_proj.weight" in names
    assert not any(name.startswith("model.") for name in names)


FAULTS = {
    "no registers": ("registers", lambda weights: weights.pop("embeddings.register_tokens"), "register_tokens"),
    "no registers of dinov3": ("dinov3", lambda weights: weights.pop("embeddings.register_tokens"), "register_tokens"),
    "more registers": (
        "dinov3",
        lambda weights: weights.update({"embeddings.register_tokens": torch.ones(1, 4, 64)}),
        r"\(1, 4, 64\)",
    ),
    "positions of a table": (
        "dinov3",
        lambda weights: weights.update({"embeddings.position_embeddings": torch.ones(1, 17, 64)}),
        "find no place, e.g. embeddings.position_embeddings",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_of_another_family_than_the_configuration(tmp_path: Path, fault: str) -> None:
    name, change, told = FAULTS[fault]
    kind, config = FOLDERS[name]
    kind(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=told):
        planned(tmp_path)


@torch.no_grad()
def test_a_vision_tower_alone_of_clip(tmp_path: Path) -> None:
    model = shaken(CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=96)))
    model.save_pretrained(tmp_path)
    backbone = started(tmp_path)
    output = model(pixel_values=IMAGES[32])
    torch.testing.assert_close(backbone.last_hidden_state(IMAGES[32]), output.last_hidden_state)
    torch.testing.assert_close(backbone.encode_whole(IMAGES[32])[0][:, 0], output.pooler_output)


def mapped_bytes(files: Collection[str]) -> int:
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0].split("-") for fields in lines if fields[-1] in files]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def test_one_file_is_held_at_a_time(tmp_path: Path) -> None:
    """A model of 200 MB in shards of 20: no more than a shard is mapped at a time, and nothing stays resident."""
    config = ViTConfig(hidden_size=640, num_hidden_layers=10, num_attention_heads=8, intermediate_size=2560)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path, max_shard_size="20MB")
    files = {str(path): path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    total, largest = sum(files.values()), max(files.values())
    assert total > 190e6
    assert len(files) > 8
    plan = planned(tmp_path)
    process = psutil.Process()

    def most(keep: bool) -> tuple[int, int]:
        """Return the most bytes of files that were mapped at a time, and by how much the resident ones grew."""
        gc.collect()
        start, mapped, resident, kept = process.memory_info().rss, 0, 0, []
        for value in plan.tensors():
            float(value.sum())  # what is mapped is not resident until it is read
            kept += [value] if keep else []
            mapped = max(mapped, mapped_bytes(files))
            resident = max(resident, process.memory_info().rss - start)
        return mapped, resident

    assert max(most(keep=False)) < 1.5 * largest
    assert most(keep=True)[0] > 0.99 * total  # resident is less of it, where memory is short
