"""Plans of losses over all micro-batches of a step."""

from __future__ import annotations

import pytest
from tiny import LABEL_SETS, LAYER_NORM, VOCABULARY, tiny_run

from m3i_scale.plan.planning import Model
from m3i_scale.plan.planning import Vocabulary as LearntFrom

MICRO, STEPS = 4, 3


def model(recipe: str, contrastive_batch: str, micro: int = MICRO, more: tuple[str, ...] = ()) -> Model:
    batch = f"optim.batch_size={MICRO * STEPS}"
    given = [batch, f"optim.micro_batch_size={micro}", f"optim.contrastive_batch={contrastive_batch}", *more]
    run = tiny_run(recipe, *given)
    return Model(run, LearntFrom(LABEL_SETS, VOCABULARY, ()), 1, "fp32")


@pytest.mark.parametrize("recipe", ["clip", "m3i"])
def test_a_plan_counts_one_more_forward_pass_and_the_cached_features(recipe) -> None:
    plain, joint = (model(recipe, kind).trace("none", MICRO) for kind in ("micro", "global"))
    assert plain.cached == 0 < joint.cached
    assert 1.2 * plain.flop < joint.flop < 2 * plain.flop
    assert max(joint.live) > max(plain.live)
    assert len(joint.forward) > len(plain.forward)
    # The gradients of a micro-batch are those of the same parameters.
    assert {place for place, _ in joint.gradients} == {place for place, _ in plain.gradients}


def test_teachers_alone_encode_ahead_if_losses_compare_no_images() -> None:
    plain, joint = (model("sim", kind, more=LAYER_NORM).trace("none", MICRO) for kind in ("micro", "global"))
    assert joint.flop == pytest.approx(plain.flop, rel=0.1)
    tokens = MICRO * 17 * 64 * 4
    assert joint.cached >= (STEPS - 1) * tokens


def test_a_plan_without_accumulation_is_the_usual_one() -> None:
    plain, joint = (model("clip", kind, MICRO * STEPS).trace("none", MICRO * STEPS) for kind in ("micro", "global"))
    assert plain == joint
