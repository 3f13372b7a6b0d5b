"""Where one process has all modules: first weights, and the average of the EMA teacher."""

import pytest
import torch
from tiny import LABEL_SETS, VOCABULARY, tiny_objective, tiny_run
from transformers import ViTConfig, ViTModel

from m3i_scale.objective.build import build_objective, ema_pairs, update_ema_teacher
from m3i_scale.objective.pretrained import start_weights

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("recipe", ["m3i", "dense_distillation", "multi_teacher", "continue_siglip"])
def test_first_weights_are_drawn_from_the_seed_of_the_run_and_those_of_a_teacher_read(recipe: str) -> None:
    run = tiny_run(recipe, "seed=3")
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    start_weights(objective, run)
    wanted = tiny_objective(recipe, seed=3).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in objective.state_dict().items())


def test_a_backbone_starts_from_published_weights_and_its_average_with_it(tmp_path) -> None:
    torch.manual_seed(5)
    stock = ViTModel(ViTConfig(**SIZES, intermediate_size=128), add_pooling_layer=False)
    stock.save_pretrained(tmp_path)
    wanted = dict(stock.named_parameters())
    start = ["backbone.preset=null", "backbone.config={}", f"backbone.from_pretrained={tmp_path}"]
    run = tiny_run("m3i", *start)
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    start_weights(objective, run)
    for model in (objective.student.model, objective.momentum.backbone.model):
        assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters())


def test_averages_move_towards_what_they_follow() -> None:
    objective = tiny_objective("m3i")
    before = {name: value.clone() for name, value in objective.named_parameters()}
    with torch.no_grad():
        for online, _ in ema_pairs(objective):
            objective.get_parameter(online).add_(1.0)
    update_ema_teacher(objective, 0.9)
    for online, average in ema_pairs(objective):
        wanted = 0.9 * before[average] + 0.1 * (before[online] + 1.0)
        torch.testing.assert_close(objective.get_parameter(average).detach(), wanted)
