"""Faults of a run file say where they were written, and what would be right."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from m3i_scale.config import (
    RunConfig,
    known_recipes,
    load_run,
    parse_section,
    read_yaml,
    run_values,
)
from m3i_scale.config.explain import HINTS
from m3i_scale.config.files import values_beyond_built_in
from m3i_scale.errors import AggregateError, ConfigError, did_you_mean
from m3i_scale.exports.source import describe_data
from m3i_scale.objective.recipe import load_run_and_recipe, parse_recipe
from m3i_scale.upgrade import upgrade_config


def fault(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", list(overrides))
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["optim.lr=1e-3", "optim.steps=ten"], 1),
        (["optim={steps: ten}"], 0),
        (["data.datasets.a.path=/data/a", "data.datasets.a.wieght=2"], 1),
        (["optim.steps=ten", "optim.steps=100.5"], 1),
        (["optim.steps=50", "optim.warmup_steps=60"], 1),
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
        ("optim.lrr=1", "did you mean 'lr'"),
        ("steps=5", "did you mean 'optim.steps'?"),
        ("flip=0.5", "did you mean 'data.augment.flip'?"),
        ("batch_size=8", "did you mean 'optim.batch_size'?"),
        ("epochs=8", "did you mean optim.steps"),
        ("optim.epochs=8", "data.datasets.NAME.epochs"),
        ("learning_rate=1", "did you mean optim.lr?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
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
        own = fault(f"data.datasets={{a: {{path: x, augment: {{{key}: {value}}}}}}}")
        assert f"'data.datasets.a.augment.{key}" in str(own)


def test_what_a_training_that_is_over_had_out_of_range_is_read():
    augment = {"crop_scale": [8, 100], "blur": [50], "color_jitter": [40, 40, 20, 10], "mean": [123.7, 116.3, 103.5]}
    values = run_values("supervised", ["optim.lr=1e-4", "optim.min_lr=1e-3"]) | {"data": {"augment": augment}}
    with pytest.raises(AggregateError):
        parse_section(RunConfig, values, where="run.yaml")
    run = parse_section(RunConfig, values, where="run.yaml", stored=True)
    assert run.data.augment.crop_scale == (8, 100)
    assert run.data.augment.mean == (123.7, 116.3, 103.5)
    assert run.optim.min_lr == 1e-3
    with pytest.raises(ConfigError):  # what was never read is no more read now
        parse_section(RunConfig, values | {"optim": {"lr": "fast"}}, where="run.yaml", stored=True)


def test_normalisation_in_units_of_255_is_told_in_those_of_1():
    assert "[0.485, 0.456, 0.406]" in str(fault("data.augment.mean=[123.675, 116.28, 103.53]"))


def test_blur_that_a_file_states_holds_and_no_other():
    stated = load_run("supervised", ["data.augment.blur=[1.0, 0.1]", "data.augment.solarize=[0.0, 0.2]"]).data.augment
    assert (stated.blur, stated.solarize) == ([1.0, 0.1], [0.0, 0.2])
    source = load_run("sim", ["data.datasets={a: {path: x, augment: {flip: 0.0}}}"]).data.datasets["a"].augment
    assert (source.blur, source.solarize) == ([0.1, 1.0], [0.2, 0.0])  # the recipe's


def test_a_missing_field_of_a_recipe_shows_its_values_under_its_whole_key():
    run = load_run("m3i")
    del run.recipe["targets"][0]["regularizer"]
    with pytest.raises(ConfigError) as caught:
        parse_recipe(run.recipe, where="run.yaml")
    assert caught.value.where == "run.yaml"
    assert "recipe.targets.0.regularizer" in caught.value.what
    assert "stop_gradient, unigrad" in caught.value.fix


def test_targets_are_counted_for_those_who_name_them():
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", ["recipe.targets.text.weight=2"])
    assert caught.value.where == "override recipe.targets.text.weight=2"
    assert caught.value.fix == "count from 0: 0 intra, 1 inter, 2 text, 3 category"


def test_the_heads_of_a_pool_split_what_it_is_fed_and_not_what_it_gives():
    run = load_run("m3i", ["recipe.decoders.pool={kind: attention_pool, width: 64, heads: 3}"])
    assert parse_recipe(run.recipe).decoders["pool"].heads == 3


def test_a_file_in_the_working_directory_does_not_shadow_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m3i").write_text("no config file")
    (tmp_path / "run.yaml").write_text("extends: m3i\nseed: 3\n")
    assert load_run("m3i_mini").recipe == load_run("m3i").recipe == load_run("run.yaml").recipe


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("nosuch", "check the path. `m3i-scale recipes` lists"),
        ("m3i_mni", "did you mean 'm3i_mini'"),
        ("my_rnu.yaml", "did you mean 'my_run.yaml'?"),
        ("optim.lr=1", "put the config file first"),
    ],
)
def test_an_unknown_config_file_has_a_short_fix(tmp_path, monkeypatch, name, fix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_run.yaml").touch()
    with pytest.raises(ConfigError, match="no built-in config of that name") as caught:
        load_run(name)
    assert caught.value.fix.startswith(fix)
    assert len(caught.value.fix) < 120


@pytest.mark.parametrize("name", ["startup_s", "collective_s"])
def test_ranks_wait_for_each_other_longer_than_a_reader_for_its_data(name):
    """At the start and in evaluations data are read too."""
    assert "must be longer than data.timeout_s" in str(fault(f"timeouts.{name}=900"))
    assert getattr(load_run("m3i", [f"timeouts.{name}=901"]).timeouts, name) == 901


def test_a_number_in_quotes_is_text():
    run = load_run("m3i", ['name="1e3"', "optim.lr=3e-4"])
    assert (run.name, run.optim.lr) == ("1e3", 3e-4)


@pytest.mark.parametrize("meant", sorted(set(HINTS.values())))
def test_what_other_code_bases_call_differently_is_a_key_here(meant):
    """What follows on the key is for the reader."""
    key = re.split(r"[ ,:]", meant)[0]
    kind = RunConfig
    for part in key.split("."):
        if kind is None:  # below fields that hold anything, or names that the user gives
            break
        assert part in kind.model_fields, key
        inside = kind.model_fields[part].annotation
        kind = inside if isinstance(inside, type) and hasattr(inside, "model_fields") else None


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ("seed: 1\nextends: m3i\nseed: 2\n", "seed"),
        ("extends: m3i\noptim: {lr: 1, steps: 9, lr: 2}\n", "optim.lr"),
        ("extends: m3i\noptim: {lr: 1}\noptim: {lr: 1}\n", "optim"),
        ("extends: m3i\nrecipe: {targets: [{a: 1, a: 1}]}\n", "recipe.targets.0.a"),
        ('extends: m3i\n"seed": 1\nseed: 1\n', "seed"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, twice):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(str(path))
    assert f"'{twice}'" in caught.value.what
    assert caught.value.where.startswith(f"{path}, lines ")


def test_a_key_that_stands_twice_in_an_override_is_refused():
    assert "'lr'" in fault("optim={lr: 1, lr: 2}").what


def test_yaml_reads_as_before_but_for_keys_that_stand_twice(tmp_path):
    """Anchors, merges that are overridden, and one key in two mappings are fine."""
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: [1, .5, yes, null, 1e3]}\nb: {<<: *a, x: 2}\nc: {x: {x: 1}}\nd: *a\n")
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    for built_in in known_recipes().values():
        assert read_yaml(built_in) == yaml.safe_load(built_in.read_text())


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=yes", "optim.lr"),
        ("optim.steps=on", "optim.steps"),
        ("optim.betas=[0.9, true]", "optim.betas"),
        ("hardware.peak_tflops=true", "hardware.peak_tflops"),
        ("checkpoint.max_gib=no", "checkpoint.max_gib"),
        ("guard.spike={z: yes}", "guard.spike.z"),
        ("data.datasets.a={path: a, weight: yes}", "data.datasets.a.weight"),
        ("data.datasets.a={path: a, weight: [[0, 1], [yes, 2]]}", "data.datasets.a.weight"),
        ("data.augment.flip=yes", "data.augment.flip"),
        ("recipe.targets.0.weight=yes", "recipe.targets.0.weight"),
        ("recipe.ema.start=no", "recipe.ema.start"),
        ("optim.weight_decay=.inf", "optim.weight_decay"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.steps=.inf", "optim.steps"),
        ("timeouts.collective_s=.inf", "timeouts.collective_s"),
        ("backbone.config.layer_norm_eps=.nan", "backbone.config"),
        ("text.config={hidden_dropout_prob: .inf}", "text.config"),
        ("data.datasets.a={path: a, weight: [[0, 1], [9, .inf]]}", "data.datasets.a.weight"),
        ("recipe.targets.0.distribution.sigma2=.inf", "recipe.targets.0.distribution.sigma2"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1"),
        ("recipe.ema.end=0.5", "recipe.ema"),
    ],
)
def test_what_is_no_number_to_compute_with_is_refused_anywhere(override, key):
    with pytest.raises(ConfigError) as caught:
        load_run_and_recipe("m3i", [override])
    assert not isinstance(caught.value, AggregateError)
    assert f"'{key}" in caught.value.what
    assert caught.value.where == f"override {override}"


def test_a_truth_value_is_one_still():
    run = load_run("m3i", ["checkpoint.probe=no", "backbone.config={qkv_bias: false}", "hardware.peak_tflops=3"])
    assert (run.checkpoint.probe, run.backbone.config["qkv_bias"]) == (False, False)


def test_the_default_warm_up_fits_any_run():
    for steps, warmup in ((1, 0), (10, 1), (2_500, 250), (2_501, 2_500), (10_000, 2_500), (100_000, 2_500)):
        assert load_run("m3i", [f"optim.steps={steps}"]).optim.warmup_steps == warmup
    assert load_run("m3i").optim.warmup_steps == 2_500
    assert load_run("m3i", ["optim.steps=10", "optim.warmup_steps=9"]).optim.warmup_steps == 9


@pytest.mark.parametrize(
    "overrides", [["optim.steps=10", "optim.warmup_steps=10"], ["optim.lr=1e-3", "optim.min_lr=1e-2"]]
)
def test_a_schedule_that_does_not_hold_says_what_would(overrides):
    fix = fault(*overrides).fix
    changed = next(word for word in re.split(r"[ ,]", fix) if "=" in word)
    load_run("m3i", [*overrides, changed])


def test_a_value_in_place_of_a_section_is_told_the_key_that_was_meant(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", ["data.datasets.photos=/data/photos"])
    assert caught.value.fix == "set data.datasets.photos.path=…"


def test_a_tilde_is_the_home_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run = load_run("m3i", ["data.datasets.photos.path=~/shards/train", "output_dir=~/runs/first"])
    assert run.data.datasets["photos"].path == "/home/me/shards/train"
    assert run.output_dir == Path("/home/me/runs/first")


def test_all_faults_are_told_at_once():
    faults = {"optim.lr=fast": "optim.lr", "optim.epochs=3": "optim.epochs", "recipe.targets.0.weight=-1": "weight"}
    with pytest.raises(AggregateError) as caught:
        load_run_and_recipe("m3i", list(faults))
    assert {told.where for told in caught.value.errors} == {f"override {override}" for override in faults}
    for told, key in itertools.product(caught.value.errors, faults):
        assert (faults[key] in told.what) == (told.where == f"override {key}")
    assert all(told.where.startswith("rank 3: ") for told in caught.value.on_rank(3).errors)


def test_all_overrides_that_are_none_are_told_at_once():
    overrides = ["optim.lr", "optim.lr.x=1", "seed=["]
    with pytest.raises(AggregateError) as caught:
        load_run("m3i", overrides)
    assert [told.where for told in caught.value.errors] == [f"override {given}" for given in overrides]


def test_pipes_and_allow_shell_were_removed(tmp_path):
    (tmp_path / "run.yaml").write_text("extends: m3i\ndata: {allow_shell: false}\n")
    assert load_run(str(tmp_path / "run.yaml")) == load_run("m3i")
    told = fault("data.datasets.a.path=pipe:cat SECRET.tar")
    assert told.what == "'data.datasets.a.path': shards must be at a path or an address: `pipe:` was removed"
    assert told.fix.startswith("mount the shards")


def test_finished_runs_that_read_pipes_can_be_exported():
    data = {"allow_shell": True, "datasets": {"a": {"path": "pipe:cat a.tar"}}}
    values = {"recipe": {}, "data": data}
    data = parse_section(RunConfig, values, where="", stored=True).data
    assert data.datasets["a"].path == "pipe:cat a.tar"
    (described,) = describe_data(SimpleNamespace(run=SimpleNamespace(data=data)))
    assert described["manifest_sha256"] is None
    assert described["note"]
    with pytest.raises(ConfigError) as caught:
        parse_section(RunConfig, upgrade_config(values), where="")
    assert "pipe:" in caught.value.what


@pytest.mark.parametrize(
    "shards",
    [
        "https://u:SECRET@h/x.tar",
        "s3://b/x.tar?X-Amz-Signature=SECRET",
        "pipe:curl -u u:SECRET https://h/x.tar",
        "hf_SECRETSECRET",
    ],
)
@pytest.mark.parametrize(
    "override",
    [
        "data.datasets.a={{path: '{}', wieght: 1}}",
        "data.datasets.a.path=['{}']",
        "data.datasets.a.wieght='{}'",
        "data.datasets.a.path=['{}",
        "optim.lr.x='{}'",
        "{}",
    ],
)
def test_secrets_of_overrides_are_not_told(override, shards):
    told = (
        fault(override.format(shards), "optim.lr=fast")
        if override.startswith("data")
        else fault(override.format(shards))
    )
    assert "SECRET" not in f"{told} {told.to_json()}"


@pytest.mark.parametrize(
    ("word", "near"),
    [("ViT-B/16", ["vit-b/16"]), ("vit_b_16", ["vit-b/16"]), ("VIT-G/14", ["vit-G/14", "vit-g/14"])],
)
def test_case_and_punctuation_are_no_spelling_mistake(word, near):
    presets = [f"vit-{size}/{patch}" for size in ("s", "b", "g", "G") for patch in (14, 16)]
    assert re.findall(r"'(.*?)'", did_you_mean(word, presets)) == near


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 5_000, "a: 2024-13-01", "a: [1", "a: \x00", "{[1]: 2}", "3", "3: 4\nextends: m3i"),
        *("a: &a [*a]", "a: &a {x: [1, *a]}", "a: &a {<<: *a}"),
    ],
)
def test_what_cannot_be_read_is_a_fault_of_the_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(str(path))
    assert caught.value.where == str(path)
    assert "<unicode string>" not in caught.value.what
    if text.startswith(("[", "a")):
        assert fault(f"optim={text}")


@pytest.mark.parametrize("name", ["", " ", "b/c", "a\x1b[31m"])
@pytest.mark.parametrize("key", ["datasets", "validation"])
def test_names_of_sources_make_names_of_metrics(key: str, name: str) -> None:
    """`source//share` would be a metric of no source, and `source/b/c/share` one of a dataset 'b'."""
    values = {"recipe": {}, "data": {key: {name: {"path": "/data/shards"}}}}
    with pytest.raises(ConfigError) as caught:
        parse_section(RunConfig, values, where="run.yaml")
    assert caught.value.where == "run.yaml"
    assert caught.value.what.isprintable()
    assert parse_section(RunConfig, values, where="run.yaml", stored=True).data  # of a run that is over
    for good in ("birds-2", "a.b", "photos (large)", "données"):
        parse_section(RunConfig, {"recipe": {}, "data": {key: {good: {"path": "/data/shards"}}}}, where="run.yaml")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["optim.steps=6", "backbone.config.image_size=64", "optim.batch_size=32"], ["optim.steps=6", "m3i_mini.yaml"]),
        (["optim.warmup_steps=2000", "optim.batch_size=32"], ["optim.warmup_steps=2000"]),
    ],
)
def test_a_warm_up_that_does_not_fit_names_the_settings_at_fault(overrides, where):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i_mini", overrides)
    assert all(part in caught.value.where for part in where)
    assert "batch_size" not in caught.value.where


@pytest.mark.parametrize("key", ["optim.learning_rte", "optim.learning_rate", "optim.Learning_Rte"])
def test_a_misspelled_synonym_is_recognized(key):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", [f"{key}=1e-3"])
    assert caught.value.fix == "did you mean optim.lr?"


def test_what_users_set_beyond_a_built_in_config_is_known(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: m3i_mini\noptim: {lr: 0.5}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\noptim: {steps: 9}\n")
    (tmp_path / "alone.yaml").write_text("name: alone\n")
    name, values = values_beyond_built_in(str(tmp_path / "run.yaml"), ["optim.batch_size=8", "seed=1"])
    assert name == "m3i_mini"
    assert values == {"optim": {"lr": 0.5, "steps": 9, "batch_size": 8}, "seed": 1}
    assert values_beyond_built_in("m3i_mini", []) == ("m3i_mini", {})
    assert values_beyond_built_in(str(tmp_path / "alone.yaml"), []) == (None, {"name": "alone"})
