"""Losses over all micro-batches of a step have the gradients of one large batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from micro_batches import of_a_step
from tiny import DINOV2, LABEL_SETS, LAYER_NORM, VOCABULARY, part, random_batch, tiny_objective, tiny_run
from torch import Tensor

from m3i_scale.engine.device import random_states, replayed
from m3i_scale.errors import ConfigError
from m3i_scale.objective.fit import check_fit
from m3i_scale.objective.information import Objective
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.step_features import StepFeatures

STEPS, MICRO = 3, 4
GLOBAL = {name: (name,) for name in ("clip", "siglip", "simclr", "barlow", "vicreg", "m3i")}
GLOBAL["sim"] = ("sim", *LAYER_NORM)
FURTHER = {
    "byol": ("byol",),
    "simsiam": ("simsiam",),
    "coca": ("coca",),
    "unigrad": ("unigrad",),
    "dino": ("global_distillation",),
    "data2vec2": ("data2vec2",),
    "continue_m3i": ("continue_m3i",),
    "learned": ("m3i", "recipe.balance={kind: learned}"),
    "before_norm": ("clip", "recipe.decoders.pool.final_norm=false"),
    "narrow": ("barlow", "recipe.heads.global.width=6"),
}
DROP_PATH = (*DINOV2, "backbone.config.drop_path_rate=0.5")
TEXT_DROPOUT = ("text.config.hidden_dropout_prob=0.1", "text.config.attention_probs_dropout_prob=0.1")
REMEMBERED = random_batch(MICRO, seed=9)


def micro_batches() -> list[Any]:
    whole = random_batch(STEPS * MICRO, seed=3)
    return [part(whole, MICRO * number, MICRO * (number + 1)) for number in range(STEPS)]


def prepared(recipe: str, *overrides: str) -> Objective:
    """An objective whose queues, centers and correlations are not empty any more."""
    objective = tiny_objective(recipe, *overrides).train()
    objective(REMEMBERED)[0].backward()
    objective.zero_grad()
    return objective


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {name: p.grad for name, p in objective.named_parameters() if p.requires_grad and p.grad is not None}


def accumulated(objective: Objective, batches: Sequence[Any], contrastive_batch: str = "global") -> list[Any]:
    """Losses and metrics of the micro-batches of a step, whose gradients are accumulated."""
    results = []
    for batch, step, states in of_a_step(objective, batches, contrastive_batch):
        with replayed(states):
            loss, figures = objective(batch, step)
        (loss / len(batches)).backward()
        results.append((loss.detach(), figures))
    return results


def same(one: dict[str, Tensor], two: dict[str, Tensor], share: float = 1e-6) -> None:
    """Gradients may differ by `share` of all of them, and each by its rounding."""
    assert one.keys() == two.keys()
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    different = torch.stack([(two[name] - gradient).norm() for name, gradient in one.items()]).norm()
    assert norm > 0
    assert float(different / norm) < share


@pytest.mark.parametrize("arguments", [*GLOBAL.values(), *FURTHER.values()], ids=[*GLOBAL, *FURTHER])
def test_micro_batches_have_the_loss_the_gradients_and_the_memories_of_one_large_batch(arguments) -> None:
    large, small = prepared(*arguments), prepared(*arguments)
    loss, figures = large(random_batch(STEPS * MICRO, seed=3))
    loss.backward()
    results = accumulated(small, micro_batches())
    assert float(torch.stack([loss for loss, _ in results]).mean()) == pytest.approx(loss.item(), rel=1e-5)
    for target in large.recipe.targets:
        mean = torch.stack([figures[f"{target.name}/loss"] for _, figures in results]).mean()
        assert float(mean) == pytest.approx(float(figures[f"{target.name}/loss"]), rel=1e-5)
    same(gradients(large), gradients(small))
    buffers = dict(large.named_buffers())
    for name, buffer in small.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", GLOBAL.values(), ids=GLOBAL)
def test_plain_accumulation_is_another_loss(arguments) -> None:
    large, small = prepared(*arguments), prepared(*arguments)
    large(random_batch(STEPS * MICRO, seed=3))[0].backward()
    accumulated(small, micro_batches(), "micro")
    with pytest.raises(AssertionError):
        same(gradients(large), gradients(small), 1e-4)


class _Whole(StepFeatures):
    """Features of all micro-batches in one graph."""

    def with_present(self, cached: Any, present_BF: Tensor) -> Tensor:
        return torch.cat(list(cached))


@pytest.mark.parametrize("recipe", ["clip", "simclr"])
def test_dropped_values_are_the_same_with_and_without_gradient(recipe) -> None:
    overrides = (*DROP_PATH, *(TEXT_DROPOUT if recipe == "clip" else ()))
    batches, (one, two) = micro_batches(), [prepared(recipe, *overrides) for _ in range(2)]
    torch.manual_seed(5)
    drawn = []
    for batch, step, states in of_a_step(two, batches):
        drawn.append(random_states() if states is None else states)
        with replayed(states):
            loss, _ = two(batch, step)
        (loss / STEPS).backward()
    after = torch.rand(1)
    whole = _Whole(STEPS)
    for number, batch in enumerate(batches):
        whole.number = number
        with replayed(drawn[number]):
            context = one._encode(batch, whole)
        with_gradient = Objective._features.__wrapped__(one, context)
        with_gradient.text_BE = context.text_BE
        whole.present = with_gradient
    joint = whole.join(context, set())
    one._pair_texts(joint)
    one._predict(context, joint)[0].backward()
    same(gradients(one), gradients(two))
    assert not any(torch.equal(first, second) for (first, _), (second, _) in pairwise(drawn))
    with replayed(drawn[0]):  # the next step draws other numbers than this one
        two(batches[0])
        assert torch.equal(torch.rand(1), after)


def test_the_teacher_encodes_every_micro_batch_once_and_the_student_one_more_time() -> None:
    objective, calls = prepared("m3i"), {"student": 0, "teacher": 0, "text": 0}

    def counted(name: str) -> Any:
        return lambda *_: calls.update({name: calls[name] + 1})

    objective.momentum.register_forward_hook(counted("teacher"))
    objective.text.register_forward_hook(counted("text"))
    encode_own = objective.student.encode_own
    objective.student.encode_own = lambda *given, **named: counted("student")() or encode_own(*given, **named)
    accumulated(objective, micro_batches())
    assert calls == {"student": 2 * STEPS - 1, "teacher": STEPS, "text": 2 * STEPS - 1}


def test_only_teachers_encode_ahead_if_losses_compare_no_images() -> None:
    objective = prepared("sim", *LAYER_NORM)
    calls: list[int] = []
    encode_own = objective.student.encode_own
    objective.student.encode_own = lambda *given, **named: calls.append(1) or encode_own(*given, **named)
    accumulated(objective, micro_batches())
    assert len(calls) == STEPS


def test_features_must_be_cached_first() -> None:
    objective, (first, *_) = prepared("clip"), micro_batches()
    with pytest.raises(ValueError, match="the features of 1 of 3 micro-batches are cached"):
        objective(first, StepFeatures(STEPS))


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("ibot", (), "does not support a dense_prototypes target"),
        ("densecl", (), "does not support a dense_negatives target"),
        ("capi", (), "does not support a clusters target"),
        ("sim", (), "batch norm over tokens: the projector"),
        ("supervised", ("recipe.targets.0.batch_norm=true",), "does not support a category target"),
    ],
)
def test_losses_that_cannot_cover_a_step_are_errors(recipe, overrides, words) -> None:
    run = tiny_run(recipe, "optim.contrastive_batch=global", *overrides)
    with pytest.raises(ConfigError, match=words) as error:
        check_fit(run, parse_recipe(run.recipe), tiny_objective(recipe).student, LABEL_SETS, VOCABULARY)
    assert "optim.contrastive_batch=micro" in str(error.value)
