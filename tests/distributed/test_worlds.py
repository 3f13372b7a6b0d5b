"""One rank with the whole batch and two ranks with half of it each are the same run."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ENGINES, RECIPES, REMEMBERED


def test_all_ranks_end_well_and_leave_no_shared_memory(worlds) -> None:
    assert {world: job.left_in_shared_memory for world, job in worlds.jobs.items()} == {1: [], 2: []}
    assert worlds.codes == {1: [0], 2: [0, 0]}


# ---------------------------------------------------------------- losses and gradients


def same(one: dict, two: dict, share: float = 1e-6) -> None:
    """Gradients may differ by `share` of the largest one."""
    assert one["figures"].keys() == two["figures"].keys()
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert one["gradients"].keys() == two["gradients"].keys()
    largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        close = torch.allclose(two["gradients"][name], gradient, rtol=1e-4, atol=share * largest)
        assert close, f"{name}: {float((two['gradients'][name] - gradient).abs().max())}, largest {largest}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ["plain", "zero3"])
def test_two_ranks_have_the_loss_and_the_gradients_of_one(worlds, engine: str, recipe: str) -> None:
    one, two = worlds.result(f"{engine}_{recipe}", 1), worlds.result(f"{engine}_{recipe}", 2)
    # Batch norm on the output divides by a small deviation, and rounding with it.
    same(one, two, share=1e-5 if recipe == "simsiam" else 1e-6)
    assert sum(float(gradient.abs().sum()) for gradient in one["gradients"].values()) > 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_has_the_gradients_of_plain_modules(worlds, world: int, recipe: str) -> None:
    same(worlds.result(f"plain_{recipe}", world), worlds.result(f"zero3_{recipe}", world))


@pytest.mark.parametrize("world", [1, 2])
def test_recomputing_activations_changes_no_gradient(worlds, world: int) -> None:
    same(worlds.result("zero3_m3i", world), worlds.result("zero3_m3i_recomputed", world))


def test_forward_is_not_both_directions(worlds) -> None:
    both, forward = worlds.result("plain_m3i", 1), worlds.result("plain_m3i_forward", 1)
    assert both["figures"]["text/loss"] != pytest.approx(forward["figures"]["text/loss"], rel=1e-4)
    assert both["figures"]["category/loss"] == pytest.approx(forward["figures"]["category/loss"])


def test_the_two_kinds_of_attention_differ(worlds) -> None:
    own, mixed = worlds.result("plain_m3i", 1), worlds.result("plain_m3i_mixed", 1)
    assert own["figures"]["text/loss"] != pytest.approx(mixed["figures"]["text/loss"], rel=1e-4)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("world", [1, 2])
def test_pairs_over_the_global_batch_are_those_of_open_clip(worlds, world: int, loss: str) -> None:
    for rank in range(world):
        told = worlds.result(f"published_{loss}", world, rank)
        assert told["ours"]["loss"] == pytest.approx(told["theirs"]["loss"], rel=1e-5)
        assert told["ours"]["loss"] == pytest.approx(worlds.result(f"published_{loss}", 1)["theirs"]["loss"], rel=1e-5)
        for ours, theirs in zip(told["ours"]["gradients"][:2], told["theirs"]["gradients"][:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- what lasts from batch to batch


@pytest.mark.parametrize("case", REMEMBERED)
@pytest.mark.parametrize("world", [1, 2])
def test_what_heads_and_weights_remember_survives_in_fp32_and_is_the_same_on_all_ranks(
    worlds, world: int, case: str
) -> None:
    for rank in range(world):
        told = worlds.result(f"remembered_{case}", world, rank)
        assert "torch.bfloat16" not in told["dtypes"]
        assert "torch.float32" in told["dtypes"]
        assert told["moved"]
        assert told["loaded_different"] == []
        assert told["resumed_different"] == []
        assert told["loaded_wrong"] == []
        for name, buffer in worlds.result(f"remembered_{case}", world, 0)["kept"].items():
            assert torch.equal(told["kept"][name], buffer), name


@pytest.mark.parametrize("case", REMEMBERED)
@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_of_one_step_add_up_and_what_is_remembered_moves_between_them(
    worlds, world: int, case: str
) -> None:
    told, alone = (worlds.result(f"accumulated_{case}", ranks) for ranks in (world, 1))
    assert told["updates"] == 0
    largest = max(float(gradient.abs().max()) for gradient in alone["plain"].values())
    assert told["engine"].keys() == alone["plain"].keys()
    for name, gradient in alone["plain"].items():
        for side in ("plain", "engine"):
            assert torch.allclose(told[side][name], gradient, rtol=1e-4, atol=1e-6 * largest), (side, name)


# ---------------------------------------------------------------- collectives


@pytest.mark.parametrize("world", [1, 2])
def test_gather_is_by_rank_and_its_gradient_is_that_of_all_users(worlds, world: int) -> None:
    base = torch.arange(6.0).view(3, 2)
    everything = torch.cat([base + 10 * rank for rank in range(world)])
    weights = torch.arange(float(everything.numel())).view_as(everything) * sum(range(1, world + 1))
    for rank in range(world):
        told = worlds.result("collectives", world, rank)
        assert torch.equal(told["gathered"], everything)
        assert torch.equal(told["gradient"], weights[3 * rank : 3 * rank + 3])
        assert told["flags"].tolist() == [True, True, False, True][: 2 * world]
        assert told["integers"].tolist() == [2**62 + other for other in range(world)]
        assert told["sum"].tolist() == [float(sum(range(1, world + 1)))]
        assert not told["sum"].requires_grad
        assert [value.tolist() for value in told["sum_gradient"]] == [[float(sum(range(1, world + 1)))]] * 2


@pytest.mark.parametrize("world", [1, 2])
def test_agreement_means_and_maxima(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("collectives", world, rank)
        assert told["agree"] == (True, False, True)
        assert told["agree_tensors"] == (True, False, False)
        assert told["mean"] == {"a": 10**9 + (world - 1) / 2, "b": 1 + (world - 1) / 2}
        assert told["max"] == {"a": float(world - 1), "b": 1.0}
        assert told["nothing"] == ({}, {})


@pytest.mark.parametrize("world", [1, 2])
def test_all_ranks_stop_and_refuse_together(worlds, world: int) -> None:
    for rank in range(world):
        nothing, asked, refused = worlds.result("collectives", world, rank)["votes"]
        assert (nothing, asked) == (False, True)
        assert "the loss is not finite at step 7" in refused
        met = rank == world - 1
        assert ("text/loss" if met else "finite here") in refused
        assert f"r{rank}m{1 if met else 0}" in refused


# ---------------------------------------------------------------- construction, first weights


def test_first_weights_do_not_depend_on_ranks_or_on_the_engine(worlds) -> None:
    plain = worlds.result("first_weights_plain", 1)
    assert all(torch.isfinite(value).all() for value in plain.values())
    for world in (1, 2):
        for rank in range(world):
            again = worlds.result("first_weights_plain", world, rank)
            assert all(torch.equal(again[name], value) for name, value in plain.items())
            zero3 = worlds.result("first_weights_zero3", world, rank)
            assert all(torch.equal(zero3[name], value) for name, value in plain.items())
            zero1 = worlds.result("first_weights_zero1", world, rank)
            for name, value in plain.items():  # DeepSpeed makes its masters out of the bf16 weights
                assert torch.equal(zero1[name], value.bfloat16().float()), name


def test_the_momentum_target_starts_from_the_backbone(worlds) -> None:
    for case in ("first_weights_zero1", "first_weights_zero3"):
        values = worlds.result(case, 2)
        targets = [name for name in values if name.startswith("momentum.")]
        assert len(targets) > 30
        for name in targets:
            online = name.removeprefix("momentum.").replace("backbone.", "student.", 1)
            assert torch.equal(values[name], values[online]), name


@pytest.mark.parametrize("world", [1, 2])
def test_no_rank_ever_holds_the_whole_model(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("construction", world, rank)
        assert told["all_partitioned"]
        assert told["shards_fit"]
        assert told["held_after"] == 0
        assert told["peak"]["filling"] == told["largest_module"]
        assert told["peak"]["building"] <= 2 * told["largest_module"]
        assert told["full"] > 10 * told["peak"]["building"]
        assert told["full"] > told["trainable"] > 0


def test_vectors_have_no_weight_decay_by_their_full_shape(worlds) -> None:
    assert worlds.result("construction", 1)["decayed"] == worlds.result("construction", 2)["decayed"]
    assert all(count > 0 for count in worlds.result("construction", 2)["decayed"])


@pytest.mark.parametrize("world", [1, 2])
def test_a_pretrained_start_copies_every_weight_exactly(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("from_pretrained", world, rank)
        assert told["different"] == []
        assert told["count"][0] == told["count"][1] > 30
        assert told["copied"]


# ---------------------------------------------------------------- momentum target


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_sharded_average_is_the_whole_one_to_the_last_bit(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"momentum_{engine}", world, rank)
        assert told["different"] == []
        assert told["moved"] > 1e-3
        assert math.isfinite(told["moved"])
        assert told["small"] > 10  # parameters that ZeRO-3 would keep gathered
        if ENGINES[engine] == 3:
            assert told["sub_groups"] > 2  # matrices and vectors, and at least one of the two in parts


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_target_computes_with_the_rounded_average(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"momentum_{engine}", world, rank)
        assert told["unused"] == []
        assert told["stale"] == []
        assert told["dtype"] == ("torch.float32" if engine.endswith("fp32") else "torch.bfloat16")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_whole_weights_come_out_of_a_checkpoint_in_fp32(worlds, engine: str, world: int) -> None:
    assert worlds.result(f"momentum_{engine}", world)["loaded_wrong"] == []


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_training_goes_on_from_a_checkpoint_bit_by_bit(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"momentum_{engine}", world, rank)
        assert told["resumed_different"] == []
        assert told["data_state"] == [{"rank": other} for other in range(world)]
