"""A backbone that starts from another code base's weights computes what that code base computes."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SiglipVisionModel,
    ViTModel,
)
from weights import open_clip_folder, open_clip_model, planned, shaken, started, timm_folder, timm_model

from m3i_scale.errors import ConfigError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

TIMM = {
    "vit": ("vit_tiny_patch16_224", {}, ViTModel),
    "vit without biases of queries": ("vit_tiny_patch16_224", {"qkv_bias": False}, ViTModel),
    "class token without position": ("vit_tiny_patch16_224", {"no_embed_class": True}, ViTModel),
    "tanh": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}, ViTModel),
    "silu": ("vit_tiny_patch16_224", {"act_layer": "silu"}, ViTModel),
    "dinov2": ("vit_small_patch14_dinov2", {"init_values": 1.0}, Dinov2Model),
    "dinov2 with gates": ("vit_giant_patch14_dinov2", {"init_values": 1.0, "mlp_ratio": 5.5}, Dinov2Model),
    "eva": ("eva_giant_patch14_224", {"global_pool": "token", "mlp_ratio": 3.0}, ViTModel),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 1.0}, Dinov2WithRegistersModel),
    "registers with gates": (
        "vit_giant_patch14_reg4_dinov2",
        {"init_values": 1.0, "mlp_ratio": 5.5, "reg_tokens": 2},
        Dinov2WithRegistersModel,
    ),
    "dinov3": ("vit_small_patch16_dinov3", {}, DINOv3ViTModel),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 2}, DINOv3ViTModel),
    "dinov3 with gates": ("vit_small_plus_patch16_dinov3", {}, DINOv3ViTModel),
    "siglip": ("vit_base_patch16_siglip_224", {}, SiglipVisionModel),
    "siglip that ends with a mean": ("vit_so400m_patch16_siglip_gap_256", {}, SiglipVisionModel),
    "clip": ("vit_base_patch16_clip_224", {}, CLIPVisionModel),
    "clip with quick gelu": ("vit_base_patch16_clip_quickgelu_224", {}, CLIPVisionModel),
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_a_timm_folder(tmp_path: Path, name: str) -> None:
    architecture, arguments, kind = TIMM[name]
    model = timm_model(architecture, **arguments)
    backbone = started(timm_folder(tmp_path, model))
    assert type(backbone.model) is kind
    config = backbone.model.config
    assert (config.num_attention_heads, backbone.width, backbone.image_size, backbone.patch_size) == (4, 64, 32, 8)
    wanted = model.forward_features(IMAGES)
    first = wanted[:, :1] if kind is not SiglipVisionModel else wanted.mean(dim=1, keepdim=True)
    wanted = torch.cat([first, wanted[:, -16:]], dim=1)
    torch.testing.assert_close(torch.cat(backbone.encode_whole(IMAGES), dim=1), wanted, rtol=1e-5, atol=1e-5)
    report = planned(tmp_path).report
    pooling = [name for name in model.state_dict() if name.startswith("attn_pool.")]
    assert sorted(pooling) in [sorted(names) for names in report["left_out"].values()] or not pooling
    assert report["left_out"]["classifier"] == ["head.bias", "head.weight"]
    assert report["normalisation"]["mean"] == list(model.pretrained_cfg["mean"])
    assert report["assumed"] == {}


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
@torch.no_grad()
def test_a_bare_file(tmp_path: Path, wrapped: str | None) -> None:
    model = timm_model()
    path = tmp_path / "checkpoint.pth"
    weights = model.state_dict() | {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(2, 2)}
    torch.save({wrapped: weights, "epoch": 3} if wrapped else weights, path)
    with pytest.raises(ConfigError) as caught:
        started(path)
    assert caught.value.where == "backbone.from_pretrained"
    assert "num_attention_heads" in caught.value.fix
    backbone = started(path, num_attention_heads=4)
    torch.testing.assert_close(backbone.last_hidden_state(IMAGES), model.forward_features(IMAGES), rtol=1e-5, atol=1e-5)
    assert planned(path, num_attention_heads=4).report["assumed"].keys() == {
        *("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size"),
    }


@pytest.mark.parametrize("layout", ["pre-trained", "fine-tuned"])
@torch.no_grad()
def test_a_file_of_sim(tmp_path: Path, layout: str) -> None:
    """Names and contents of `sim_base_1600ep_pretrain.pth` and `sim_base_1600ep_finetune.pth`; the latter is MAE's."""
    model = timm_model(global_pool="avg", class_token=True)  # fc_norm, no norm
    weights = model.state_dict()
    if layout == "pre-trained":
        weights = {name: value for name, value in weights.items() if not name.startswith(("fc_norm", "head"))}
        weights |= {f"mm_{name}": value + 1 for name, value in weights.items() if name != "pos_embed"}
        other = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "projector_decoder_blocks.0.norm1.bn.bias")
        other += ("predictor_decoder_blocks.0.attn.proj.weight", "decoder_pred.weight", "decoder_pos_mlp.weight")
        weights |= {name: torch.ones(2) for name in (*other, "mm_decoder_embed.weight", "mm_mask_token")}
    path = tmp_path / "sim.pth"
    content = {"model": weights, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 1599}
    torch.save(content | {"scaler": {"scale": 65536.0}, "args": Namespace(model="sim_vit_base_patch16")}, path)
    backbone = started(path, num_attention_heads=4)
    wanted = model.forward_features(IMAGES)
    torch.testing.assert_close(backbone.encode_whole(IMAGES, norm=False)[1], wanted[:, 1:], rtol=1e-5, atol=1e-5)
    normed = torch.nn.functional.layer_norm(wanted, (64,), eps=1e-6)
    torch.testing.assert_close(backbone.last_hidden_state(IMAGES), normed, rtol=1e-5, atol=1e-5)
    report = planned(path, num_attention_heads=4).report
    assert [*report["constants"].values()] == [["layernorm.bias", "layernorm.weight"]]


def test_a_file_that_lacks_its_final_norm(tmp_path: Path) -> None:
    weights = {name: value for name, value in timm_model().state_dict().items() if not name.startswith("norm.")}
    save_file(weights, tmp_path / "torn.safetensors")
    with pytest.raises(ConfigError, match="no final norm"):
        started(tmp_path / "torn.safetensors", num_attention_heads=4)


def test_a_bare_file_is_judged_by_its_shapes_first(tmp_path: Path) -> None:
    """No number of heads is asked for where no number would help; parts that the model lacks are named."""
    save_file(timm_model(init_values=1.0, mlp_ratio=2.5).state_dict(), tmp_path / "scaled.safetensors")
    with pytest.raises(ConfigError) as caught:
        started(tmp_path / "scaled.safetensors")
    assert caught.value.where == "backbone.from_pretrained"
    assert "160 wide" in caught.value.what
    save_file(timm_model(pre_norm=True, init_values=1.0).state_dict(), tmp_path / "normed.safetensors")
    with pytest.raises(ConfigError) as caught:
        started(tmp_path / "normed.safetensors", num_attention_heads=4, hidden_act="gelu")
    assert caught.value.where == "backbone.from_pretrained"
    assert "ls1.gamma" in caught.value.what


def test_a_bare_file_of_a_published_size_knows_its_heads(tmp_path: Path) -> None:
    model = timm_model(embed_dim=192, depth=12, num_heads=3)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    assert started(tmp_path / "vit.safetensors").model.config.num_attention_heads == 3


def test_a_bare_file_whose_positions_may_be_those_of_another_grid_is_refused(tmp_path: Path) -> None:
    """25 rows: 5 × 5 places without one for the class token, or 3 × 8 with one. A folder of timm says which."""
    square = timm_model(no_embed_class=True, img_size=40)
    wide = timm_model(img_size=(24, 64))
    for name, model in {"square": square, "wide": wide}.items():
        assert model.pos_embed.shape[1] == 25
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError) as caught:
            planned(tmp_path / f"{name}.safetensors", num_attention_heads=4)
        assert caught.value.where == "backbone.from_pretrained"
        assert "25 rows" in caught.value.what
        assert "config.json" in caught.value.fix
    assert planned(timm_folder(tmp_path / "square", square), image_size=64).report["resized"]
    with pytest.raises(ConfigError) as caught:
        planned(timm_folder(tmp_path / "wide", wide))
    assert caught.value.where == "backbone.from_pretrained"
    assert "3 × 8" in caught.value.what
    clip, _ = open_clip_model(image_size=(24, 64))
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "clip.safetensors", num_attention_heads=4, hidden_act="gelu")
    assert caught.value.where == "backbone.from_pretrained"
    assert "24 places" in caught.value.what


def test_a_bare_file_of_as_many_places_as_a_square_names_the_grid_it_is_taken_for(tmp_path: Path) -> None:
    """4 × 9 places are 36, and so are 6 × 6: no shape differs."""
    save_file(timm_model(img_size=(32, 72)).state_dict(), tmp_path / "wide.safetensors")
    assumed = planned(tmp_path / "wide.safetensors", num_attention_heads=4).report["assumed"]
    assert "36 places" in assumed["image_size"]
    assert "6 × 6" in assumed["image_size"]


def test_positions_of_another_grid_than_the_configuration_says(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, timm_model())
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"pos_embed": torch.ones(1, 25, 64)}, folder / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(folder)
    assert caught.value.where == "backbone.from_pretrained"
    assert "24 positions" in caught.value.what


def test_a_bare_file_says_that_its_norms_are_assumed_to_come_first(tmp_path: Path) -> None:
    save_file(timm_model().state_dict(), tmp_path / "bare.safetensors")
    bare = planned(tmp_path / "bare.safetensors", num_attention_heads=4).report["assumed"]
    assert "pre-norm" in bare["layer_norm_eps"]
    assert "layer_norm_eps" not in planned(timm_folder(tmp_path / "folder", timm_model())).report["assumed"]


def test_a_bare_file_of_a_size_whose_norms_come_last(tmp_path: Path) -> None:
    """EVA-02-E has the names and shapes of a ViT, and computes something else."""
    with torch.device("meta"):
        weights = timm.create_model("eva02_enormous_patch14_clip_224", num_classes=0).state_dict()
    small = {name: torch.zeros(tuple(min(side, 1792 if name == "blocks.0.norm1.weight" else 8) for side in value.shape))
             for name, value in weights.items()}  # fmt: skip
    save_file(small, tmp_path / "eva.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "eva.safetensors", num_attention_heads=16)
    assert caught.value.where == "backbone.from_pretrained"
    assert "EVA-02-E" in caught.value.what


OPEN_CLIP = {
    "clip": ({}, {}),
    "quick gelu": ({"quick_gelu": True}, {}),
    "tanh": ({"act_kwargs": {"approximate": "tanh"}}, {}),
    "eps": ({"norm_kwargs": {"eps": 1e-3}}, {}),
    "no norm first": ({"no_ln_pre": True}, {}),
    "pickled": ({}, {"pickled": True}),
}


@pytest.mark.parametrize("name", OPEN_CLIP)
@torch.no_grad()
def test_an_open_clip_folder(tmp_path: Path, name: str) -> None:
    arguments, how = OPEN_CLIP[name]
    model, config = open_clip_model(output_tokens=True, **arguments)
    backbone = started(open_clip_folder(tmp_path / "clip", model, config, **how))
    assert type(backbone.model) is (ViTModel if name == "no norm first" else CLIPVisionModel)
    projected, tokens = model.visual(IMAGES)
    cls, ours = backbone.encode_whole(IMAGES)
    torch.testing.assert_close(ours, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cls[:, 0] @ model.visual.proj, projected, rtol=1e-5, atol=1e-5)
    report = planned(tmp_path / "clip").report
    assert {"token_embedding.weight", "logit_scale", "text_projection"} <= {*report["left_out"]["text tower"]}
    assert report["left_out"]["projection into the joint space"] == ["visual.proj"]
    assert report["normalisation"]["std"] == [0.27, 0.26, 0.28]


@torch.no_grad()
def test_a_bare_open_clip_file_has_to_be_told_its_activation(tmp_path: Path) -> None:
    model, _ = open_clip_model(quick_gelu=True, output_tokens=True)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "e.pt"
    )
    with pytest.raises(ConfigError) as caught:
        started(tmp_path / "e.pt", num_attention_heads=4)
    assert caught.value.where == "backbone.from_pretrained"
    assert "hidden_act=quick_gelu" in caught.value.fix
    backbone = started(tmp_path / "e.pt", num_attention_heads=4, hidden_act="quick_gelu")
    torch.testing.assert_close(backbone.encode_whole(IMAGES)[1], model.visual(IMAGES)[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bare_file_with_registers(tmp_path: Path) -> None:
    """As DINOv2's own code writes them: with a place for the class token, and a mask token."""
    model = timm_model("vit_small_patch14_reg4_dinov2", init_values=1.0)
    weights = model.state_dict()
    table = torch.cat([torch.zeros(1, 1, 64), weights["pos_embed"]], dim=1)
    weights |= {"pos_embed": table, "register_tokens": weights.pop("reg_token"), "mask_token": torch.ones(1, 64)}
    torch.save(weights, tmp_path / "reg4.pth")
    backbone = started(tmp_path / "reg4.pth", num_attention_heads=4)
    wanted = model.forward_features(IMAGES)
    torch.testing.assert_close(backbone.last_hidden_state(IMAGES), wanted, rtol=1e-5, atol=1e-5)
    (absent,) = planned(tmp_path / "reg4.pth", num_attention_heads=4).report["constants"].values()
    assert absent == ["embeddings.mask_token"]


def test_a_bare_file_does_not_say_how_positions_are_rotated(tmp_path: Path) -> None:
    save_file(timm_model("vit_small_patch16_dinov3").state_dict(), tmp_path / "dinov3.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "dinov3.safetensors", num_attention_heads=4)
    assert caught.value.where == "backbone.from_pretrained"
    assert "vit_small_patch16_dinov3" in caught.value.fix


@torch.no_grad()
def test_a_bare_file_of_siglip_has_to_be_told_its_activation(tmp_path: Path) -> None:
    model = timm_model("vit_base_patch16_siglip_224", act_layer="gelu_tanh")
    save_file(model.state_dict(), tmp_path / "siglip.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "siglip.safetensors", num_attention_heads=4)
    assert caught.value.where == "backbone.from_pretrained"
    assert "gelu_pytorch_tanh" in caught.value.fix
    backbone = started(tmp_path / "siglip.safetensors", num_attention_heads=4, hidden_act="gelu_pytorch_tanh")
    torch.testing.assert_close(backbone.last_hidden_state(IMAGES), model.forward_features(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bare", [True, False])
def test_eva02_is_refused_and_what_to_take_instead_is_named(tmp_path: Path, bare: bool) -> None:
    model = timm_model("eva02_base_patch14_224")
    if bare:
        save_file(model.state_dict(), tmp_path / "eva02.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "eva02.safetensors" if bare else timm_folder(tmp_path, model), num_attention_heads=4)
    assert "EVA-02" in caught.value.why
    assert "EVA-01" in caught.value.fix


def refused_timm(**arguments: object):
    return lambda folder: timm_folder(
        folder, timm_model(arguments.pop("architecture", "vit_tiny_patch16_224"), **arguments)
    )


def refused_clip(**vision: object):
    return lambda folder: open_clip_folder(folder, *open_clip_model(**vision))


REFUSED = {
    "registers": (refused_timm(reg_tokens=2), "it has registers"),
    "no class token, but scales": (
        refused_timm(architecture="vit_base_patch16_siglip_224", init_values=1.0),
        r"find no place, e.g. blocks.0.ls1.gamma",
    ),
    "no class token, but registers": (
        refused_timm(architecture="vit_base_patch16_siglip_224", reg_tokens=2),
        "it has registers",
    ),
    "no class token and no biases": (
        refused_timm(architecture="vit_base_patch16_siglip_224", qkv_bias=False),
        r"are missing, e.g. .*_proj.bias",
    ),
    "norms of queries": (refused_timm(qk_norm=True), "it normalizes queries and keys"),
    "rotary": (refused_timm(architecture="eva02_tiny_patch14_224", img_size=32), "rotates queries and keys"),
    "no transformer": (lambda folder: timm_folder(folder, shaken(_resnet())), "is a ResNet"),
    "odd MLP with LayerScale": (
        refused_timm(init_values=1.0, mlp_ratio=2.5),
        "that of Dinov2Model is a whole multiple",
    ),
    "another gate": (
        refused_timm(architecture="vit_giant_patch14_dinov2", init_values=1.0, mlp_ratio=5.5, act_layer="gelu"),
        "its MLP is gated by GELU",
    ),
    "attention pooling": (refused_clip(attentional_pool=True), "its norm stands behind an attention pooling"),
    "LayerScale of open_clip": (refused_clip(ls_init_value=0.1), "it has LayerScale"),
    "pooling first": (refused_clip(final_ln_after_pool=True, pool_type="avg"), "stands behind the pooling"),
}


def _resnet():
    return timm.create_model("resnet18", num_classes=2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_stock_model_is_exactly_is_refused(tmp_path: Path, name: str) -> None:
    make, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told):
        planned(make(tmp_path / "source"))


def test_the_run_file_must_not_contradict_the_weights(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, timm_model())
    for field, value in {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}.items():
        with pytest.raises(ConfigError) as caught:
            planned(folder, **{field: value})
        assert caught.value.where == f"backbone.config.{field}"
    assert planned(folder, hidden_size=64, hidden_dropout_prob=0.1).report["resized"] == {}


def _without(name: str, weights: dict) -> dict:
    return {key: value for key, value in weights.items() if key != name}


FAULTS = {
    "missing": (
        lambda w: _without("blocks.1.attn.proj.bias", w),
        "1 weights of .* are missing, e.g. layers.1.attention.o_",
    ),
    "unknown": (
        lambda w: w | {"blocks.1.odd": torch.ones(3)},
        r"1 weights of .* find no place, e.g. blocks.1.odd \(3,\)",
    ),
    "deeper": (lambda w: w | {"blocks.7.norm1.bias": torch.ones(64)}, "find no place, e.g. blocks.7.norm1.bias"),
    "shape": (lambda w: w | {"norm.bias": torch.ones(65)}, r"another shape, e.g. norm.bias \(65,\), .* is \(64,\)"),
    "kernel": (lambda w: w | {"patch_embed.proj.weight": torch.ones(64, 3, 4, 4)}, r"\(64, 3, 4, 4\), and the model's"),
    "twice": (lambda w: w | {"blocks.0.attn.q_proj.bias": torch.ones(64)}, "1 weights of .* want the same place"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_weights_are_matched_strictly(tmp_path: Path, name: str) -> None:
    change, told = FAULTS[name]
    folder = timm_folder(tmp_path, timm_model())
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")
    with pytest.raises(ConfigError, match=told):
        planned(folder)


@torch.no_grad()
def test_a_folder_that_holds_a_model_in_both_forms(tmp_path: Path) -> None:
    """As published CLIPs do: transformers' form is taken, with its own file."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    stock = shaken(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)))
    stock.save_pretrained(open_clip_folder(tmp_path, *open_clip_model()))
    torch.testing.assert_close(started(tmp_path).last_hidden_state(IMAGES), stock(IMAGES).last_hidden_state)
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    assert planned(tmp_path).report["files"] == ["open_clip_model.safetensors"]


def test_what_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    torch.save({"weights": [print]}, tmp_path / "code.pth")
    torch.save(timm_model().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, told in {
        "torn.safetensors": "cannot read weights",
        "code.pth": r"cannot read weights: there is more in it than tensors: print\n",
        "old.pth": "cannot read weights: mmap can only be used",
        "other.safetensors": "its 1 tensors have names of no known code base",
    }.items():
        with pytest.raises(ConfigError, match=told):
            planned(tmp_path / name)


def test_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    file = timm_folder(tmp_path, timm_model()) / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"norm.weight": weights["norm.weight"].to(torch.int8)}, file)
    with pytest.raises(ConfigError) as caught:
        started(tmp_path)
    assert str(caught.value.where).endswith("/model.safetensors")
    assert "torch.int8" in caught.value.what


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, timm_model())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        planned(folder)
    assert caught.value.where == "backbone.from_pretrained"
    assert "pytorch_model.bin" in caught.value.fix
    for name in ("part-2.safetensors", "../part.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.bias": name}}))
        with pytest.raises(ConfigError) as caught:
            planned(folder)
        assert str(caught.value.where).endswith("/model.safetensors.index.json")
        assert f"'{name}'" in caught.value.what
