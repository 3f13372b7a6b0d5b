"""Both attention kernels are one function, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import DINOV2, MAPS, random_batch, tiny_objective

from m3i_scale.backbones.base import attend, split_heads
from m3i_scale.evaluation.pictures.model_outputs import encode_attending


@pytest.mark.parametrize("masked", [False, True])
def test_kernels_agree(masked: bool) -> None:
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])[:, None, None]
    results = []
    for kernel in ("sdpa", "eager"):
        torch.manual_seed(0)
        query, key, value = (split_heads(torch.randn(2, size, 12), 3).requires_grad_() for size in (2, 5, 5))
        output = attend(query, key, value, kernel, mask_B11L=mask if masked else None)
        results.append((output, *torch.autograd.grad(output.sin().sum(), (query, key, value))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert results[0][0].shape == (2, 3, 2, 4)


def test_dropout_is_of_the_weights() -> None:
    query, key, value = (torch.ones(1, 1, 4, 2) for _ in range(3))
    torch.manual_seed(0)
    assert {round(float(x), 3) for x in attend(query, key, value, "eager", dropout=0.5).flatten()} > {1.0}
    assert torch.equal(attend(query, key, value, "eager", dropout=0.0), value)


def test_a_whole_recipe_is_the_same_under_both_kernels() -> None:
    batch, losses, gradients = random_batch(8), [], []
    for kernel in ("sdpa", "eager"):
        objective = tiny_objective("m3i", f"backbone.attention_kernel={kernel}")
        kinds = {m.config._attn_implementation for m in objective.modules() if hasattr(m, "config")}
        assert kinds == {kernel}
        loss, _ = objective(batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("overrides", [(), DINOV2, ("backbone.preset=clip-b/16",)])
def test_attention_of_the_class_token_is_that_of_the_stock_model(overrides: tuple[str, ...]) -> None:
    student = tiny_objective("supervised", *overrides).student.eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens, attention = encode_attending(student, images)
        for one, other in zip(tokens, student.encode_whole(images), strict=True):
            assert torch.equal(one, other)
        student.model.set_attn_implementation("eager")
        *_, last = student.model(pixel_values=images, output_attentions=True).attentions
    torch.testing.assert_close(attention, last[:, :, 0, 1:])
    assert attention.shape == (3, 2, 16)


def test_a_backbone_without_class_token_has_no_attention_of_one() -> None:
    student = tiny_objective("supervised", *MAPS).student.eval()
    with torch.no_grad():
        assert encode_attending(student, torch.randn(1, 3, 64, 64))[1] is None
