"""`finetune classification`: from an export and a folder of images to a classifier and a figure, in one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forks
from launch import environment
from safetensors.torch import load_file
from shapes import COLORS, SHAPES, draw
from transformers import ViTConfig, ViTModel, pipeline
from transformers.utils import import_utils

from m3i_scale.config import load_run
from m3i_scale.errors import CheckpointError, ConfigError, DataError
from m3i_scale.files import read_json, sha256_of
from m3i_scale.run.resume import check_resume
from m3i_scale.tasks.finetune import FineTuning, prepare, random_start, resolve_finetuning
from m3i_scale.tasks.labelled import Labelled, find_labelled

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TRAIN, VAL = 8, 4
STEPS = 6  # two epochs of 24 images in batches of 8


def export(folder: Path, eps: float = 1e-6) -> Path:
    config = ViTConfig(**SIZES, image_size=32, patch_size=8, layer_norm_eps=eps)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def images(root: Path, counts: dict[str, int]) -> Path:
    """`root/SPLIT/CLASS/NUMBER.png`, other images in every split; split "" is none."""
    for first, (split, count) in enumerate(counts.items()):
        for shape in SHAPES:
            folder = root / split / shape
            folder.mkdir(parents=True)
            for number in range(count):
                draw(shape, list(COLORS)[number % 4], 40 * first + number).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("start") / "export")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images", {"train": TRAIN, "val": VAL})


def command(start: Path, data: Path, output: Path, *more: str) -> list[str]:
    fields = [f"output_dir={output}", "optim.batch_size=8", "optim.micro_batch_size=4", "deepspeed=zero1_cpu_fp32"]
    fields += ["checkpoint.every_steps=4", "log.every_steps=1", "log.progress=false", "data.streams=4"]
    options = ["--data", str(data), "--epochs", "2", "--json"]
    return ["finetune", "classification", str(start), *options, *fields, *more]


def test_a_dry_run_tells_all_and_starts_nothing(start: Path, data: Path, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    fields = ["--protocol", "in1k_finetune_b", "--dry-run", "backbone.config.image_size=32"]
    done = forks.run(*command(start, data, output, *fields), env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["protocol"], told["steps"], told["classes"]) == ("in1k_finetune_b", STEPS, len(SHAPES))
    assert told["export_task"] == "classification"
    assert "images of 32" in told["model"]
    assert told["published"]["number"] == 83.664
    stated = load_run("in1k_finetune_b").protocol
    assert stated is not None
    added = told["deviations"][len(stated.deviations) :]
    assert told["deviations"] == [*stated.deviations, *added]
    ours = ("optim.batch_size", "optim.micro_batch_size", "backbone.config.image_size", "epochs", "deepspeed")
    assert sorted(text.split()[0] for text in added) == sorted(ours)
    assert told["memory_gib"] > 0
    assert told["gpu_hours"] > 0
    assert not output.exists()
    assert "warning: optim.lr" in done.stderr  # it is that of another batch size
    plain = [item for item in command(start, data, output, *fields, "optim.lr=1e-3") if item != "--json"]
    text = forks.run(*plain, env=environment())
    assert "warning" not in text.stderr
    assert "83.664" in text.stdout
    assert "deviation" in text.stdout


@pytest.fixture(scope="module")
def trained(start: Path, data: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("trained") / "out"
    done = forks.run(*command(start, data, output), env=environment())
    assert done.returncode == 0, done.stderr
    assert "packing" in done.stderr
    assert "UNEXPECTED" not in done.stderr  # of the head that was just exported
    assert "backend is not available" not in done.stderr
    assert "Loading weights" not in done.stderr  # a progress bar of transformers
    return output, json.loads(done.stdout)


def test_the_result_says_what_it_may_be_compared_with(trained: tuple[Path, Any]) -> None:
    output, told = trained
    assert read_json(output / "finetune.json") == told
    assert (told["protocol"], told["published"], told["step"]) == ("finetune", None, STEPS)
    assert told["deviations"]
    assert told["epochs"] == 2
    assert 0 <= told["top_1"] <= 100


def test_the_result_is_a_stock_classifier_with_the_names_of_the_folders(trained: tuple[Path, Any], data: Path) -> None:
    output, told = trained
    assert Path(told["export"]) == output / "classifier"
    answers = pipeline("image-classification", told["export"])(str(data / "val" / "disc" / "00.png"))
    assert {answer["label"] for answer in answers} == set(SHAPES)


def test_the_card_of_the_result_says_the_figure(trained: tuple[Path, Any]) -> None:
    output, told = trained
    folder = output / "classifier"
    card = (folder / "README.md").read_text()
    assert f"| classifier top-1 | {told['top_1'] / 100:.3f} |" in card
    stored = read_json(folder / "export.json")
    assert stored["evaluation"] == read_json(output / "evaluation.json")
    assert stored["files"] == {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "export.json"
    }


def test_a_finished_run_is_measured_again_by_the_same_command(
    trained: tuple[Path, Any], start: Path, data: Path, forks: Forks, tmp_path: Path
) -> None:
    output, told = trained
    again = shutil.copytree(output, tmp_path / "out")
    shutil.rmtree(again / "classifier")
    for name in ("finetune.json", "evaluation.json"):
        (again / name).unlink()
    done = forks.run(*command(start, data, again), env=environment())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["top_1"] == told["top_1"]
    assert result == read_json(again / "finetune.json")
    assert result.keys() == told.keys()
    assert steps_of(again) == steps_of(output)
    other = export(tmp_path / "other export")
    refused = forks.run(*command(other, data, again), env=environment())
    assert refused.returncode == 2
    assert "from_pretrained" in refused.stderr


def steps_of(output: Path) -> list[int]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "train"]


def test_the_same_command_goes_on_to_the_same_weights(
    trained: tuple[Path, Any], start: Path, data: Path, forks: Forks, tmp_path: Path
) -> None:
    """As after a kill: the last checkpoint and what came after are not there."""
    output, told = trained
    again = tmp_path / "out"
    shutil.copytree(output, again)
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(again / "classifier")
    made = (again / "shards" / "train" / "manifest.json").stat().st_mtime_ns
    done = forks.run(*command(start, data, again), env=environment())
    assert done.returncode == 0, done.stderr
    assert "step-00000004" in done.stderr
    assert (again / "shards" / "train" / "manifest.json").stat().st_mtime_ns == made
    assert steps_of(again) == list(range(1, STEPS + 1))
    assert json.loads(done.stdout)["top_1"] == told["top_1"]
    other = shutil.copytree(start, tmp_path / "other export")
    refused = forks.run(*command(other, data, again), env=environment())
    assert refused.returncode == 2, refused.stderr
    assert "from_pretrained" in refused.stderr
    before, after = (load_file(folder / "classifier" / "model.safetensors") for folder in (output, again))
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())


def test_the_folder_of_another_run_gets_no_shards(
    trained: tuple[Path, Any], data: Path, forks: Forks, tmp_path: Path
) -> None:
    again = shutil.copytree(trained[0], tmp_path / "out")
    shutil.rmtree(again / "shards")
    refused = forks.run(*command(export(tmp_path / "other export"), data, again), env=environment())
    assert refused.returncode == 2, refused.stderr
    assert "from_pretrained" in refused.stderr
    assert not (again / "shards").exists()


# ---------------------------------------------------------------- data


def test_shards_are_read_as_folders_of_images_are(data: Path, tmp_path: Path) -> None:
    found = pack(data, tmp_path / "a")
    assert (found.classes, found.samples) == (sorted(SHAPES), TRAIN * len(SHAPES))
    shards = find_labelled(tmp_path / "a", tmp_path / "unused", tmp_path / "index")
    assert (shards.train, shards.validation, shards.samples) == (found.train, found.validation, found.samples)
    assert shards.evaluated == found.evaluated == VAL * len(SHAPES)


def test_a_saved_data_set_is_made_into_shards_first(tmp_path: Path) -> None:
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        find_labelled(tmp_path / "saved", tmp_path / "unused", tmp_path / "index")
    assert "shards make huggingface" in str(caught.value.fix)


def pack(folder: Path, to: Path) -> Labelled:
    found = find_labelled(folder, to, to.parent / "index")
    found.pack(lambda text: None)
    again = find_labelled(folder, to, to.parent / "index")
    assert again.source is None
    assert (again.train, again.validation) == (found.train, found.validation)
    return found


def test_images_without_splits_are_all_trained_on(tmp_path: Path) -> None:
    found = find_labelled(images(tmp_path / "images", {"": 2}), tmp_path / "shards", tmp_path)
    assert (found.samples, found.validation) == (2 * len(SHAPES), None)


def test_splits_are_known_by_other_names_too_and_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    root = images(tmp_path / "images", {"Training": 2, "Testing": 1})
    (root / "Training" / ".ipynb_checkpoints").mkdir()
    shutil.copy(root / "Training" / "disc" / "00.png", root / "Training" / ".ipynb_checkpoints" / "00-checkpoint.png")
    shutil.copy(root / "Training" / "disc" / "00.png", root / "Training" / "disc" / "._00.png")
    found = find_labelled(root, tmp_path / "shards", tmp_path)
    assert (found.classes, found.samples) == (sorted(SHAPES), 2 * len(SHAPES))
    assert found.validation == tmp_path / "shards" / "testing"


def emptied(root: Path) -> None:
    (root / "train" / "cross").mkdir()


def differing(root: Path) -> None:
    (root / "val" / "disc").rename(root / "val" / "disk")


def loose(root: Path) -> None:
    shutil.copy(root / "train" / "disc" / "00.png", root / "train" / "00.png")


def no_training(root: Path) -> None:
    shutil.rmtree(root / "train")


def linked(root: Path) -> None:
    (root / "train" / "disc").rename(root / "disc")
    (root / "train" / "disc").symlink_to(root / "disc")


def flat(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (emptied, "train"),
        (differing, "val"),
        (loose, "00.png"),
        (no_training, "images"),
        (flat, "images"),
    ],
)
def test_what_is_no_labelled_folder_is_refused(spoil: Any, where: str, tmp_path: Path) -> None:
    root = images(tmp_path / "images", {"train": 1, "val": 1})
    spoil(root)
    with pytest.raises(ConfigError) as caught:
        find_labelled(root, tmp_path / "shards", tmp_path)
    assert str(caught.value.where).endswith(where)
    assert caught.value.fix


def test_folders_of_classes_that_are_links_are_told_as_such(tmp_path: Path) -> None:
    """They are not followed, so that they would count as empty."""
    root = images(tmp_path / "images", {"train": 1})
    linked(root)
    with pytest.raises(ConfigError) as caught:
        find_labelled(root, tmp_path / "shards", tmp_path)
    assert str(caught.value.where).endswith("/images/train")
    assert "links" in caught.value.what


def test_an_image_that_is_missing_is_named_before_anything_is_packed(tmp_path: Path) -> None:
    root = images(tmp_path / "images", {"train": 1})
    (root / "train" / "disc" / "01.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError) as caught:
        find_labelled(root, tmp_path / "shards", tmp_path).pack(lambda text: None)
    assert str(caught.value.where).endswith("01.png")
    assert not list(tmp_path.glob("shards*/train/*.tar"))


def test_shards_of_other_images_are_not_used(tmp_path: Path) -> None:
    root = images(tmp_path / "images", {"train": 2})
    pack(root, tmp_path / "shards")
    (root / "train" / "disc" / "00.png").unlink()
    with pytest.raises(ConfigError) as caught:
        find_labelled(root, tmp_path / "shards", tmp_path)
    assert caught.value.where == str(tmp_path / "shards")


# ---------------------------------------------------------------- before anything is packed


def prepared(start: Path, data: Path, *overrides: str, **given: Any) -> FineTuning:
    options: dict[str, Any] = {"epochs": None, "shards": None, "here": False} | given
    protocol = options.pop("protocol", "finetune")
    return prepare("classification", str(start), data, protocol, list(overrides), **options)


def test_a_warm_up_keeps_its_share_of_the_steps(start: Path, data: Path, tmp_path: Path) -> None:
    output = f"output_dir={tmp_path / 'out'}"
    run = prepared(start, data, output, "optim.batch_size=8", "optim.micro_batch_size=8").run
    assert (run.optim.steps, run.optim.warmup_steps) == (150, 15)  # 50 epochs of 24
    assert run.evaluation.every_steps == 20  # and not 3, an epoch
    given = prepared(start, data, output, "optim.steps=40", "optim.schedule={kind: multi_step, milestones: [30]}").run
    assert (given.optim.steps, given.optim.warmup_steps) == (40, 4)


def test_the_rate_follows_the_width_of_the_backbone_where_the_protocol_says_so(
    start: Path, data: Path, tmp_path: Path
) -> None:
    output, width = f"output_dir={tmp_path / 'out'}", SIZES["hidden_size"]
    fitted = prepared(start, data, output)
    assert fitted.run.optim.lr == pytest.approx(2.5e-4 * 768 / width)
    assert not any("optim.lr" in text for text in fitted.facts()["deviations"])
    given = prepared(start, data, output, "optim.lr=0.01")
    assert given.run.optim.lr == 0.01
    assert any("optim.lr" in text for text in given.facts()["deviations"])
    published = prepared(start, data, output, "backbone.config.image_size=32", protocol="in1k_finetune_b")
    assert published.run.optim.lr == load_run("in1k_finetune_b").optim.lr


def test_a_deviation_about_the_published_epochs_needs_as_many_steps(start: Path, data: Path, tmp_path: Path) -> None:
    fields = [f"output_dir={tmp_path / 'out'}", "backbone.config.image_size=32", "deepspeed=zero1_cpu_fp32"]
    fields += ["optim.batch_size=8", "optim.micro_batch_size=8"]
    published = load_run("in1k_linear_mae")
    assert published.protocol is not None
    for steps in (published.optim.steps, 6):
        facts = prepared(start, data, *fields, f"optim.steps={steps}", protocol="in1k_linear_mae").facts()
        left_out = [text for text in published.protocol.deviations if text not in facts["deviations"]]
        assert ["published 7020" in text for text in left_out] == ([True] if steps == 6 else [])


def test_other_words_about_a_protocol_are_the_same_run(
    trained: tuple[Path, Any], start: Path, data: Path, tmp_path: Path
) -> None:
    output, _ = trained
    fields = [item for item in command(start, data, output) if "=" in item]
    checkpoint = output / "checkpoints" / f"step-{STEPS:08d}"
    text = yaml.safe_load((checkpoint / "run.yaml").read_text())
    text["protocol"]["deviations"] = ["said in another way"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(text))
    again = prepared(start, data, *fields, protocol=str(tmp_path / "again.yaml"), epochs=2)
    check_resume(resolve_finetuning(again.run, again.data, here=False), checkpoint, 1)
    older = shutil.copytree(checkpoint, tmp_path / "older")  # of a version without this field
    meta = json.loads((older / "meta.json").read_text())
    del meta["identity"]["protocol"]["lr_width"]
    (older / "meta.json").write_text(json.dumps(meta))
    check_resume(resolve_finetuning(again.run, again.data, here=False), older, 1)
    text["protocol"]["epochs"] = 51
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(text))
    other = prepared(start, data, *fields, protocol=str(tmp_path / "again.yaml"), epochs=2)
    with pytest.raises(CheckpointError):
        check_resume(resolve_finetuning(other.run, other.data, here=False), checkpoint, 1)


def test_an_evaluation_reads_all_images_for_evaluation_unless_it_is_told_how_many(
    start: Path, data: Path, tmp_path: Path
) -> None:
    fields = [f"output_dir={tmp_path / 'out'}", "optim.batch_size=8", "optim.micro_batch_size=8"]
    assert prepared(start, data, *fields).run.evaluation.batches == 2  # of 12 images
    assert prepared(start, data, *fields, "evaluation.batches=5").run.evaluation.batches == 5


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ([], {"protocol": "in1k_internimage_h"}),
        ([], {"protocol": "supervised"}),
        (["optim.steps=3"], {"epochs": 2}),
        (["optim.micro_batch_size=7"], {}),
        (["backbone.from_pretrained=OTHER"], {}),
        (["data.datasets={x: {path: /data/x}}"], {}),
        (["protocol=null"], {}),
    ],
    ids=["family", "recipe", "epochs", "batch", "export", "data", "protocol"],
)
def test_what_does_not_hold_together_is_refused_before_anything_is_packed(
    fields: list[str], given: dict[str, Any], start: Path, data: Path, tmp_path: Path
) -> None:
    other = str(export(tmp_path / "other"))
    fields = [field.replace("OTHER", other) for field in fields]
    with pytest.raises(ConfigError):
        prepared(start, data, f"output_dir={tmp_path / 'out'}", *fields, **given)
    assert not (tmp_path / "out").exists()


def test_of_a_run_the_newest_good_checkpoint_is_exported_first(
    trained: tuple[Path, Any], data: Path, tmp_path: Path
) -> None:
    run, fields = trained[0], f"output_dir={tmp_path / 'out'}"
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    folder = Path(str(prepared(run, data, fields).run.backbone.from_pretrained))
    assert folder == tmp_path / "out" / "start" / checkpoint.name
    stored = read_json(folder / "export.json")
    assert stored["checkpoint_manifest_sha256"] == sha256_of(checkpoint / "manifest.json")
    assert (stored["task"], stored["weights"]) == ("features", "student")
    made = (folder / "export.json").stat().st_mtime_ns
    assert prepared(checkpoint, data, fields).run.backbone.from_pretrained == str(folder)
    assert (folder / "export.json").stat().st_mtime_ns == made  # it is exported once


@pytest.mark.slow
def test_random_weights_of_the_same_architecture_are_trained_by_the_same_command(
    start: Path, data: Path, forks: Forks, tmp_path: Path
) -> None:
    random = command(start, data, tmp_path / "out", "--random-weights")
    done = forks.run(*random, env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["protocol"], told["step"]) == ("finetune", STEPS)
    assert any(str(start) in text and "random weights" in text for text in told["deviations"])
    (drawn,) = (tmp_path / "out" / "start").iterdir()
    assert told["backbone"] == str(drawn)
    has, weights = (ViTModel.from_pretrained(path, add_pooling_layer=False).state_dict() for path in (drawn, start))
    assert {name: value.shape for name, value in has.items()} == {name: value.shape for name, value in weights.items()}
    matrices = [name for name, value in has.items() if value.dim() == 2]
    assert matrices
    assert not any(torch.equal(has[name], weights[name]) for name in matrices)
    again = forks.run(*random, env=environment())
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["top_1"] == told["top_1"]
    mixed = forks.run(*command(start, data, tmp_path / "out"), env=environment())
    assert mixed.returncode == 2  # the run there started from other weights


def test_random_weights_follow_the_seed(start: Path, tmp_path: Path) -> None:
    folders = [random_start(str(start), tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    one, same, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_without_a_good_checkpoint_is_no_start(trained: tuple[Path, Any], data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    with pytest.raises(CheckpointError) as caught:
        prepared(run, data, f"output_dir={tmp_path / 'out'}")
    assert str(run) in str(caught.value.where)
    assert not (tmp_path / "out").exists()


def test_a_pool_that_no_class_exports_is_refused_where_another_would_do(data: Path, tmp_path: Path) -> None:
    start = export(tmp_path / "export", eps=1e-12)
    with pytest.raises(ConfigError) as caught:
        prepared(start, data, f"output_dir={tmp_path / 'out'}")
    pool = str(caught.value.fix).removeprefix("set ")
    assert prepared(start, data, f"output_dir={tmp_path / 'out'}", pool).export_task == "classification"


def test_without_timm_its_install_is_offered_beside_the_other_pool(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} needs timm"))
    monkeypatch.setattr("m3i_scale.tasks.finetune.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        prepared(start, data, f"output_dir={tmp_path / 'out'}")
    assert ".[timm]" in str(caught.value.fix)
    assert "task.pool=class_token" in str(caught.value.fix)


def test_a_micro_batch_that_the_streams_do_not_share_is_refused_before_anything_is_packed(
    start: Path, data: Path, tmp_path: Path
) -> None:
    fields = ["optim.batch_size=24", "optim.micro_batch_size=12", "data.streams=8"]
    with pytest.raises(ConfigError) as caught:
        prepared(start, data, f"output_dir={tmp_path / 'out'}", *fields)
    assert caught.value.where == "optim.micro_batch_size"
    assert not (tmp_path / "out").exists()


def test_several_ranks_are_told_to_launch(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        prepared(start, data, f"output_dir={tmp_path / 'out'}")
    assert "launch" in str(caught.value.fix)
