"""The recipe `sim` against a second implementation of the model in `models_sim.py` of Siamese Image Modeling.

Its grids of fixed positions have rows in the first half of the channels, ours columns: an order of channels, which are
alike in first weights. The reference has ours.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import GRID, SIM_PARTS, random_batch, tiny_objective, tiny_run
from torch import Tensor

from m3i_scale.config import load_run
from m3i_scale.data.batch import Batch
from m3i_scale.errors import ConfigError
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import Ranks, SingleProcess

Weights = dict[str, Tensor]


def below(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def affine(x: Tensor, name: str, weights: Weights) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, name: str, weights: Weights) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def permuted_batch_norm(x: Tensor, name: str, weights: Weights) -> Tensor:
    """`PermuteBN` in training: statistics over samples and tokens."""
    channels_first = F.batch_norm(
        x.permute(0, 2, 1), None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True, eps=1e-5
    )
    return channels_first.permute(0, 2, 1)


def block(x: Tensor, weights: Weights, heads: int, *, batch_norm: bool) -> Tensor:
    norm = permuted_batch_norm if batch_norm else layer_norm
    normed = norm(x, "layernorm_before", weights)
    fused = torch.cat([affine(normed, f"attention.{part}_proj", weights) for part in "qkv"], dim=2)
    q, k, v = fused.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mixed = ((scores - scores.max(-1)[0].unsqueeze(-1)).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    x = x + affine(mixed, "attention.o_proj", weights)
    hidden = F.gelu(affine(norm(x, "layernorm_after", weights), "mlp.fc1", weights))
    return x + affine(hidden, "mlp.fc2", weights)


def blocks(x: Tensor, weights: Weights, count: int, heads: int, *, batch_norm: bool) -> Tensor:
    for number in range(count):
        x = block(x, below(f"{number}.", weights), heads, batch_norm=batch_norm)
    return x


def embedded(images: Tensor, model: Weights) -> Tensor:
    """Class token and patches with their positions."""
    patch = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images, model[f"{patch}.weight"], model[f"{patch}.bias"], stride=8).flatten(2).transpose(1, 2)
    tokens = torch.cat([model["embeddings.cls_token"].expand(len(images), -1, -1), patches], dim=1)
    return tokens + model["embeddings.position_embeddings"]


def projected(tokens: Tensor, model: Weights, projector: Weights) -> Tensor:
    """Encoder without a final norm, `decoder_embed`, and the blocks of the projector."""
    tokens = blocks(tokens, below("layers.", model), 2, 2, batch_norm=False)
    return blocks(affine(tokens, "embed", projector), below("blocks.", projector), 2, 16, batch_norm=True)


def relative_embedding(batch: Batch, width: int) -> Tensor:
    """`get_2d_sincos_pos_embed_relative` of the target, view 1, and the input, view 2; patch by patch."""
    omega = 10_000.0 ** -(torch.arange(width // 4) / (width / 4))
    rows = []
    for sample in range(len(batch.seeds_B)):
        (i2, j2, h2, w2), (i1, j1, h1, w1) = (batch.crops_VB4[view, sample].tolist() for view in (0, 1))
        flipped = bool(batch.flips_VB[0, sample] != batch.flips_VB[1, sample])
        image_width = float(batch.sizes_B2[sample, 1])
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                u = h2 / h1 * (row + 0.5) + GRID[0] * (i2 - i1) / h1 - 0.5
                v = w2 / w1 * (column + 0.5) + GRID[1] * (j2 - j1) / w1 - 0.5
                if flipped:
                    v = -w2 / w1 * (column + 0.5) + GRID[1] * (image_width - j1 - j2) / w1 - 0.5
                parts = (u, v, 10 * math.log(h2 / h1), 10 * math.log(w2 / w1))
                rows.append(torch.cat([wave(part * omega) for part in parts for wave in (torch.sin, torch.cos)]))
    return torch.stack(rows).view(len(batch.seeds_B), -1, 2 * width)


def published_loss(objective: Objective, batch: Batch) -> Tensor:
    """`forward_sim` and `compute_unigrad_loss`."""
    weights: Weights = dict(objective.named_parameters(remove_duplicate=False))
    model, decoder = below("student.model.", weights), below("decoders.dense.", weights)
    target_view, input_view = (objective.pixel_norm(images) for images in batch.images_VBCHW)
    (where,) = objective.inputs_of(batch)
    mask = torch.ones(len(batch.seeds_B), 16, dtype=torch.bool).scatter(1, where.visible_BL, False)

    tokens = embedded(input_view, model)
    visible = tokens[:, 1:][~mask].view(len(tokens), -1, 64)
    online = projected(torch.cat([tokens[:, :1], visible], dim=1), model, below("projector.", weights))

    fixed = model["embeddings.position_embeddings"][:, 1:].repeat(len(tokens), 1, 1)[~mask].view(len(tokens), -1, 64)
    relative = affine(relative_embedding(batch, 64), "position_embed", decoder)
    sequence = [online[:, :1], online[:, 1:] + fixed, decoder["mask_token"].repeat(len(tokens), 16, 1) + relative]
    depth = len(objective.decoders["dense"].layers)
    predicted = blocks(torch.cat(sequence, dim=1), below("layers.", decoder), depth, 2, batch_norm=True)
    predicted = affine(predicted, "projection", below("heads.inter.", weights))[:, -16:]

    with torch.no_grad():
        averaged = below("momentum.backbone.model.", weights)
        target = projected(embedded(target_view, averaged), averaged, below("momentum.projector.", weights))[:, 1:]
        target = F.layer_norm(target, (64,)).flatten(0, 1)
        correlation = target.T @ target / len(target)
    rows = predicted.flatten(0, 1)
    positive = (rows - target).square().sum(dim=-1).mean()
    negative = torch.diagonal(rows @ correlation @ rows.T).mean()
    return (positive + 0.02 * negative) / 64


def test_a_step_is_that_of_the_published_code() -> None:
    objective = tiny_objective("sim", "recipe.decoders.dense.depth=2").train()
    with torch.no_grad():  # an average that equals the model would hide which of the two is used
        for name, parameter in objective.momentum.named_parameters():
            if not name.startswith(("backbone.model.embeddings.p", "backbone.model.layernorm")):
                parameter.add_(0.05 * torch.randn_like(parameter))
        for parameter in objective.parameters():  # scales and offsets of norms that are not 1 and 0
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    batch = random_batch(6)
    loss, _ = objective(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad}
    objective.zero_grad()
    wanted = published_loss(objective, batch)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert len(ours) > 80
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, objective.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=name)


def test_values_are_those_of_the_published_script() -> None:
    """`configs/pretrain/dist_sim_base_1600ep.sh`, and the defaults of `main_pretrain.py`."""
    run = load_run("sim")
    decoder, ema = run.recipe["decoders"]["dense"], run.recipe["ema"]
    assert (decoder["depth"], decoder["heads"], ema["projector_depth"], ema["projector_heads"]) == (4, 16, 2, 16)
    assert (ema["start"], ema["end"]) == (0.995, 1.0)
    assert round(run.recipe["inputs"][0]["mask"]["ratio"] * 196) == 118
    steps_per_epoch = 1_281_167 // run.optim.batch_size
    assert (run.optim.steps, run.optim.warmup_steps) == (1600 * steps_per_epoch, 40 * steps_per_epoch)
    assert run.optim.lr == pytest.approx(6.25e-5 * run.optim.batch_size / 256)
    assert run.data.augment.crop_scale == (0.08, 1.0)


def test_the_final_norm_keeps_its_first_values_and_is_applied_in_inference() -> None:
    objective = tiny_objective("sim")
    images = torch.randn(2, 3, 32, 32)
    model = objective.student.model
    assert not any(parameter.requires_grad for parameter in model.layernorm.parameters())
    _, normed = objective.student.encode_whole(images)
    _, raw = objective.student.encode_whole(images, norm=False)
    torch.testing.assert_close(normed, F.layer_norm(raw, (64,), eps=1e-6))
    torch.testing.assert_close(normed, model(pixel_values=images).last_hidden_state[:, 1:])
    (own,) = objective.student.encode_own({1: images}, [1], [torch.arange(16).expand(2, -1)], norm=False)
    torch.testing.assert_close(own[1], raw)


class _Counted(SingleProcess):
    """A world that notes who sums in it."""

    def __init__(self) -> None:
        self.sums = 0

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        self.sums += 1
        return x


def test_batch_norms_are_over_all_ranks() -> None:
    objective = tiny_objective("sim")
    ranks: Ranks = _Counted()
    norms = [module for module in objective.modules() if hasattr(module, "ranks") and module is not objective]
    assert {type(module).__name__ for module in norms} == {"BatchNorm"}
    for module in norms:
        module.ranks = ranks
    objective(random_batch(2))
    assert ranks.sums == 2 * len(norms)  # mean and variance
    assert objective.recipe.compares_samples == "the projector has batch norm"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("recipe.ema.projector_depth=0",), "has no effect with projector_depth 0"),
        (("recipe.ema.projector=mlp",), "projector_heads has no effect"),
        (("recipe.ema.projector_heads=3",), "projector_heads must divide the backbone's width 64"),
        (("recipe.decoders.dense.width=32",), "width must be 64, the backbone's, got 32"),
        (("recipe.decoders.dense.position=absolute",), "position"),
    ],
)
def test_wrong_settings_are_named(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_objective("sim", *overrides)


def test_targets_read_tokens_before_or_after_the_final_norm() -> None:
    """M3I with SIM's parts: dense targets read them before it, text and category after it."""
    objective = tiny_objective("m3i", *SIM_PARTS)
    norm, seen = objective.student.model.layernorm, {}
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
    for name, module in {"projector": objective.projector, "pool": objective.decoders["pool"]}.items():
        module.register_forward_pre_hook(lambda _, tokens, name=name: seen.setdefault(name, []).append(tokens[0]))
    loss, _ = objective(random_batch(4))
    loss.backward()
    patches = [tokens[:, 1:] for tokens in seen["projector"]]
    torch.testing.assert_close([norm(tokens) for tokens in patches], seen["pool"][:2])
    assert norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("continue_m3i", "got an anchor target"),
        ("sim_global", "got a prototypes target"),
        ("byol", "got a pooled target"),
    ],
)
def test_other_targets_need_the_norm(recipe: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_objective(recipe, "recipe.ema.projector=transformer")


def test_attention_across_images_ends_with_the_norm() -> None:
    with pytest.raises(ConfigError, match="attention across images ends with the final norm"):
        tiny_objective("m3i", *SIM_PARTS, "backbone.attention=across_images")


def test_other_recipes_have_the_projector_that_they_had() -> None:
    assert tiny_run("m3i").recipe["ema"].get("projector", "mlp") == "mlp"
    objective = tiny_objective("m3i")
    assert not objective.projector.before_norm
    assert all(parameter.requires_grad for parameter in objective.student.parameters())
