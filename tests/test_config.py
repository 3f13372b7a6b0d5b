"""Faults of a run file say where they were written, and what would be right."""

import pytest

from m3i_scale.config import known_runs, load_run
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import parse_recipe


def fault(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", list(overrides))
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["optim.lr=1e-3", "optim.steps=ten"], 1),
        (["optim={steps: ten}"], 0),
        (["data.sources.a.shards=/data/a", "data.sources.a.wieght=2"], 1),
        (["optim.steps=ten", "optim.steps=100.5"], 1),
        (["optim.steps=50"], 0),  # less than the warm-up of the recipe
    ],
)
def test_a_fault_of_an_override_is_blamed_on_it(overrides, blamed):
    assert fault(*overrides).where == f"override {overrides[blamed]}"


def test_a_fault_of_the_file_is_blamed_on_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("extends: m3i\noptim: {steps: ten}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(str(path), ["optim.lr=1e-3"])
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optim.steps=ten", "e.g. the default, optim.steps=100000"),
        ("optim.lr=fast", "e.g. the default, optim.lr=0.001"),
        ("log.wandb=on", "e.g. the default, log.wandb=off"),
        ("data.augment.flip=2", "e.g. the default, data.augment.flip=0.5"),
        ("optim.lrr=1", "did you mean 'lr'"),
        ("steps=5", "did you mean 'optim.steps'?"),
        ("flip=0.5", "did you mean 'data.augment.flip'?"),
        ("batch_size=8", "did you mean 'optim.batch_size'?"),
        ("every_steps=8", "did you mean 'checkpoint.every_steps' or 'evaluation.every_steps' or 'log.every_steps'?"),
    ],
)
def test_what_would_be_right(override, fix):
    assert fix in fault(override).fix


@pytest.mark.parametrize(
    "setting",
    [
        "mean=[123.675, 116.28, 103.53]",
        "mean=[0.5, 0.5, .nan]",
        "mean=[-0.1, 0.5, 0.5]",
        "std=[58.395, 57.12, 57.375]",
        "std=[0, 0, 0]",
        "std=[0.2, 0.0, 0.2]",
        "std=[.inf, 0.2, 0.2]",
        "crop_scale=[8, 100]",
        "crop_scale=[0, 1]",
        "crop_scale=[1.0, 0.08]",
        "crop_scale=[.nan, 1]",
        "crop_ratio=[0, 1]",
        "crop_ratio=[75, 133]",
        "crop_ratio=[2.0, 0.5]",
        "crop_ratio=[0.75, .inf]",
        "color_jitter=[40, 40, 20, 10]",
        "color_jitter=[0.4, 0.4, 0.2, 0.6]",
        "color_jitter=[-0.4, 0.4, 0.2, 0.1]",
        "color_jitter=[.inf, 0.4, 0.2, 0.1]",
        "color_jitter_p=80",
        "flip=.nan",
        "grayscale=.inf",
        "blur=50",
        "blur=[50]",
        "blur=[0.1, -1]",
        "blur=[.nan]",
        "solarize=[0.0, 20]",
    ],
)
def test_augmentation_out_of_its_range_is_refused_wherever_it_is_set(setting):
    key, value = setting.split("=", 1)
    assert f"'data.augment.{key}" in str(fault(f"data.augment.{setting}"))
    if key not in ("mean", "std"):
        own = fault(f"data.sources={{a: {{shards: x, augment: {{{key}: {value}}}}}}}")
        assert f"'data.sources.a.augment.{key}" in str(own)


def test_normalisation_in_units_of_255_is_told_in_those_of_1():
    assert "[0.485, 0.456, 0.406]" in str(fault("data.augment.mean=[123.675, 116.28, 103.53]"))


def test_blur_that_a_file_states_holds_and_no_other():
    stated = load_run("supervised", ["data.augment.blur=[1.0, 0.1]", "data.augment.solarize=[0.0, 0.2]"]).data.augment
    assert (stated.blur, stated.solarize) == ([1.0, 0.1], [0.0, 0.2])
    source = load_run("sim", ["data.sources={a: {shards: x, augment: {flip: 0.0}}}"]).data.sources["a"].augment
    assert (source.blur, source.solarize) == ([0.1, 1.0], [0.2, 0.0])  # the recipe's


def test_a_missing_field_of_a_recipe_shows_its_values_under_its_whole_key():
    run = load_run("m3i")
    del run.recipe["targets"][0]["regularizer"]
    with pytest.raises(ConfigError, match=r"'recipe\.targets\.0\.regularizer' is missing") as caught:
        parse_recipe(run.recipe, where="run.yaml")
    assert caught.value.where == "run.yaml"
    assert "stop_gradient, unigrad" in caught.value.fix


def test_targets_are_counted_for_those_who_name_them():
    with pytest.raises(ConfigError, match="no index of a list of 4") as caught:
        load_run("m3i", ["recipe.targets.text.weight=2"])
    assert caught.value.fix == "count from 0: 0 intra, 1 inter, 2 text, 3 category"


def test_the_heads_of_a_pool_split_what_it_is_fed_and_not_what_it_gives():
    run = load_run("m3i", ["recipe.decoders.pool={kind: attention_pool, width: 64, heads: 3}"])
    assert parse_recipe(run.recipe).decoders["pool"].heads == 3


def test_heads_that_do_not_divide_a_width_are_refused_with_the_recipe():
    run = load_run("m3i", ["recipe.decoders.dense={kind: transformer, width: 64, heads: 3}"])
    with pytest.raises(ConfigError, match="width 64 is no multiple of its 3 heads"):
        parse_recipe(run.recipe)


def test_a_name_like_no_other_is_told_all_built_in_names():
    with pytest.raises(ConfigError) as caught:
        load_run("nosuch")
    assert set(known_runs()) <= set(caught.value.fix.replace(",", "").split())


@pytest.mark.parametrize("name", ["start_s", "step_s"])
def test_ranks_wait_for_each_other_longer_than_a_reader_for_its_data(name):
    """At the start and in evaluations data are read too."""
    assert "must be longer than data.stall_timeout_s" in str(fault(f"timeouts.{name}=900"))
    assert getattr(load_run("m3i", [f"timeouts.{name}=901"]).timeouts, name) == 901


def test_a_number_in_quotes_is_text():
    run = load_run("m3i", ['name="1e3"', "optim.lr=3e-4"])
    assert (run.name, run.optim.lr) == ("1e3", 3e-4)
