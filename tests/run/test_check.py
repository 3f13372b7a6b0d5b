"""`check` and `config`: a run file without a start."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from forked import Forks
from image_text_models import POSITIONS, write_model
from shapes import write_run
from tiny import tiny_start, tiny_teacher
from transformers import BitImageProcessor
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import load_run
from m3i_scale.data.shards import read_sample_count
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.peak import Peak
from m3i_scale.errors import AggregateError, ConfigError, UserError
from m3i_scale.objective import build
from m3i_scale.run.check import errors_of, resolve_run
from m3i_scale.run.flops import Work, step_flop
from m3i_scale.run.run_warnings import _output_warnings, warnings_of
from m3i_scale.run.summary import time_line
from m3i_scale.text import duration_text


def places(*arguments: str, ranks: int | None = None) -> list[str]:
    """Where the faults are."""
    run, *overrides = arguments
    return [str(fault.where) for fault in errors_of(run, overrides, ranks)]


def test_a_recipe_alone_has_no_data() -> None:
    assert places("m3i") == ["data.datasets"]


def test_a_run_that_could_start_has_no_faults(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    before = sorted(tmp_path.rglob("*"))
    assert places(run_file) == places(run_file, ranks=1) == []
    assert sorted(tmp_path.rglob("*")) == before  # nothing is started


def test_an_output_directory_that_cannot_be_written_here_is_a_warning(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    assert not [text for text in warnings_of(run_file) if text.startswith("output_dir")]
    assert [text for text in warnings_of(run_file, ["output_dir=/proc/foo/bar"]) if "'/proc'" in text]
    (error,) = errors_of(run_file, [f"output_dir={write_run(tmp_path, shards, 'm3i') / 'out'}"])  # below a file
    assert error.fix


def test_an_output_directory_below_a_locked_folder_is_a_warning(shards: Path, tmp_path: Path, monkeypatch) -> None:
    run = load_run(str(write_run(tmp_path, shards, "m3i")))

    def locked(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", locked)
    (text,) = _output_warnings(run)
    assert "Permission denied" in text


def test_faults_of_all_kinds_are_told_at_once(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    mistakes = {
        "optim.lr=yes": "override optim.lr=yes",
        "data.datasets.other.path=/nowhere/shards": "data.datasets.other.path",
        "backbone.config.hidden_act=gelru": "backbone.config.hidden_act",
        "hardware.peak_tflops=989e12": "hardware.peak_tflops",
        "recipe.ema.end=0.5": "override recipe.ema.end=0.5",
        "deepspeed=/nowhere/zero9.json": "/nowhere/zero9.json",
    }
    found = places(run_file, *mistakes)
    assert len(found) == len(mistakes), found
    for where in mistakes.values():
        assert sum(place.startswith(where) for place in found) == 1, (where, found)


def test_what_depends_on_what_is_at_fault_is_not_told(shards: Path, tmp_path: Path) -> None:
    """No tokenizer is missed where there are no shards, and no data where their section cannot be read."""
    run_file = str(write_run(tmp_path, shards, "m3i"))
    for wrong in (shards.parent / "shrads", shards / "train" / "shapes-{000000..000099}.tar", tmp_path):
        assert len(places(run_file, f"data.datasets.shapes.path={wrong}")) == 1
    assert places(run_file, "data.datasets.shapes.wieght=1") == ["override data.datasets.shapes.wieght=1"]


@pytest.mark.parametrize("recipe", ["m3i", "clip", "supervised", "mae"])
def test_a_wrong_path_of_shards_is_told_as_that(shards: Path, tmp_path: Path, recipe: str) -> None:
    run = load_run(str(write_run(tmp_path, shards, recipe)), ["data.datasets.shapes.path=/nowhere/shards"])
    with pytest.raises(UserError) as caught:
        resolve_run(run, 1)
    assert caught.value.where == "data.datasets.shapes.path: /nowhere/shards"


@pytest.mark.parametrize("recipe", ["m3i", "clip"])
def test_captions_that_no_sample_has_are_missed(shards: Path, tmp_path: Path, recipe: str) -> None:
    """Training would go on to the end with a loss of 0."""
    train = shutil.copytree(shards / "train", tmp_path / "train")
    manifest = json.loads((train / "manifest.json").read_text())
    for facts in manifest["shards"].values():
        facts["with_caption"] = 0
    (train / "manifest.json").write_text(json.dumps(manifest))
    run_file = str(write_run(tmp_path, shards, recipe))
    alone = f"data.datasets={{shapes: {{path: {train}}}}}"
    where = [f"data.datasets.shapes.path: {train}"]
    assert places(run_file, alone) == places(run_file, alone, f"text.tokenizer={shards / 'tokenizer'}") == where
    assert places(run_file, f"data.datasets.bare.path={train}") == []  # another source has captions


def test_ranks_are_looked_at_where_their_number_is_known(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "mae"))
    assert places(run_file) == []
    assert "data.streams" in places(run_file, ranks=7)


@pytest.fixture
def of_two_ranks(tmp_path: Path) -> str:
    """The override for a DeepSpeed file that holds for two ranks, or four, and not for one."""
    raw = load_ds_config("zero3_cpu")
    raw["zero_optimization"]["zero_hpz_partition_size"] = 2
    path = tmp_path / "two.json"
    path.write_text(json.dumps(raw | {"gradient_accumulation_steps": 1}))
    return f"deepspeed={path}"


def test_a_deepspeed_file_for_more_ranks_than_one_is_not_refused(shards: Path, tmp_path: Path, of_two_ranks) -> None:
    run_file = str(write_run(tmp_path, shards, "mae", of_two_ranks))
    assert places(run_file) == places(run_file, ranks=2) == []
    assert places(run_file, ranks=1) == [of_two_ranks.partition("=")[2]]
    assert len(places(run_file, "optim.batch_size=6")) == 1  # which no number of ranks would make up


@pytest.mark.parametrize(("ranks", "faults"), [("2", 1), ("3", 3)])
def test_a_rank_with_a_mistake_is_told_what_else_is_wrong_for_all_ranks(
    shards: Path, tmp_path: Path, of_two_ranks: str, monkeypatch: pytest.MonkeyPatch, ranks: str, faults: int
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    run_file = str(write_run(tmp_path, shards, "mae", of_two_ranks))
    error = CliRunner().invoke(app, ["train", run_file, "log.progress=9"]).exception
    assert isinstance(error, ConfigError)
    assert len(getattr(error, "errors", [error])) == faults


def test_an_interval_of_evaluations_that_never_comes_is_refused(shards: Path, tmp_path: Path) -> None:
    overrides = [f"data.validation.val.path={shards / 'val'}", "evaluation.every_steps=9"]
    run_file = str(write_run(tmp_path, shards, "mae", *overrides))
    assert places(run_file, "optim.steps=8") == ["evaluation.every_steps: 9"]
    assert places(run_file, "optim.steps=9") == []


def test_resolve_run_tells_all_it_finds(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, "m3i", "optim.batch_size=6", "backbone.config.patch_size=7")
    with pytest.raises(AggregateError) as caught:
        resolve_run(load_run(str(run_file)), 1)
    assert len(caught.value.errors) == 2


def test_whatever_a_model_raises_is_an_error_of_the_configuration(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """Also what no rule here knows of, and where the model is one of a library that raises what it likes."""

    def refuses(*others, **more):
        raise KeyError("nosuch")

    monkeypatch.setattr(build, "build_objective", refuses)
    run = load_run(str(write_run(tmp_path, shards, "m3i")))
    with pytest.raises(ConfigError) as caught:
        build.build_on_meta(run, {}, 64)
    assert "nosuch" in caught.value.what
    assert caught.value.where.startswith("backbone.config")


def test_the_text_tower_is_built_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    assert places(run_file, "text.config.hidden_act=gelru") == ["text.config.hidden_act: 'gelru'"]
    assert places(run_file, "text.config.num_attention_heads=3") == ["text.config.hidden_size"]
    assert find_tokenizer(load_run(run_file).data.datasets, None).pad_token_id == 0


def test_images_that_are_not_those_of_the_weights_are_a_warning(shards: Path, tmp_path: Path) -> None:
    """Size, mean and deviation: nothing is refused, and each is told where it differs, and only there."""
    start = Path(shutil.copytree(tiny_start(), tmp_path / "start"))
    seen = load_run("continue_images").data.augment
    BitImageProcessor(image_mean=list(seen.mean), image_std=list(seen.std)).save_pretrained(start)
    run_file = str(write_run(tmp_path, shards, "continue_images", f"backbone.from_pretrained={start}"))
    assert warnings_of(run_file) == []
    (mean,) = warnings_of(run_file, ["data.augment.mean=[0.1,0.5,0.5]"])
    assert "0.1" in mean
    (size,) = warnings_of(run_file, ["backbone.config.image_size=48"])
    assert "32" in size
    assert "48" in size
    stages = "stages=[{steps: 3}, {steps: 3, image_size: 64}]"
    (last,) = warnings_of(run_file, ["optim.steps=6", stages])
    assert "64" in last
    both = ["backbone.config.image_size=48", "data.augment.std=[0.1,0.1,0.1]"]
    assert len(warnings_of(run_file, both)) == 2
    assert places(run_file, *both) == []
    assert warnings_of(str(write_run(tmp_path, shards, "mae"))) == []  # from random weights


def test_weights_that_do_not_fit_are_found_by_their_headers(shards: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(tiny_start(), tmp_path / "start"))
    run_file = str(write_run(tmp_path, shards, "continue_images", f"backbone.from_pretrained={start}"))
    assert places(run_file) == []
    weights = start / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert places(run_file) == [f"backbone.from_pretrained: {weights}"]
    shutil.copy(Path(tiny_teacher("siglip")) / "model.safetensors", weights)
    assert places(run_file) == ["backbone.from_pretrained"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # which a run goes on from, without these weights
    assert places(run_file, f"output_dir={tmp_path / 'run'}") == []
    assert places(run_file, "backbone.config.patch_size=7") == ["backbone.config.patch_size"]


def test_of_a_model_of_the_hub_the_configuration_alone_is_read(shards: Path, tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return tiny_start()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    run_file = str(write_run(tmp_path, shards, "continue_images", "backbone.from_pretrained=someone/model"))
    assert places(run_file) == []
    assert set(asked) == {"*.json"}


def test_a_frozen_clip_is_checked_before_its_text_encoder_is_trained(shards: Path, tmp_path: Path) -> None:
    start = write_model("clip", tmp_path / "clip")
    frozen = ["backbone.preset=null", "backbone.config={}", f"backbone.from_pretrained={start}"]
    frozen += ["backbone.freeze=[all]", "data.augment.mean=[0.5,0.5,0.5]", "data.augment.std=[0.5,0.5,0.5]"]
    run_file = str(write_run(tmp_path, shards, "clip", *frozen))
    for pool, count in (("mean_pool", 1), ("class_token", 0)):
        done = CliRunner().invoke(app, ["check", run_file, f"recipe.decoders.pool.kind={pool}", "--json"])
        assert done.exit_code == 0, done.output
        assert len([text for text in json.loads(done.stdout)["warnings"] if "zero_shot" in text]) == count
    config = json.loads((start / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # then transformers reads the token with the highest id, a letter
    (start / "config.json").write_text(json.dumps(config))
    text = [f"text.from_pretrained={start}", "text.config={}", f"text.max_tokens={POSITIONS}"]
    text += ["recipe.targets.0.width=40"]
    (place,) = places(run_file, *text)
    assert place.startswith("text.from_pretrained")


def test_the_commands(forks: Forks, tmp_path: Path) -> None:
    command = forks.run
    done = command("check", "m3i", "--json")
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert told["warnings"] == []
    (fault,) = told["errors"]
    assert set(fault) == {"where", "message", "fix"}
    assert fault["where"] == "data.datasets"

    done = command(
        "config", "--resolved", "m3i", "optim.steps=10", "data.datasets.a.path=https://user:pass@host/a/0.tar"
    )
    assert done.returncode == 0, done.stderr
    assert "pass" not in done.stdout
    path = tmp_path / "shown.yaml"
    path.write_text(done.stdout)
    shown, run = load_run(str(path)), load_run("m3i", ["optim.steps=10"])
    assert shown.optim == run.optim
    assert shown.recipe == run.recipe
    assert set(yaml.safe_load(done.stdout)) == set(type(run).model_fields)

    again = command("config", "--resolved", str(path), "--json")
    assert json.loads(again.stdout) == yaml.safe_load(done.stdout)


def test_what_a_start_refuses_of_checkpoints_and_packages_is_told_too(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = str(write_run(tmp_path, shards, "mae"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    mistakes = {"checkpoint.resume=/no/such": "/no/such", "log.wandb=offline": "log.wandb"}
    assert sorted(places(run_file, *mistakes)) == sorted(mistakes.values())
    assert places(run_file, "data.changed_datasets=[shapes]") == ["data.changed_datasets"]
    torn = tmp_path / "out" / "checkpoints" / "step-00000002"
    torn.mkdir(parents=True)
    assert "step-00000002" in "".join(places(run_file))  # none of its checkpoints is good
    assert places(run_file, "checkpoint.resume=never") == [str(torn.parent)]
    assert places(run_file, f"output_dir={tmp_path / 'new'}") == []


def test_an_override_without_a_value_hides_no_other_error(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "mae"))
    assert places(run_file, "optim.lr=", "optim.stepz=9") == ["override optim.lr=", "override optim.stepz=9"]


@pytest.mark.parametrize(
    ("more", "known", "batch"),
    [
        ([], "`m3i-scale plan`", "4 per device × 2 (accumulation × devices)"),
        (["--ranks", "2", "hardware.peak_tflops=2"], "at least", "4 per device × 1 accumulation × 2 devices"),
    ],
)
def test_a_check_ends_with_a_summary_of_what_is_known(
    shards: Path, tmp_path: Path, more: list[str], known: str, batch: str
) -> None:
    run_file = str(write_run(tmp_path, shards, "mae"))
    done = CliRunner().invoke(app, ["check", run_file, *more])
    *summary, last = done.stdout.splitlines()
    assert last.startswith("OK")
    assert len(summary) <= 8
    text = "\n".join(summary)
    images = read_sample_count(str(shards / "train"), "samples")
    for part in (known, batch, f"{images} images in 1 dataset", "recipe mae", "32 px", "ZeRO-3", str(tmp_path / "out")):
        assert part in text


def test_the_time_of_a_run_is_that_of_its_remaining_steps(shards: Path, tmp_path: Path) -> None:
    stages = "stages=[{steps: 4}, {steps: 4, image_size: 64}]"
    resolved = resolve_run(load_run(str(write_run(tmp_path, shards, "mae", stages))), 1)
    work = Work({"model": 8e12, "text": 2e12}, 16, Peak(1.0, "given"))
    second = step_flop(resolved.run.in_stage(1), {}, None)
    both = [resolved.in_stage(0), resolved.in_stage(1)]
    assert f"at least {duration_text((6e12 * 3 + 4 * second['model']) / 2e12)} " in time_line(both, work, 1, 2)
    assert f"at least {duration_text(second['model'] / 1e12)} " in time_line(both, work, 7, 1)
