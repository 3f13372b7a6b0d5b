"""InternImage: the operator against its formula and torchvision's, the published sizes, names and folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import FULL, TINY, model_of, published_folder
from torch import Tensor
from torchvision.ops import deform_conv2d
from transformers import AutoConfig, AutoModel

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.internimage import InternImageConfig, InternImageModel, modeling_internimage
from m3i_scale.backbones.internimage.modeling_internimage import (
    DCNv3,
    InternImageLayer,
    dcnv3,
    sum_by_bag,
    sum_by_grid,
)
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError


def by_hand(x: Tensor, offset: Tensor, weight: Tensor, groups: int, scale: float) -> Tensor:
    """The formula, place by place, with Python's loops."""
    batch, height, width, channels = x.shape
    per = channels // groups
    out = torch.zeros_like(x)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for g in range(groups):
                    total = torch.zeros(per, dtype=x.dtype)
                    for k in range(9):
                        dx, dy = offset[b, i, j, (g * 9 + k) * 2 : (g * 9 + k) * 2 + 2]
                        px = j + scale * (k // 3 - 1 + dx)
                        py = i + scale * (k % 3 - 1 + dy)
                        sampled = torch.zeros(per, dtype=x.dtype)
                        for row in (math.floor(py), math.floor(py) + 1):
                            for column in (math.floor(px), math.floor(px) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(px - column)) * (1 - abs(py - row))
                                    sampled = sampled + share * x[b, row, column, g * per : (g + 1) * per]
                        total = total + weight[b, i, j, g * 9 + k] * sampled
                    out[b, i, j, g * per : (g + 1) * per] = total
    return out


def random_inputs(height: int, width: int, groups: int, per: int, reach: float, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, height, width, groups * per, generator=generator)
    offset = torch.randn(2, height, width, groups * 18, generator=generator) * reach
    weight = torch.randn(2, height, width, groups, 9, generator=generator).softmax(-1).flatten(3)
    return x, offset, weight


@pytest.fixture(params=[sum_by_bag, sum_by_grid])
def formulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has CPUs take each of both."""
    monkeypatch.setitem(modeling_internimage.FORMULATIONS, "cpu", request.param)


def test_a_deterministic_run_takes_the_formulation_that_adds_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert modeling_internimage.FORMULATIONS["cuda"] is sum_by_grid
    calls: list[str] = []
    monkeypatch.setitem(
        modeling_internimage.FORMULATIONS, "cpu", lambda *inputs: calls.append("grid") or sum_by_grid(*inputs)
    )
    inputs = random_inputs(3, 3, 1, 2, 1.0, 0)
    try:
        torch.use_deterministic_algorithms(True)
        dcnv3(*inputs, 1, 1.0)
        assert calls == []
    finally:
        torch.use_deterministic_algorithms(False)
    dcnv3(*inputs, 1, 1.0)
    assert calls == ["grid"]


def saved_bytes(inputs: list[Tensor], groups: int) -> int:
    """What autograd keeps of an operator, inputs left out."""
    held = {tensor.untyped_storage().data_ptr(): 0 for tensor in inputs}

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = dcnv3(*inputs, groups, 1.0)
    del output
    return sum(held.values())


def test_nine_samples_of_every_place_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modeling_internimage.FORMULATIONS, "cpu", sum_by_grid)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(8, 8, 2, 64, 1.0, 0)]
    assert saved_bytes(inputs, 2) < 5 * inputs[0].nbytes


@pytest.mark.parametrize(
    ("reach", "scale", "dtype", "tolerance"),
    [(0.0, 1.0, torch.float64, 1e-10), (1.5, 0.7, torch.float64, 1e-10), (0.0, 2.0, torch.float32, 1e-4)],
)
def test_both_formulations_have_the_same_values_and_gradients(
    reach: float, scale: float, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where offsets are zero too, as they are at the start: there the gradient jumps."""
    found = []
    for chosen in (sum_by_bag, sum_by_grid):
        monkeypatch.setitem(modeling_internimage.FORMULATIONS, "cpu", chosen)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in random_inputs(7, 14, 2, 3, reach, 5)]
        output = dcnv3(*inputs, 2, scale)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append([output.detach(), *torch.autograd.grad(output, inputs, direction)])
    for bag, grid in zip(*found, strict=True):
        torch.testing.assert_close(grid, bag, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_operator_is_its_formula(scale: float) -> None:
    x, offset, weight = random_inputs(4, 3, 2, 3, 1.5, 0)
    torch.testing.assert_close(dcnv3(x, offset, weight, 2, scale), by_hand(x, offset, weight, 2, scale))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    groups=st.integers(1, 3),
    reach=st.sampled_from([0.0, 0.4, 6.0]),
    scale=st.sampled_from([1.0, 2.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_torchvision(
    height: int, width: int, groups: int, reach: float, scale: float, seed: int
) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(height, width, groups, 4, reach + 0.01, seed)]
    other = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    ours, peer = dcnv3(*inputs, groups, scale), as_torchvision(*other, groups, scale)
    torch.testing.assert_close(ours, peer, atol=1e-5, rtol=1e-4)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed))
    ours.backward(direction)
    peer.backward(direction)
    for mine, its in zip(inputs, other, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=2e-5, rtol=1e-4)


def as_torchvision(x: Tensor, offset: Tensor, weight: Tensor, groups: int, scale: float) -> Tensor:
    batch, height, width, channels = x.shape
    order = [column * 3 + row for row in range(3) for column in range(3)]  # torchvision goes row by row
    grid = torch.tensor([(k // 3 - 1.0, k % 3 - 1.0) for k in order])
    moved = offset.view(batch, height, width, groups, 9, 2)[..., order, :]
    moved = (scale * (grid + moved) - grid).flip(-1)  # (y, x), relative to a grid that is not stretched
    moved = moved.permute(0, 3, 4, 5, 1, 2).reshape(batch, groups * 18, height, width)
    mask = weight.view(batch, height, width, groups, 9)[..., order].permute(0, 3, 4, 1, 2)
    return deform_conv2d(
        x.permute(0, 3, 1, 2),
        moved,
        torch.ones(channels, 1, 3, 3),
        padding=1,
        mask=mask.reshape(batch, groups * 9, height, width),
    ).permute(0, 2, 3, 1)


@pytest.mark.usefixtures("formulation")
def test_offsets_that_ran_away_give_zero_and_no_fault() -> None:
    x, offset, weight = random_inputs(4, 4, 1, 2, 1.0, 1)
    for far in (1e30, -1e30, 1e9):
        assert torch.equal(dcnv3(x, torch.full_like(offset, far), weight, 1, 1.0), torch.zeros_like(x))


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_offset_that_is_no_number_shows_in_the_output(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_a_gpu(maps: Tensor, grid: Tensor, **options: Any) -> Tensor:
        return grid_sample(maps, grid.nan_to_num(-100, -100, -100), **options)

    grid_sample = torch.nn.functional.grid_sample
    monkeypatch.setattr(torch.nn.functional, "grid_sample", as_on_a_gpu)
    x, offset, weight = random_inputs(4, 4, 1, 2, 1.0, 1)
    offset[0, 1, 2, 3] = value
    found = dcnv3(x, offset, weight, 1, 1.0)
    assert found[0, 1, 2].isnan().all()
    assert found.isnan().sum() == 2


@pytest.mark.usefixtures("formulation")
def test_a_low_type_outside_is_fp32_inside() -> None:
    x, offset, weight = random_inputs(6, 6, 2, 4, 1.0, 2)
    low = [tensor.bfloat16() for tensor in (x, offset, weight)]
    found = dcnv3(*low, 2, 1.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, dcnv3(*(tensor.float() for tensor in low), 2, 1.0).bfloat16())


def test_first_weights_look_at_the_plain_3_by_3_grid() -> None:
    torch.manual_seed(0)
    model = InternImageModel(InternImageConfig(**{**TINY, **FULL}))
    operator = next(module for module in model.modules() if isinstance(module, DCNv3))
    x = torch.randn(1, 5, 5, 16)
    around = operator.dw_conv(x.permute(0, 3, 1, 2))
    assert not operator.offset(around).any()
    assert not operator.mask(around).any()
    value = operator.input_proj(x)
    mean = torch.nn.functional.avg_pool2d(value.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(operator(x), operator.output_proj((mean + value) / 2))  # the gate starts at one half


@pytest.mark.parametrize(
    ("size", "trunk_millions", "classifier_millions"),
    [
        ("t", None, 30),
        ("s", None, 50),
        ("b", None, 97),
        ("l", None, 223),
        ("xl", None, 335),
        ("h", 1073, None),
        ("g", 3053, None),
    ],
)
def test_parameter_counts_are_published(size: str, trunk_millions: int | None, classifier_millions: int | None) -> None:
    config = backbone_config(BackboneConfig(preset=f"internimage-{size}"))
    config.fusion_width = None
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in InternImageModel(config).parameters())
    if trunk_millions is not None:
        assert round(count / 1e6) == trunk_millions
        return
    # The published counts hold the classifier: 1 × 1 convolution to 1.5 times the channels, BatchNorm, 1,000 classes.
    last = config.stage_channels[-1]
    wide = int(1.5 * last)
    assert round((count + last * wide + 2 * wide + wide * 1000 + 1000) / 1e6) == classifier_millions


def published_names(config: InternImageConfig) -> set[str]:
    """Parameter names of the published weights, spelt out from their structure."""
    names = set()
    names |= {f"patch_embed.{part}.{kind}" for part in ("conv1", "conv2") for kind in ("weight", "bias")}
    names |= {f"patch_embed.{part}.1.{kind}" for part in ("norm1", "norm2") for kind in ("weight", "bias")}
    linear = ("dcn.offset", "dcn.mask", "dcn.input_proj", "dcn.output_proj", "mlp.fc1", "mlp.fc2", "dcn.dw_conv.0")
    norms = ["dcn.dw_conv.1.1", "norm1.0", "norm2.0"]
    if config.res_post_norm:
        norms += ["res_post_norm1.0", "res_post_norm2.0"]
    for level, depth in enumerate(config.depths):
        for block in range(depth):
            start = f"levels.{level}.blocks.{block}"
            names |= {f"{start}.{part}.{kind}" for part in (*linear, *norms) for kind in ("weight", "bias")}
            if config.layer_scale is not None:
                names |= {f"{start}.layer_scale1", f"{start}.layer_scale2"}
            if config.center_feature_scale:
                names |= {f"{start}.dcn.center_feature_scale_proj_{kind}" for kind in ("weight", "bias")}
        if not config.post_norm or config.center_feature_scale:
            names |= {f"levels.{level}.norm.0.{kind}" for kind in ("weight", "bias")}
        if level < 3:
            names.add(f"levels.{level}.downsample.conv.weight")
            names |= {f"levels.{level}.downsample.norm.1.{kind}" for kind in ("weight", "bias")}
    for number in range(len(config.level2_post_norm_block_ids or [])):
        names |= {f"levels.2.post_norms.{number}.0.{kind}" for kind in ("weight", "bias")}
    if config.fusion_width:
        names |= {f"{part}.{kind}" for part in ("dcnv3_head_x4.0", "dcnv3_head_x3") for kind in ("weight", "bias")}
    return names


SHAPES = {
    "t": {},
    "post_norm": {"post_norm": True, "layer_scale": 1e-5, "offset_scale": 2.0},
    "h": FULL,
    "g": {**FULL, "res_post_norm": False, "post_norm": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_have_the_published_names(shape: str) -> None:
    model = model_of(**SHAPES[shape])
    assert {name for name, _ in model.named_parameters()} == published_names(model.config)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_folders_load_strictly(tmp_path: Path, shape: str) -> None:
    model = model_of(**{**SHAPES[shape], **({"fusion_width": 1024} if "fusion_width" in SHAPES[shape] else {})})
    folder = published_folder(tmp_path, model)
    loaded, report = AutoModel.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    assert type(loaded) is InternImageModel
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images).last_hidden_state, model(images).last_hidden_state)


def test_another_architecture_in_a_folder_is_refused(tmp_path: Path) -> None:
    for fields, told in (
        ({"core_op": "DCNv4"}, "core_op is 'DCNv4'"),
        ({"norm_layer": "BN"}, "norm_layer is 'BN'"),
        ({"remove_center": True}, "remove_center is True"),
        ({"drop_rate": 0.1}, "drop_rate must be 0"),
    ):
        folder = published_folder(tmp_path, model_of(), **fields)
        with pytest.raises(ValueError, match=told):
            AutoConfig.from_pretrained(folder)
        with pytest.raises(ConfigError, match=told):
            backbone_config(BackboneConfig(from_pretrained=str(folder)))


def test_maps_of_the_stages_and_the_last_one() -> None:
    model, images = model_of(**FULL), torch.randn(2, 3, 64, 96)
    output = model(images, output_hidden_states=True)
    assert [tuple(x.shape) for x in output.hidden_states] == [
        *((2, 16, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6), (2, 128, 2, 3)),
    ]
    assert output.last_hidden_state.shape == (2, 32, 4, 6)
    third, fourth = output.hidden_states[2:]
    joined = model.dcnv3_head_x3(third) + model.dcnv3_head_x4(fourth)
    torch.testing.assert_close(output.last_hidden_state, joined)
    torch.testing.assert_close(output.pooler_output, joined.mean(dim=(2, 3)))
    assert isinstance(model(images, return_dict=False), tuple)
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.randn(1, 3, 64, 80))


def layer_by_hand(layer: InternImageLayer, x: Tensor, kind: str) -> Tensor:
    if kind == "post_norm":
        x = x + layer.layer_scale1 * layer.norm1(layer.dcn(x))
        return x + layer.layer_scale2 * layer.norm2(layer.mlp(x))
    if kind == "h":
        x = x + layer.res_post_norm1(layer.dcn(layer.norm1(x)))
        return x + layer.res_post_norm2(layer.mlp(layer.norm2(x)))
    if kind == "g":
        x = x + layer.norm1(layer.dcn(x))
        return x + layer.norm2(layer.mlp(x))
    x = x + layer.dcn(layer.norm1(x))
    return x + layer.mlp(layer.norm2(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_stand_where_the_published_layer_has_them(shape: str) -> None:
    model, x = model_of(**SHAPES[shape]), torch.randn(2, 4, 4, 64)
    stage = model.levels[2]
    for number, layer in enumerate(stage.blocks):
        wanted = layer_by_hand(layer, x, shape)
        torch.testing.assert_close(layer(x), wanted)
        x = stage.post_norms[0](wanted) if "dw_kernel_size" in SHAPES[shape] and number == 1 else wanted
    x = x if shape == "post_norm" else stage.norm(x)
    start = torch.randn(2, 4, 4, 64)
    assert stage(start)[0].shape == x.shape
    torch.manual_seed(1)
    again = torch.randn(2, 4, 4, 64)
    found, following = stage(again)
    for number, layer in enumerate(stage.blocks):
        again = layer(again)
        again = stage.post_norms[0](again) if "dw_kernel_size" in SHAPES[shape] and number == 1 else again
    again = again if shape == "post_norm" else stage.norm(again)
    torch.testing.assert_close(found, again)
    torch.testing.assert_close(following, stage.downsample(again))


def test_drop_path_keeps_the_mean_and_grows_with_depth() -> None:
    model = model_of(drop_path_rate=0.4)
    assert [layer.drop_path for level in model.levels for layer in level.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )
    uniform = model_of(drop_path_rate=0.4, drop_path_type="uniform")
    assert {layer.drop_path for level in uniform.levels for layer in level.blocks} == {0.4}
    layer = model.levels[3].blocks[0].train()
    torch.manual_seed(0)
    branch = layer._branch(torch.ones(4000, 1, 1, 2), None)
    assert branch.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert branch.mean().item() == pytest.approx(1, abs=0.05)


FAULTS = {
    "stages": ({"depths": [1, 1, 1]}, "four stages"),
    "groups": ({"groups": [3, 2, 4, 8]}, "16 channels are no multiple of their 3 groups"),
    "stem": ({"channels": 15, "groups": [1, 1, 1, 1]}, "channels must be even"),
    "two norms": ({"post_norm": True, "res_post_norm": True}, "exclude each other"),
    "extra norm": ({"level2_post_norm": True, "level2_post_norm_block_ids": [7]}, "beyond the 2 layers"),
    "kernel": ({"dw_kernel_size": 4}, "dw_kernel_size must be odd"),
    "no kernel": ({"dw_kernel_size": 0}, "dw_kernel_size must be odd"),
    "no depth": ({"depths": [1, 0, 1, 1]}, "must be at least 1"),
    "idle norm": ({"level2_post_norm": True}, "level2_post_norm has no effect without"),
    "size": ({"image_size": 48}, "must be a multiple of the stride of the last stage, 32, got 48"),
    "fusion": ({"fusion_width": None}, "'fusion_width' must be a multiple of 4"),
    "field": ({"hidden_size": 8}, "'hidden_size' of InternImage"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_shapes_that_cannot_be_are_refused(name: str) -> None:
    fields, told = FAULTS[name]
    with pytest.raises(ConfigError, match=told):
        backbone_config(BackboneConfig(preset="internimage-t", config={**TINY, **fields}))


def test_what_follows_from_other_fields_follows_them() -> None:
    config = backbone_config(BackboneConfig(preset="internimage-h", config={"level2_post_norm": False}))
    assert config.level2_post_norm_block_ids is None
    with torch.device("meta"):
        assert not hasattr(InternImageModel(config).levels[2], "post_norms")
    assert backbone_config(BackboneConfig(preset="internimage-h", config={"dw_kernel_size": None})).dw_kernel_size == 3


def test_a_setting_of_attention_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        backbone_config(BackboneConfig(preset="internimage-t", attention_kernel="eager"))
    assert caught.value.where == "backbone.attention_kernel"


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    section = BackboneConfig(preset="internimage-t", config={**TINY, **FULL})
    built = build_backbone(backbone_config(section)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return built


def test_the_adapter_is_the_stock_model() -> None:
    built, images = backbone(), torch.randn(2, 3, 64, 64)
    assert (built.width, built.patch_size, built.grid, built.cell) == (32, 16, (4, 4), 2)
    assert len(built.layers) == 5
    wanted = built.model(images).last_hidden_state
    torch.testing.assert_close(built.last_hidden_state(images), wanted)
    cls, tokens = built.encode_whole(images)
    torch.testing.assert_close(tokens, wanted.flatten(2).transpose(1, 2))
    torch.testing.assert_close(cls, tokens.mean(dim=1, keepdim=True))
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(built.encode_own({0: images}, [0], [every])[0][1], tokens)


def test_nothing_of_hidden_squares_enters() -> None:
    built = backbone()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    visible = torch.tensor([[0, 1, 4, 5, 10, 11, 14, 15]])  # the two squares on the diagonal
    (_, tokens), *_ = built.encode_own({0: images}, [0], [visible])
    assert tokens.shape == (1, 8, 32)
    tokens.square().sum().backward()
    seen = images.grad.abs().sum(dim=1)[0] > 0
    assert seen[:32, :32].any()
    assert seen[32:, 32:].any()
    assert not seen[:32, 32:].any()
    assert not seen[32:, :32].any()
    assert built.mask_token.token.grad.abs().sum() > 0


def test_a_mix_is_put_together_of_what_each_image_shows() -> None:
    built = backbone()
    views = {0: torch.randn(2, 3, 64, 64), 1: torch.randn(2, 3, 64, 64)}
    first = torch.tensor([[0, 1, 4, 5, 2, 3, 6, 7], [0, 1, 4, 5, 10, 11, 14, 15]]).sort(dim=1).values
    rest = torch.stack([torch.tensor([k for k in range(16) if k not in row]) for row in first.tolist()])
    rows = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    # by image: what image i shows in the second place, where it stands in row 1 - i
    second = rest[[1, 0]]
    (_, one), (_, two) = built.encode_mixed(views, [0, 1], [first, second], rows)
    for row in range(2):
        pixels = views[1][1 - row].clone()
        for token in first[row].tolist():
            i, j = (token // 4) * 16, (token % 4) * 16
            pixels[:, i : i + 16, j : j + 16] = views[0][row][:, i : i + 16, j : j + 16]
        whole = built.encode_whole(pixels[None])[1][0]
        torch.testing.assert_close(one[row], whole[first[row]])
        torch.testing.assert_close(two[row], whole[rest[row]])
