"""Teachers: weights matched by header and read one at a time, images of the student's grid, one token a patch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_run, tiny_teacher
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from weights import shaken

from m3i_scale.backbones.build import backbone_config
from m3i_scale.errors import ConfigError
from m3i_scale.objective.inputs import normalize
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.teacher import FrozenTeacher, build_teacher, teachers_sha256

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def teacher_of(folder: Path | str, *overrides: str) -> FrozenTeacher:
    """The module of a student of 4 × 4 patches of 8 pixels, filled where the folder can fill it."""
    run = tiny_run("dense_distillation", f"recipe.teachers.teacher.from_pretrained={folder}", *overrides)
    return build_teacher(run, parse_recipe(run.recipe), "teacher", backbone_config(run.backbone))


def filled(teacher: FrozenTeacher) -> FrozenTeacher:
    plan = teacher.plan()
    teacher.model.load_state_dict(dict(zip(plan.names, plan.tensors(), strict=True)), strict=False)
    return teacher


def saved(model: PreTrainedModel, folder: Path, **options: str) -> Path:
    shaken(model).save_pretrained(folder, **options)
    BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def test_every_weight_comes_out_of_its_shard(tmp_path: Path) -> None:
    saved(Dinov2ForImageClassification(Dinov2Config(**SIZES)), tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    plan = teacher_of(tmp_path).plan()
    found = dict(zip(plan.names, plan.tensors(), strict=True))
    wanted = dict(AutoModel.from_pretrained(tmp_path).named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert plan.report["left_out"]["classifier"] == ["classifier.bias", "classifier.weight"]


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    saved(Dinov2ForImageClassification(Dinov2Config(**SIZES)), tmp_path)
    teacher, path = teacher_of(tmp_path), tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layernorm.bias" not in name}, path)
    with pytest.raises(ConfigError) as caught:
        teacher.plan()
    assert caught.value.where == "recipe.teachers.teacher.from_pretrained"
    assert "layernorm.bias" in caught.value.what


def test_each_teacher_has_a_hash_of_its_own() -> None:
    run = tiny_run("multi_teacher")
    hashes = teachers_sha256(parse_recipe(run.recipe), run.backbone)
    assert hashes.keys() == {"clip", "dinov2", "siglip"}
    assert len(set(hashes.values())) == 3
    assert {len(value) for value in hashes.values()} == {64}


def test_a_teacher_on_the_students_patches_sees_the_very_images() -> None:
    teacher, images = filled(teacher_of(tiny_teacher())), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    stock = AutoModel.from_pretrained(tiny_teacher()).eval()
    with torch.no_grad():
        wanted = stock(pixel_values=normalize(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))).last_hidden_state
    cls_B1D, tokens_BND = teacher(images)
    assert torch.equal(cls_B1D, wanted[:, :1])
    assert torch.equal(tokens_BND, wanted[:, 1:])


@pytest.mark.parametrize(("patch", "side"), [(8, 16), (4, 32)])  # a smaller view, and one whose positions are resized
def test_a_teacher_of_another_patch_size_sees_the_images_resized(patch: int, side: int) -> None:
    """CLIP's 4 pixels; its folder holds texts too."""
    sizes = f"backbone.config.patch_size={patch}"
    teacher = filled(teacher_of(tiny_teacher("clip"), sizes))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    smaller = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    pixels = normalize(smaller, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    stock = CLIPVisionModel.from_pretrained(tiny_teacher("clip")).eval()
    with torch.no_grad():
        wanted = stock(pixel_values=pixels, interpolate_pos_encoding=True)
    pooled_B1D, tokens_BND = teacher(images)
    assert tokens_BND.shape == (2, (32 // patch) ** 2, 40)
    torch.testing.assert_close(tokens_BND, wanted.last_hidden_state[:, 1:])
    projection = load_file(f"{tiny_teacher('clip')}/model.safetensors")["visual_projection.weight"]
    torch.testing.assert_close(pooled_B1D[:, 0], wanted.pooler_output @ projection.T)


TEXTS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 20}
IMAGE_TEXT_MODELS = {
    "clip": lambda images: CLIPModel(CLIPConfig(text_config=TEXTS, vision_config=images, projection_dim=24)),
    "projected tower": lambda images: CLIPVisionModelWithProjection(CLIPVisionConfig(**images, projection_dim=24)),
    "siglip": lambda images: SiglipModel(SiglipConfig(text_config=TEXTS, vision_config=images)),
}


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
def test_the_image_feature_is_what_texts_are_compared_with(name: str, tmp_path: Path) -> None:
    stock = IMAGE_TEXT_MODELS[name](SIZES | {"intermediate_size": 64})
    folder = saved(stock, tmp_path)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = normalize(images, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        if isinstance(stock, CLIPVisionModelWithProjection):
            output = stock.eval()(pixel_values=pixels)
            wanted = output.image_embeds
        else:
            output = stock.eval().get_image_features(pixel_values=pixels)
            wanted = output.pooler_output
    pooled_B1D, tokens_BND = filled(teacher_of(folder))(images)
    torch.testing.assert_close(pooled_B1D[:, 0], wanted)
    torch.testing.assert_close(tokens_BND, output.last_hidden_state[:, -16:])


IMAGE_MODELS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)),
    "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**SIZES, intermediate_size=64)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_image_feature_is_the_models_own_pooled_output(name: str, tmp_path: Path) -> None:
    folder = saved(IMAGE_MODELS[name](), tmp_path)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    stock = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = stock(pixel_values=normalize(images, (0.5,) * 3, (0.5,) * 3))
    pooled_B1D, tokens_BND = filled(teacher_of(folder))(images)
    torch.testing.assert_close(pooled_B1D[:, 0], wanted.pooler_output)
    torch.testing.assert_close(tokens_BND, wanted.last_hidden_state[:, -16:])


@pytest.mark.parametrize("head", [True, False])
def test_a_vit_has_the_class_token_and_siglip_without_a_head_the_mean(head: bool, tmp_path: Path) -> None:
    """The tanh pooler of `ViTModel` is random in most published weights."""
    if head:
        model: PreTrainedModel = ViTModel(ViTConfig(**SIZES, intermediate_size=64))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64, vision_use_head=False))
    folder = saved(model, tmp_path)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        pixels = normalize(images, (0.5,) * 3, (0.5,) * 3)
        hidden = AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state
    pooled_B1D, _ = filled(teacher_of(folder))(images)
    torch.testing.assert_close(pooled_B1D[:, 0], hidden[:, 0] if head else hidden.mean(dim=1))


def test_random_generators_of_gpus_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    teacher_of(tiny_teacher()).plan()
    assert asked == []


@pytest.mark.parametrize("ratio", [0.75, 0.0])  # with 0 it still shuffles the patches
def test_a_model_that_hides_patches_is_refused(ratio: float, tmp_path: Path) -> None:
    saved(ViTMAEModel(ViTMAEConfig(**SIZES, intermediate_size=64, mask_ratio=ratio)), tmp_path)
    with pytest.raises(ConfigError) as caught:
        teacher_of(tmp_path).plan()
    assert caught.value.where == f"recipe.teachers.teacher.from_pretrained: {tmp_path}"
    assert "DINOv2" in str(caught.value.fix)


def test_positions_that_fit_no_other_grid_are_refused_with_theirs(tmp_path: Path) -> None:
    folder = saved(Aimv2VisionModel(Aimv2VisionConfig(**SIZES, intermediate_size=64)), tmp_path)
    filled(teacher_of(folder))
    filled(teacher_of(folder, "backbone.config.patch_size=16", "backbone.config.image_size=64"))
    with pytest.raises(ConfigError) as caught:
        teacher_of(folder, "backbone.config.patch_size=16").plan()
    assert "recipe.teachers.teacher.from_pretrained" in str(caught.value.where)
    assert "backbone.config.image_size" in str(caught.value.fix)
