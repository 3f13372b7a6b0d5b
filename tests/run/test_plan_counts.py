"""Compare what `plan` counts without running anything with real steps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny import LABEL_SETS, MAPS, VOCABULARY, random_batch, tiny_objective, tiny_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3i_scale.backbones.flops import counter
from m3i_scale.data.batch import synthetic_batch
from m3i_scale.engine.activations import apply_activation_checkpointing
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.plan.planning import Model, Vocabulary
from m3i_scale.plan.trace import scaled

DEEP_VIT = (
    "backbone.config={hidden_size: 64, num_hidden_layers: 8, num_attention_heads: 2, intermediate_size: 128, "
    "image_size: 64, patch_size: 8}",
)
DEEP_MAPS = (MAPS[0], MAPS[1].replace("depths: [1, 1, 2, 1]", "depths: [4, 4, 4, 1]"))
SMALL = ("optim.batch_size=64", "optim.micro_batch_size=4")


def model_of(recipe: str, *overrides: str, world: int = 2) -> Model:
    return Model(tiny_run(recipe, *SMALL, *overrides), Vocabulary(LABEL_SETS, VOCABULARY, ()), world, "fp32")


@pytest.mark.parametrize("recipe", ["m3i", "clip", "sim", "mae"])
def test_flops_on_meta_are_those_of_a_real_step(recipe):
    run = tiny_run(recipe, "text.max_tokens=8") if recipe in ("m3i", "clip") else tiny_run(recipe)
    batch = random_batch(4)
    objective = tiny_objective(recipe)
    with counter() as real:
        objective(batch)[0].backward()
    counted = Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), 1, "fp32").trace("none", 4).flop
    assert counted == pytest.approx(real.get_total_flops(), rel=0.02)


class _Live(TorchDispatchMode):
    """The most bytes that storages of a real pass take at a time."""

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata for tensor in there}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.alive:
                self.meet(leaf.untyped_storage())
        return output

    def meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def end() -> None:
            self.alive.discard(key)
            self.live -= size

        weakref.finalize(storage, end)


@pytest.mark.parametrize(("backbone", "more"), [(DEEP_VIT, 0.1), (DEEP_MAPS, 0.3)], ids=["vit", "maps"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_most_live_bytes_are_those_of_a_real_pass(backbone, more, policy):
    """Whatever the garbage collector does: what a layer recomputed is gone before the next one recomputes.

    On `meta` a bag counts one number an index more than on a host, as it does on a GPU.
    """
    run = tiny_run("supervised", *SMALL, *backbone)
    objective = build_objective(run, LABEL_SETS, None).train()
    batch = synthetic_batch(4, objective.recipe.drawn_views, image=64, tokens=8, classes=3, vocabulary=VOCABULARY)
    there = [*objective.parameters(), *objective.buffers()]
    there += [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    initialize_sharded(objective, initialize_module, seed=0)
    apply_activation_checkpointing(objective, policy)
    for parameter in objective.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    gc.collect()
    gc.disable()
    try:
        with _Live(there) as real:
            objective(batch)[0].backward()
        trace = Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), 1, "fp32").trace(policy, 4)
    finally:
        gc.enable()
    assert 0.9 * real.peak <= max(trace.live) <= (1 + more) * real.peak


@pytest.mark.parametrize("recipe", ["m3i", "supervised", "clip"])
def test_recomputation_saves_activations_and_costs_arithmetic(recipe):
    model = model_of(recipe)
    none, every, full = (model.trace(policy, 4) for policy in ("none", "every_2", "full"))
    assert max(none.live) > max(every.live) > max(full.live)
    assert none.flop < every.flop < full.flop


def test_larger_micro_batches_take_more_activations():
    model = model_of("m3i")
    sizes = [max(model.trace("none", size).live) for size in (2, 3, 4, 8)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("recipe", ["m3i", "sim"])
def test_a_large_micro_batch_follows_from_two_small_ones(recipe):
    model = model_of(recipe)
    one, two, wanted = (model.trace("full", size) for size in (2, 4, 12))
    guessed = scaled(one, two, 2, 12)
    assert guessed is not None
    assert max(guessed.live) == pytest.approx(max(wanted.live), rel=0.02)
    assert guessed.flop == pytest.approx(wanted.flop, rel=0.02)


def test_everything_that_is_taken_is_given_back():
    trace = model_of("m3i").trace("every_2", 4)
    assert trace.live[-1] < 0.02 * max(trace.live)  # what the objective remembers, and the loss
    assert trace.kept[-1] == 0 < max(trace.kept)
