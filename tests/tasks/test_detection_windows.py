"""A plain Transformer within windows computes what the stock `VitDetBackbone` does, filled with its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectors import BACKBONES, shake, small_backbone, small_spec
from torch import Tensor
from transformers import VitDetBackbone, VitDetConfig

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families import family_of
from m3i_scale.config import BackboneConfig
from m3i_scale.engine.activations import apply_activation_checkpointing
from m3i_scale.errors import ConfigError
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.tasks.backbone_task import apply_drop_path
from m3i_scale.tasks.detection.detection_heads import Windows, default_global_layers
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector, windowed_layers
from m3i_scale.tasks.detection.modeling_mask_rcnn import WindowedLayers

PLAIN = ("vit", "dinov2", "clip")


def windowed(backbone: Backbone, noise: float = 0.0, **fields: Any) -> WindowedLayers:
    module = windowed_layers(Windows(**fields), backbone)
    shake(module, noise)
    return module


def encoded(module: WindowedLayers, backbone: Backbone, images: Tensor) -> Tensor:
    map_BDHW: Tensor = module(backbone.layers, backbone.embed(images)[1])
    return map_BDHW


def stock(backbone: Backbone, module: WindowedLayers) -> VitDetBackbone:
    """The published class with the same weights: layer scale goes into the matrices before it."""
    config, side = backbone.model.config, backbone.grid[0]
    windows = [layer.window for layer in module.layers]
    vitdet = VitDetBackbone(
        VitDetConfig(
            hidden_size=backbone.width,
            num_hidden_layers=len(backbone.layers),
            num_attention_heads=config.num_attention_heads,
            mlp_ratio=2,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            image_size=config.image_size,
            pretrain_image_size=config.image_size,
            patch_size=config.patch_size,
            window_block_indices=[number for number, window in enumerate(windows) if window < side],
            window_size=min(windows) if min(windows) < side else 0,
            use_relative_position_embeddings=True,
            out_indices=[len(backbone.layers)],
        )
    ).eval()
    state: dict[str, Tensor] = {}
    for name, value in backbone.model.state_dict().items():
        if "position_embedding" in name:
            state["embeddings.position_embeddings"] = value.reshape(1, -1, backbone.width)
        elif "patch_embedding" in name:
            state["embeddings.projection." + name.rpartition(".")[2]] = value
    state.setdefault("embeddings.projection.bias", torch.zeros(backbone.width))
    for number, (layer, windows_of) in enumerate(zip(backbone.layers, module.layers, strict=True)):
        own = dict(layer.state_dict())
        one = torch.ones(backbone.width)
        scale1, scale2 = own.get("layer_scale1.lambda1", one), own.get("layer_scale2.lambda1", one)
        find = lambda *ends: next(own[name] for name in own if name.endswith(ends))  # noqa: B023, E731
        for kind in ("weight", "bias"):
            qkv = [find(f"{part}_proj.{kind}") for part in "qkv"]
            into = {
                "norm1": find(f"norm1.{kind}", f"before.{kind}"),
                "norm2": find(f"norm2.{kind}", f"after.{kind}"),
                "attention.qkv": torch.cat(qkv),
                "attention.proj": _scaled(find(f".o_proj.{kind}", f"out_proj.{kind}"), scale1),
                "mlp.fc1": find(f"fc1.{kind}"),
                "mlp.fc2": _scaled(find(f"fc2.{kind}"), scale2),
            }
            state |= {f"encoder.layer.{number}.{name}.{kind}": value for name, value in into.items()}
        state[f"encoder.layer.{number}.attention.rel_pos_h"] = windows_of.rows.detach()
        state[f"encoder.layer.{number}.attention.rel_pos_w"] = windows_of.columns.detach()
    vitdet.load_state_dict(state)
    if hasattr(backbone.model, "pre_layrnorm"):  # CLIP's norm before the first layer, which VitDet has not
        norm = backbone.model.pre_layrnorm
        vitdet.embeddings.register_forward_hook(lambda _, __, x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    return vitdet


def _scaled(value: Tensor, scale_D: Tensor) -> Tensor:
    return value * (scale_D[:, None] if value.ndim > 1 else scale_D)


def noise_images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=PLAIN)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return small_backbone(request.param, noise=0.05).eval()


# 3 and 5 do not divide the 8 tokens of a side: windows over the edge.
@pytest.mark.parametrize("fields", [{"size": 0}, {"size": 4}, {"size": 3, "global_layers": [1]}, {"size": 5}])
def test_windows_and_positions_are_those_of_the_published_class(backbone: Backbone, fields: dict[str, Any]) -> None:
    module = windowed(backbone, noise=0.2, **fields)
    with torch.no_grad():
        found = encoded(module, backbone, noise_images())
        expected = stock(backbone, module)(noise_images()).feature_maps[-1]
    assert found.shape == (2, 64, 8, 8)
    torch.testing.assert_close(found, expected, atol=1e-6 * float(expected.abs().max()), rtol=0)


def test_without_windows_and_at_first_positions_they_are_the_backbones_own_without_class_token(
    backbone: Backbone,
) -> None:
    with torch.no_grad():
        tokens_BND = backbone.embed(noise_images())[1]
        for layer in backbone.layers:
            tokens_BND = layer(tokens_BND, None)
        found = encoded(windowed(backbone, size=0), backbone, noise_images())
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens_BND, atol=1e-6, rtol=1e-6)


def test_whole_images_are_encoded_as_before() -> None:
    backbone = small_backbone("vit", noise=0.05).eval()
    with torch.no_grad():
        before = backbone.encode_whole(noise_images())[1]
        windowed(backbone, size=4)
        torch.testing.assert_close(backbone.encode_whole(noise_images())[1], before)


def test_gates_and_any_width_are_kept() -> None:
    backbone = small_backbone("gated", noise=0.05).eval()
    assert backbone.model.config.use_swiglu_ffn
    assert encoded(windowed(backbone, size=4), backbone, noise_images()).isfinite().all()


def test_windows_keep_their_tokens_apart() -> None:
    backbone = small_backbone("vit", noise=0.05).eval()
    module = windowed(backbone, size=4, global_layers=[])
    images = noise_images()
    changed = images.clone()
    changed[:, :, 32:] += 1
    with torch.no_grad():
        difference = (encoded(module, backbone, changed) - encoded(module, backbone, images)).abs().amax(dim=(0, 1))
    assert difference[:4].max() == 0
    assert difference[4:].min() > 0


@pytest.mark.parametrize("policy", ["full", "selective", "every_2"])
def test_gradients_are_those_of_no_recomputation(policy: str) -> None:
    gradients = []
    for text in ("none", policy):
        backbone = small_backbone("dinov2", noise=0.05).train()
        module = windowed(backbone, noise=0.1, size=3)
        assert bool(apply_activation_checkpointing(backbone, text)) is (text != "none")
        encoded(module, backbone, noise_images()).square().mean().backward()
        gradients.append([p.grad for part in (backbone, module) for p in part.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_drop_path_drops_whole_branches() -> None:
    backbone = small_backbone("vit", noise=0.05)
    module = windowed(backbone, size=4)
    apply_drop_path(backbone, 0.9)
    backbone.eval()
    kept = encoded(module, backbone, noise_images())
    torch.testing.assert_close(encoded(module, backbone, noise_images()), kept)
    backbone.train()
    assert not torch.allclose(encoded(module, backbone, noise_images()), kept)


@pytest.mark.parametrize("name", PLAIN)
def test_layers_learn_at_the_rates_of_detectron2(name: str) -> None:
    """`get_vit_lr_decay_rate`: 0 for patches and positions, N + 1 for block N, the depth + 1 for all else."""
    backbone, decay = small_backbone(name), 0.7
    detector = MaskRcnnDetector(small_spec(), backbone, 3, SingleProcess())
    scales = family_of(backbone.model.config).lr_scales(backbone.model, decay, dense=True)
    depth = len(backbone.layers)
    for parameter, scale in scales.items():
        number = next((int(part) for part in parameter.split(".") if part.isdigit()), None)
        if "patch_embedding" in parameter or "position_embedding" in parameter:
            assert scale == pytest.approx(decay ** (depth + 1))
        elif number is not None:
            assert scale == pytest.approx(decay ** (depth + 1 - (number + 1)))
    layers = detector.backbone_layers()
    assert set(layers) == {n for n, _ in detector.named_parameters() if n.startswith("windows.")}
    assert sorted(set(layers.values())) == list(range(depth))


@pytest.mark.parametrize(
    ("depth", "layers"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (32, (7, 15, 23, 31)), (2, (0, 1)), (1, (0,))]
)
def test_the_last_layer_of_every_quarter_sees_the_whole_image(depth: int, layers: tuple[int, ...]) -> None:
    assert default_global_layers(depth) == layers


@pytest.mark.parametrize(
    ("name", "fields", "place"),
    [
        ("vit", {"size": 8}, "size"),
        ("vit", {"size": 4, "global_layers": [4]}, "global_layers"),
        ("internimage", {"size": 4}, "windows"),
    ],
)
def test_what_has_no_effect_is_refused(name: str, fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as raised:
        windowed_layers(Windows(**fields), small_backbone(name))
    assert place in str(raised.value)


def test_another_attention_kernel_is_refused() -> None:
    section = BackboneConfig.model_validate(BACKBONES["vit"] | {"attention_kernel": "eager"})
    with pytest.raises(ConfigError) as raised:
        windowed_layers(Windows(size=4), build_backbone(backbone_config(section)))
    assert "attention_kernel" in str(raised.value)
