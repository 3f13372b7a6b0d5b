"""Captions token by token: what is asked, of whom, and by which modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import LABEL_SETS, VOCABULARY, first_weights, random_batch, tiny_objective, tiny_run
from torch import Tensor

from m3i_scale.config import load_run
from m3i_scale.data.batch import Batch
from m3i_scale.data.tokenizer import check_ends
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.data_checks import check_text

ALONE = "recipe.targets=[{name: caption, kind: caption, inputs: [x], decoder: caption}]"
NO_POOL = "recipe.decoders={caption: {kind: causal_transformer, width: 32, heads: 2, depth: 2}}"


def losses_of_tokens(objective: Objective, batch: Batch) -> list[Tensor]:
    """One caption at a time, without padding: the token behind every beginning of it."""
    losses = []
    pixels = objective.pixel_norm(batch.images_VBCHW[0])
    for sample in torch.arange(len(batch))[batch.has_text_B].tolist():
        ids = batch.text_ids_BT[sample][batch.text_mask_BT[sample]]
        tokens = objective.student.encode_whole(pixels[sample : sample + 1])[1]
        for place in range(1, len(ids)):
            head, decoder = objective.heads["caption"], objective.decoders["caption"]
            answered = decoder(head(ids[None, :place]), tokens)[:, -1]
            losses.append(F.cross_entropy(answered @ head.weight_VD.T, ids[place : place + 1]))
    return losses


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_tokens_of_all_captions() -> None:
    objective, batch = tiny_objective("coca", "recipe.decoders.caption.depth=2").eval(), random_batch(6)
    assert not batch.has_text_B.all()
    losses = losses_of_tokens(objective, batch)
    assert len(losses) == int(batch.text_mask_BT[batch.has_text_B].sum()) - int(batch.has_text_B.sum())
    loss = objective(batch)[1]["caption/loss"]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    wide = {name: F.pad(getattr(batch, name), (0, 5)) for name in ("text_ids_BT", "text_mask_BT")}
    torch.testing.assert_close(objective(replace(batch, **wide))[1]["caption/loss"], loss)


@torch.no_grad()
def test_samples_in_parallel_are_told_no_token() -> None:
    batch = replace(random_batch(12), has_text_B=torch.ones(12, dtype=torch.bool))
    batch.text_mask_BT[:] = True
    given: dict[str, Tensor] = {}
    for share in (0.0, 0.5, 1.0):
        objective = tiny_objective("coca", f"recipe.targets.1.parallel={share}")
        objective.decoders["caption"].register_forward_pre_hook(
            lambda module, inputs, share=share: given.update({share: inputs[0]})
        )
        objective(batch)
    assert not given[1.0].any()
    assert given[0.0].any(dim=2).all()
    silent = ~given[0.5].flatten(1).any(dim=1)
    assert 0 < int(silent.sum()) < 12
    torch.testing.assert_close(given[0.5][~silent], given[0.0][~silent])


@torch.no_grad()
def test_the_eager_kernel_sees_no_later_token_either() -> None:
    batch = random_batch(4)
    losses = [
        objective(batch)[1]["caption/loss"]
        for kernel in ("sdpa", "eager")
        for objective in [tiny_objective("coca", f"backbone.attention_kernel={kernel}")]
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_a_batch_in_which_nobody_has_a_caption_gives_zero_and_zero_gradients() -> None:
    objective = tiny_objective("coca")
    loss, figures = objective(random_batch(4, text=False))
    loss.backward()
    assert float(figures["caption/loss"]) == float(figures["caption/count"]) == 0
    for module in (objective.heads["caption"], objective.decoders["caption"]):
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_captions_alone_need_no_text_tower() -> None:
    run = load_run("coca", [ALONE, NO_POOL])
    run = run.model_copy(update={"backbone": tiny_run("coca").backbone})
    with pytest.raises(ConfigError) as caught:
        build_objective(run, LABEL_SETS, None)
    assert "text.tokenizer" in str(caught.value.fix)
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    first_weights(objective, 0)
    assert objective.text is None
    loss, figures = objective(random_batch(4))
    loss.backward()
    assert float(figures["caption/loss"]) > 0
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_a_shape_of_a_text_tower_that_is_not_there_is_refused() -> None:
    check_text(run := tiny_run("coca"), parse_recipe(run.recipe))
    run = load_run("coca", [ALONE, NO_POOL, "text.max_tokens=16"])
    check_text(run, parse_recipe(run.recipe))
    run = load_run("coca", [ALONE, NO_POOL, "text.config.num_hidden_layers=3"])
    with pytest.raises(ConfigError) as refused:
        check_text(run, parse_recipe(run.recipe))
    assert refused.value.where == "text.config"


@pytest.mark.parametrize(
    ("number", "decoder", "valid"), [(1, "pool", "causal_transformer, not map_head"), (0, "caption", "pool or")]
)
def test_captions_and_their_decoder_go_together(number: int, decoder: str, valid: str) -> None:
    with pytest.raises(ConfigError, match=valid):
        parse_recipe(load_run("coca", [f"recipe.targets.{number}.decoder={decoder}"]).recipe)


def test_the_late_targets_of_siglip2_count_from_four_fifths_on() -> None:
    objective, batch = tiny_objective("siglip2"), random_batch(4)
    late = [*objective.image_heads.parameters()]
    for progress, weights in ((0.0, (1, 1, 0, 0)), (0.8, (1, 1, 0, 0)), (0.81, (1, 1, 0.25, 0.0625))):
        objective.progress = progress
        objective.zero_grad()
        loss, figures = objective(batch)
        loss.backward()
        groups = zip(("text", "caption", "global", "patches"), weights, strict=True)
        torch.testing.assert_close(loss, sum(weight * figures[f"{group}/loss"] for group, weight in groups))
        assert any(parameter.grad.any() for parameter in late) == (progress > 0.8)


class Ends:
    """A tokenizer with or without special tokens at the ends of a text."""

    name_or_path = "ends"

    def __init__(self, before: list[int], behind: list[int]) -> None:
        self.before, self.behind = before, behind

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [*self.before, *([7] if text else []), *self.behind]}


def test_a_tokenizer_marks_where_captions_begin_and_end() -> None:
    check_ends(Ends([2], [3]))
    for before, behind in (([], [3]), ([2], []), ([], []), ([], [3, 2]), ([3, 2], [])):
        with pytest.raises(ConfigError):
            check_ends(Ends(before, behind))
