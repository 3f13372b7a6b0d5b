"""One rank with the whole batch and two ranks with half of it each are the same run."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ENGINES, PARTITIONED, PLANNED, RECIPES, RECOMPUTED, REMEMBERED
from compile_cases import COMPILED
from guard_cases import NONFINITE
from lasting_cases import STEPS
from precision_cases import FIRST_POWER
from step_cases import TRUSTED, WHOLE_STEPS
from tiny import GRID, tiny_run
from traffic_cases import COMPARED, COUNTED

from m3i_scale.objective.positions import grid_position
from m3i_scale.objective.recipe import parse_recipe

pytestmark = pytest.mark.slow


def test_all_ranks_end_well_and_leave_no_shared_memory(worlds) -> None:
    assert {world: job.left_in_shared_memory for world, job in worlds.jobs.items()} == {1: [], 2: []}
    assert worlds.codes == {1: [0], 2: [0, 0]}


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_the_first_samples_are_those_of_the_global_batch_on_every_rank(worlds, world: int, rank: int) -> None:
    for count, keys in worlds.result("first_samples", world, rank).items():
        assert keys == [f"k{number}" for number in range(count)]


# ---------------------------------------------------------------- losses and gradients


ROUNDED = ("simsiam", "sim_global")
"""Batch norm on the output, and a softmax at temperature 0.025, make rounding larger: fp32 and fp64 differ as much."""


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


def kinds_of(name: str) -> set[tuple[str, str | None]]:
    """Return what a recipe's modules are made of."""
    recipe = parse_recipe(tiny_run(*RECIPES[name]).recipe)
    kinds: set[tuple[str, str | None]] = {("decoder", decoder.kind) for decoder in recipe.decoders.values()}
    for target in recipe.targets:
        kinds |= {(field, getattr(target, field).kind) for field in ("distribution", "regularizer")}
        kinds |= {("target", target.kind), ("encoder", target.encoder), ("tokens", target.summary()["tokens"])}
    return kinds


def test_the_engine_is_asked_for_every_kind_of_module() -> None:
    partitioned = set().union(*(kinds_of(name) for name in PARTITIONED))
    assert set().union(*(kinds_of(name) for name in RECIPES)) - partitioned == set()


@pytest.mark.parametrize(
    ("engine", "recipe"), [("plain", name) for name in RECIPES] + [("zero3", name) for name in PARTITIONED]
)
def test_two_ranks_have_the_loss_and_the_gradients_of_one(worlds, engine: str, recipe: str) -> None:
    one, two = worlds.result(f"{engine}_{recipe}", 1), worlds.result(f"{engine}_{recipe}", 2)
    same(one, two, share=1e-5 if recipe in ROUNDED else 1e-6)
    assert sum(float(gradient.abs().sum()) for gradient in one["gradients"].values()) > 0


def test_captions_of_one_rank_alone_count_as_in_the_whole_batch(worlds) -> None:
    one, two = worlds.result("captions_of_one_rank", 1), worlds.result("captions_of_one_rank", 2)
    same(one, two)
    assert one["figures"]["caption/loss"] > 0


@pytest.mark.parametrize("recipe", PARTITIONED)
@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_has_the_gradients_of_plain_modules(worlds, world: int, recipe: str) -> None:
    same(worlds.result(f"plain_{recipe}", world), worlds.result(f"zero3_{recipe}", world))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("way", ["engine", "by_all_reduce"])
def test_layers_as_units_have_the_gradients_of_plain_modules_to_the_last_bit(worlds, world: int, way: str) -> None:
    told = worlds.result("called_twice", world)
    plain, gradients = told["plain"]["gradients"], told[way]["gradients"]
    assert [name for name, gradient in plain.items() if not torch.equal(gradient, gradients[name])] == []
    assert any("decoders.dense.layers.0" in name for name in gradients)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, policy) for name, (_, policies) in RECOMPUTED.items() for policy in policies if policy != "none"],
)
def test_recomputing_activations_changes_no_gradient(worlds, world: int, name: str, policy: str) -> None:
    plain = {"m3i": "zero3_m3i", "maps": "zero3_m3i_maps"}.get(name, f"recomputed_{name}_none")
    same(worlds.result(plain, world), worlds.result(f"recomputed_{name}_{policy}", world))


@pytest.mark.parametrize("engine", TRUSTED)
def test_trust_ratios_have_the_norms_of_complete_matrices(worlds, engine):
    one, two = (worlds.result(f"trust_ratio_{engine}", world) for world in (1, 2))
    moved = {name: (value - one["first"][name]).norm() for name, value in one["reference"].items()}
    for told in (one, two):
        for name, expected in told["reference"].items():
            assert (told["engine"][name] - expected).norm() <= 1e-5 * moved[name], name
    share = 0.02 if engine == "zero1_bf16" else 1e-5
    matrices = [name for name, weights in one["engine"].items() if weights.ndim > 1]
    assert [n for n in matrices if (one["engine"][n] - two["engine"][n]).norm() > share * moved[n]] == []


@pytest.mark.parametrize(("engine", "recipe"), WHOLE_STEPS)
@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_steps_of_ranks_have_the_gradients_of_one_large_batch(worlds, world: int, engine, recipe) -> None:
    told = worlds.result(f"whole_step_{engine}_{recipe}", world)
    same(told["plain"], told["engine"], share=1e-5 if recipe == "barlow" else 1e-6)  # batch norm: see ROUNDED


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


@pytest.mark.parametrize("world", [1, 2])
def test_images_that_batches_show_count_once_in_average_precision(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("shown_images", world, rank)
        assert told["exact"] == {"box_ap": 1.0, "mask_ap": 1.0}
        # Of class 0 the best prediction is wrong, and five of six objects are found: up to a recall of 0.83.
        worth = (5 / 6 * 84 / 101 + 1) / 2
        assert told["missed"] == pytest.approx({"box_ap": worth, "mask_ap": worth})
        assert told["nothing"] == {"box_ap": 0.0}


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
def test_constants_are_exact_in_an_engine_of_bf16_and_in_no_checkpoint(worlds, world: int, case: str) -> None:
    told = worlds.result(f"remembered_{case}", world)["constants"]
    run = tiny_run(*REMEMBERED[case])
    assert {name for name in told if not name.startswith("text.")} == {
        "pixel_norm.mean_C",
        "pixel_norm.std_C",
        "weights.given_K",
    }
    assert torch.equal(told["pixel_norm.mean_C"], torch.tensor(run.data.augment.mean))
    assert torch.equal(told["pixel_norm.std_C"], torch.tensor(run.data.augment.std))


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


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", ["zero3_fp16", "zero2_bf16"])
def test_an_overflow_in_fp16_skips_everything_and_is_counted(worlds, world: int, zero: str) -> None:
    for rank in range(world):
        told = worlds.result(f"fp16_{zero}", world, rank)
        assert told["skipped"] == len(told["scales"]) - 1 > 0
        assert told["scales"] == [2.0 ** (FIRST_POWER - number) for number in range(len(told["scales"]))]
        assert told["moved_while_skipped"] == []
        assert told["loaded"] == {"scale": told["scales"][-1], "skipped": told["skipped"]}
        assert told["window"] == 500  # the run's own, not that of the checkpoint
        assert told["straight"] == {
            "applied": [True, False],
            "scale": 2.0 ** (FIRST_POWER - 1),
            "skipped": told["skipped"] + 1,
        }
        assert told["again"] == told["straight"]
        assert told["resumed_different"] == []


@pytest.mark.parametrize("world", [1, 2])
def test_gradient_norms_and_balance_in_fp16_are_those_of_fp32(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("fp16_zero3_fp16", world, rank)
        assert told["norms"] == pytest.approx(told["plain"]["norms"], rel=0.01)  # the scale is 2^12
        assert min(told["norms"].values()) > 0
        torch.testing.assert_close(told["factors"], told["plain"]["factors"], rtol=0.01, atol=0)


@pytest.mark.parametrize("world", [1, 2])
def test_many_micro_batches_are_added_up_in_fp32(worlds, world: int) -> None:
    """The lean file, which says nothing of fp32, shows what bf16 would lose."""
    fp32, bf16 = (worlds.result(f"added_up_{name}", world)["error"] for name in ("zero3_cpu", "zero3_cpu_lean"))
    assert fp32 < 1e-6
    assert bf16 > 100 * fp32
    assert bf16 > 1e-4


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
        assert told["largest"].tolist() == [1.0, float(world - 1)]
        assert not told["sum"].requires_grad
        assert not told["largest"].requires_grad
        assert [value.tolist() for value in told["sum_gradient"]] == [[float(sum(range(1, world + 1)))]] * 2


@pytest.mark.parametrize("world", [1, 2])
def test_agreement_means_and_maxima(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("collectives", world, rank)
        assert told["agree"] == (True, False, True)
        assert told["agree_and_average"] == ((True, False, False), float(world - 1), [])
        assert told["mean"] == {"a": 10**9 + (world - 1) / 2, "b": 1 + (world - 1) / 2}
        assert told["max"] == {"a": float(world - 1), "b": 1.0}
        assert told["nothing"] == ({}, {})


@pytest.mark.parametrize("world", [1, 2])
def test_all_ranks_know_of_one_loss_that_is_not_finite_and_of_one_request_to_stop(worlds, world: int) -> None:
    for rank in range(world):
        nothing, asked, bad = worlds.result("collectives", world, rank)["votes"]
        assert nothing["collectives"] == ["allreduce_"] * (world - 1)
        assert nothing["vote"] == (1.5, True, False)
        assert nothing["judged"] == [(6 * sum(range(1, world + 1)), sum(range(world)), 100 * world)]
        assert asked["vote"] == (1.5, True, True)
        assert bad["vote"][1:] == (False, True)
        assert math.isnan(bad["vote"][0])
        assert nothing["guard"] == asked["guard"] == {"told": [], "error": "", "skipped": 0}
        told, error = bad["guard"]["told"], bad["guard"]["error"]
        assert bad["guard"]["skipped"] == len(told) == 1
        assert f"rank {world - 1}: text/loss; samples of rank {world - 1}: r{world - 1}m1" in told[0]["why"]
        assert "the loss is not finite at step 8, as 2 times in a row" in error
        assert f"rank {world - 1}: text/loss" in error


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", NONFINITE)
def test_a_nan_in_the_loss_or_gradient_of_one_rank_moves_nothing_on_any(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"nonfinite_{engine}", world, rank)
        assert told["good"] == [True] * 3
        assert told["skipped"] == [True] * 2
        assert told["count"] == 2
        assert told["moved"] == []
        assert told["different_after"] == []
        moved = " ".join(told["good_steps_moved"])
        assert all(part in moved for part in ("student", "momentum ", "buffer "))


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
            for case in ("first_weights_zero1", "first_weights_zero3_bf16"):
                bf16 = worlds.result(case, world, rank)
                for name, value in plain.items():  # DeepSpeed makes its masters out of the bf16 weights
                    assert torch.equal(bf16[name], value.bfloat16().float()), (case, name)


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


def test_vectors_have_no_weight_decay_by_their_full_shape(worlds) -> None:
    assert worlds.result("construction", 1)["decayed"] == worlds.result("construction", 2)["decayed"]
    assert all(count > 0 for count in worlds.result("construction", 2)["decayed"])


@pytest.mark.parametrize("world", [1, 2])
def test_a_pretrained_start_copies_every_weight_exactly(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("from_pretrained", world, rank)
        assert told["different"] == []
        assert told["count"][0] == told["count"][1] > 30
        assert told["shards"] > 3


def test_a_start_from_other_names_does_not_depend_on_ranks(worlds) -> None:
    alone = worlds.result("started", 1)
    assert len(alone["values"]) > 60
    report = alone["told"][0]["backbone"]
    assert report["resized"] == {"embeddings.position_embeddings": {"from": [1, 5, 64], "to": [1, 17, 64]}}
    student = {name.removeprefix("student.model.") for name in alone["values"] if name.startswith("student.model.")}
    assert student == {name for names in report["renamed"].values() for name in names} > {"embeddings.cls_token"}
    for rank in range(2):
        told = worlds.result("started", 2, rank)
        source = {"source": told["told"][0]["backbone"]["source"]} if rank == 0 else {}
        assert told["told"] == ([{"backbone": report | source}] if rank == 0 else [])
        assert told["values"].keys() == alone["values"].keys()
        for name, value in alone["values"].items():
            assert value.abs().sum() > 0, name
            assert torch.equal(told["values"][name], value), name
            online = name.replace("momentum.backbone.", "student.")
            assert torch.equal(alone["values"][online], value), name


@pytest.mark.parametrize("world", [1, 2])
def test_a_file_that_tears_ends_the_start_on_every_rank(worlds, world: int) -> None:
    for rank in range(world):
        told = worlds.result("torn", world, rank)
        assert told["message"] == "the disk is gone"
        assert told["half"][:5] == [True] * 5
        assert not any(told["half"][5:])
        # Between two values no parameter is whole.
        assert told["held"] == ([0] * 5 if rank == 0 else [])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("opening", "ValueError: no header"),
        ("reading", "OSError: the disk"),
        ("writing", "RuntimeError: "),
        ("short", "fewer values than names"),
    ],
)
def test_any_error_of_the_reading_rank_ends_all_ranks(worlds, world: int, case: str, words: str) -> None:
    for rank in range(world):
        kind, message = worlds.result("torn_otherwise", world, rank)[case]
        if rank == 0:
            assert words in f"{kind}: {message}"
        else:
            assert kind == "UserError"
            assert words in message


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", COMPILED)
def test_compiled_layers_have_the_losses_of_others(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"compiled_{engine}", world, rank)
        assert told["false"]["graphs"] == 0
        assert told["true"]["graphs"] > 0
        assert told["true"]["losses"] == pytest.approx(told["false"]["losses"], rel=1e-4)


@pytest.mark.parametrize("engine", COUNTED)
def test_a_step_makes_the_calls_that_the_plan_says_and_moves_its_bytes(worlds, engine: str) -> None:
    for rank in range(2):
        told = worlds.result(f"traffic_{engine}", 2, rank)
        seen, planned = told["seen"], told["planned"]
        if not engine.startswith("zero3"):
            assert seen == planned
            continue
        for key in ("calls", "bytes"):  # gathers are an estimate, reductions are not
            assert planned[key]["reduce-scatter"] == seen[key]["reduce-scatter"]
            assert sum(planned[key].values()) == pytest.approx(sum(seen[key].values()), rel=0.1)


LOSSES = {
    "m3i": ((0, 6, 3), (0, 14, 3)),
    "clip": ((0, 4, 2), (0, 6, 2)),
    "supervised": ((0, 1, 0), (0, 2, 0)),
    "mae": ((0, 1, 0), (0, 4, 0)),
    "moco": ((0, 2, 0), (0, 4, 0)),
}
"""Collectives beside those of DeepSpeed, of a step and of one that is logged: until the student is through, which the
gather of the averages runs beside; of the forward pass; of the backward pass."""


@pytest.mark.parametrize("recipe", COMPARED)
def test_losses_make_few_collectives_and_as_many_on_all_ranks(worlds, recipe: str) -> None:
    told = worlds.result(f"compared_{recipe}", 2)
    assert told == worlds.result(f"compared_{recipe}", 2, 1)
    assert (told["plain"], told["logged"]) == LOSSES[recipe]
    alone = worlds.result(f"compared_{recipe}", 1)
    assert (alone["plain"], alone["logged"]) == ((0, 0, 0), (0, 0, 0))
    assert told["figures"] == pytest.approx(alone["figures"], rel=1e-3)
    assert {name for name in told["figures"] if name.endswith("nats")} == (
        {"intra/nats", "inter/nats"} if recipe == "m3i" else {"pixels/nats"} if recipe == "mae" else set()
    )


# ---------------------------------------------------------------- EMA teacher


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
def test_the_average_moves_with_one_gather_a_group_where_it_is_shared_out_and_parameters_are_not(
    worlds, engine: str, world: int
) -> None:
    for rank in range(world):
        told = worlds.result(f"momentum_{engine}", world, rank)
        # Under ZeRO-3 the averages are shards; under ZeRO-1 in fp32 every rank has all master weights.
        shared = world > 1 and ENGINES[engine] < 3 and not engine.endswith("fp32")
        groups = 2  # matrices and vectors
        assert told["collectives"] == ["_allgather_base_"] * (groups * STEPS if shared else 0)
        assert told["collectives_of_others"] == ["allreduce_", "allreduce_", "barrier"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_target_computes_with_the_rounded_average(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"momentum_{engine}", world, rank)
        assert told["unused"] == []
        assert told["stale"] == []
        assert told["dtype"] == ("torch.float32" if engine.endswith("fp32") else "torch.bfloat16")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parts_of_the_backbone_keep_their_bits(worlds, engine: str, world: int) -> None:
    grid = grid_position(GRID, 64, torch.device("cpu"))
    for rank in range(world):
        told = worlds.result(f"momentum_{engine}", world, rank)
        assert len(told["frozen"]) == 5  # weights and biases of the patch embedding and the final norm, and positions
        assert not any(told["frozen_moved"])
        exact = grid if told["dtype"] == "torch.float32" else grid.bfloat16().float()
        assert torch.equal(told["positions"][0, 1:], exact)


def test_second_copies_in_groups_of_ranks_change_nothing(worlds) -> None:
    for rank in range(2):
        plain, told = (worlds.result(f"momentum_{name}", 2, rank) for name in ("zero3_cpu", "zero3_cpu_hpz"))
        assert told["second_copies"] > 10
        assert plain["second_copies"] == 0
        assert told["sum"] == plain["sum"]


# ---------------------------------------------------------------- what the plan says


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", PLANNED)
def test_a_fresh_engine_holds_what_the_plan_says_to_the_byte(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"held_{engine}", world, rank)
        assert told["held"] == told["planned"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", PLANNED)
def test_a_save_in_the_background_copies_what_the_plan_says_to_the_byte(worlds, engine: str, world: int) -> None:
    for rank in range(world):
        told = worlds.result(f"held_{engine}", world, rank)
        copied, planned = told["copied"], told["snapshot"]
        assert copied["copies"] == planned["copies"]
        if rank == 0:
            assert planned["first rank"] == sum(copied["copies"]) + copied["buffers"]


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


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_does_not_bring_its_clipping_along(worlds, engine: str) -> None:
    before, after = worlds.result(f"momentum_{engine}", 1)["clipping"]
    assert before == after > 0
