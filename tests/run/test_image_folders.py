"""Runs on folders of images: packed once, reused by every start, never exchanged below a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shapes import COLORS, SHAPES, draw
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import load_run
from m3i_scale.errors import CheckpointError, ConfigError, DataError, UserError
from m3i_scale.files import read_json
from m3i_scale.run.check import errors_of
from m3i_scale.run.setup import run_yaml
from m3i_scale.shards.image_folders import holds_shards
from m3i_scale.tasks.packed_folders import RunFolders, pack_folders
from m3i_scale.text import yaml_string

TINY = (
    "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128, image_size: 32, "
    "patch_size: 8}"
)
TEXT = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}"
KEY = "data.datasets.main.path"


def make_photos(root: Path, *, classes: bool = True, captions: int = 6) -> Path:
    """24 images; `captions` of the 8 of every shape have a caption."""
    for shape in SHAPES:
        folder = root / shape if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(8):
            color = list(COLORS)[number % 4]
            draw(shape, color, number).save(folder / f"{shape}{number}.png")
            if number < captions:
                (folder / f"{shape}{number}.txt").write_text(f"a {color} {shape}")
    return root


def write_config(folder: Path, recipe: str = "m3i_mini", text: bool = True) -> Path:
    lines = [
        f"extends: {recipe}",
        f"output_dir: {folder / 'out'}",
        f"backbone: {{preset: vit-mini/16, config: {TINY}}}",
        *([f"text: {{config: {TEXT}, max_tokens: 16}}"] if text else []),
        f"data: {{streams: 4, datasets: {{main: {{path: {folder / 'photos'}}}}}}}",
        "optim: {batch_size: 8, micro_batch_size: 4, steps: 2, warmup_steps: 0}",
        "checkpoint: {every_steps: 2}",
        "log: {every_steps: 1, progress: false}",
        "deepspeed: zero3_cpu_fp32",
    ]
    (folder / "run.yaml").write_text("\n".join(lines))
    return folder / "run.yaml"


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [sys.executable, "-m", "m3i_scale", *map(str, arguments)]
    return subprocess.run(words, env=environment | variables, capture_output=True, text=True, timeout=600, check=False)


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def shards_of(folder: Path, name: str = "main") -> Path:
    """The only folder of packed images of a dataset."""
    (only,) = (folder / "out" / "shards").glob(f"{name}-*")
    return only


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.slow
def test_a_run_on_a_folder_resumes_by_the_same_command_and_from_its_written_config(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "disc" / "damaged.jpg").write_bytes(b"no image")
    run = write_config(tmp_path)
    first = command("train", run)
    assert first.returncode == 0, first.stderr
    shards = shards_of(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    manifest = read_json(shards / "train" / "manifest.json")
    counts = {key: sum(facts[key] for facts in manifest["shards"].values()) for key in ("samples", "with_caption")}
    assert counts == {"samples": 24, "with_caption": 18}
    assert len((shards / "skipped.jsonl").read_text().splitlines()) == 1
    second = command("train", run, "optim.steps=3")
    assert second.returncode == 0, second.stderr
    third = command("train", tmp_path / "out" / "run.yaml", "optim.steps=4")
    assert third.returncode == 0, third.stderr
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")} == made
    # The folder changes: a resumed run does not read the other images, and its packed ones stay.
    draw("bar", "red", 3).save(tmp_path / "photos" / "bar" / "new.png")
    for name in ("check", "train"):
        changed = command(name, run)
        assert changed.returncode == 2
        assert KEY in changed.stderr
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")} == made
    assert not errors_of(str(run), [f"{KEY}={shards / 'train'}", "optim.steps=4"])


@pytest.mark.slow
def test_launch_packs_before_two_ranks_start(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = write_config(tmp_path, "m3i_no_text", text=False)
    launched = command("launch", run, "--with", "local", "--ranks-per-node", 2, "data.num_workers=0")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert steps_of(tmp_path) == [1, 2]
    assert load_run(str(tmp_path / "out" / "run.yaml")).data.datasets["main"].path == str(shards_of(tmp_path) / "train")


def test_launch_packs_into_the_output_directory_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(tmp_path / "photos")
    run = write_config(tmp_path, "m3i_no_text", text=False)
    (tmp_path / "work").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("m3i_scale.launch_command.run_plan", lambda *_: 0)
    words = ["launch", str(run), "--with", "local", "--ranks-per-node", "2", "--workdir", str(tmp_path / "work")]
    assert CliRunner().invoke(app, [*words, "output_dir=out"]).exit_code == 0
    assert (shards_of(tmp_path / "work") / "train").is_dir()
    assert listing(tmp_path / "here") == set()


def test_a_rank_of_a_launcher_packs_nothing_and_reuses_packed_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    before = listing(tmp_path)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="packed") as caught:
        pack_folders(run, None)
    assert "m3i-scale train" in str(caught.value.fix)
    assert listing(tmp_path) == before
    monkeypatch.delenv("RANK")
    packed = pack_folders(run, [])
    assert packed == [f'{KEY}="{shards_of(tmp_path) / "train"}"']
    monkeypatch.setenv("RANK", "0")
    assert pack_folders(run, None) == packed


def samples_in(packed: list[str]) -> int:
    _, _, shards = packed[-1].partition("=")
    manifest = read_json(Path(json.loads(shards)) / "manifest.json")
    return sum(facts["samples"] for facts in manifest["shards"].values())


def test_images_that_changed_are_packed_next_to_the_earlier_shards(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    first = pack_folders(run, None)
    draw("bar", "red", 3).save(tmp_path / "photos" / "bar" / "new.png")
    second = pack_folders(run, None)
    assert (samples_in(first), samples_in(second)) == (24, 25)
    (tmp_path / "photos" / "bar" / "new.txt").write_text("a caption counts, too")
    assert RunFolders(run, None).unpacked
    (tmp_path / "photos" / "bar" / "new.txt").unlink()
    (tmp_path / "photos" / "bar" / "new.png").unlink()
    assert pack_folders(run, None) == first


@pytest.mark.parametrize("theirs", ["file", "link", "folder"])
def test_something_else_at_the_place_of_the_shards_is_left_as_it_is(tmp_path: Path, theirs: str) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    pack_folders(run, None)
    place = shards_of(tmp_path)
    shutil.rmtree(place)
    if theirs == "file":
        place.write_text("mine")
    elif theirs == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        (place / "train").mkdir(parents=True)
    before = listing(tmp_path)
    with pytest.raises(ConfigError) as caught:
        pack_folders(run, None)
    assert caught.value.where == str(place)
    assert listing(tmp_path) == before


def test_a_folder_of_two_datasets_is_packed_once(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    validated = [f"data.validation.check.path={tmp_path}/photos/", "evaluation.every_steps=2"]
    packed = pack_folders(run, validated)
    shards = yaml_string(str(shards_of(tmp_path) / "train"))
    assert packed[1:] == [f"{KEY}={shards}", f"data.validation.check.path={shards}"]
    assert pack_folders(run, validated) == packed
    assert errors_of(run, packed) == []


def resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run with packed images and a checkpoint, as far as packing is concerned."""
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "run.yaml").write_text(run_yaml(load_run(run, pack_folders(run, None))))
    monkeypatch.setattr("m3i_scale.tasks.packed_folders.find_resume", lambda run, contents: (checkpoint, []))
    return run


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_is_not_resumed_on_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    run = resuming(tmp_path, monkeypatch)
    shards = shards_of(tmp_path) / "train"
    if not kept:
        shutil.rmtree(shards.parent)
    draw("bar", "red", 3).save(tmp_path / "photos" / "bar" / "new.png")
    with pytest.raises(CheckpointError) as caught:
        pack_folders(run, None)
    assert (f"{KEY}={shards}" in str(caught.value.fix)) == kept
    (tmp_path / "photos" / "bar" / "new.png").unlink()
    assert pack_folders(run, None) == [f"{KEY}={yaml_string(str(shards))}"]
    assert shards.is_dir()


def test_a_run_resumes_on_its_shards_if_the_images_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resuming(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "photos")
    shards = shards_of(tmp_path) / "train"
    assert pack_folders(run, None) == [f"{KEY}={yaml_string(str(shards))}"]
    warning = f"{KEY}={tmp_path / 'photos'} does not exist: the run resumes on its shards, {shards}"
    assert f"warning: {warning}" in capsys.readouterr().err
    assert RunFolders(run, None).warnings == [warning]
    checked = CliRunner().invoke(app, ["check", run, "--json"])
    assert warning in json.loads(checked.stdout)["warnings"]


def test_too_many_damaged_images_are_an_error(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    for number in range(3):
        (tmp_path / "photos" / "disc" / f"damaged{number}.jpg").write_bytes(b"no image")
    run = str(write_config(tmp_path))
    with pytest.raises(DataError) as caught:
        pack_folders(run, None)
    assert "data.max_corrupt_fraction" in str(caught.value.fix)
    assert samples_in(pack_folders(run, ["data.max_corrupt_fraction=0.2"])) == 24


def test_linked_folders_are_not_left_out(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "disc").rename(tmp_path / "disc")
    (tmp_path / "photos" / "disc").symlink_to(tmp_path / "disc")
    with pytest.raises(ConfigError, match="links"):
        pack_folders(str(write_config(tmp_path)), None)


def test_a_stray_archive_makes_no_shards_of_a_folder_of_images(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "backup").mkdir()
    (tmp_path / "photos" / "backup" / "x.tar").write_bytes(b"")
    assert not holds_shards(tmp_path / "photos")
    (tmp_path / "shards" / "train").mkdir(parents=True)
    (tmp_path / "shards" / "train" / "x.tar").write_bytes(b"")
    assert holds_shards(tmp_path / "shards")


def test_check_reads_a_folder_and_writes_nothing(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", captions=0)
    run = str(write_config(tmp_path))
    before = listing(tmp_path)

    def errors(*overrides: str) -> list[UserError]:
        folders = RunFolders(run, [*overrides])
        return errors_of(run, folders.overrides, 2, folders.facts)

    assert "captions" in errors()[0].what
    shutil.rmtree(tmp_path / "photos")
    make_photos(tmp_path / "photos", captions=8)
    before = listing(tmp_path)
    assert errors() == []
    assert [error.where for error in errors("data.streams=32", "optim.micro_batch_size=32")] != []
    assert listing(tmp_path) == before
    shutil.rmtree(tmp_path / "photos")
    make_photos(tmp_path / "photos", captions=8, classes=False)
    assert "classes" in errors()[0].what
    assert "24 images" in RunFolders(run, None).lines()[0]


def test_check_counts_the_images_of_a_folder(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    checked = CliRunner().invoke(app, ["check", str(write_config(tmp_path)), "optim.steps=30"])
    assert "24 images in 1 dataset, 10 epochs" in checked.stdout
    checked = CliRunner().invoke(app, ["check", str(write_config(tmp_path)), "optim.steps=30000", "--json"])
    assert any("24 images 10,000 times" in warning for warning in json.loads(checked.stdout)["warnings"])


@pytest.mark.parametrize("override", ["optim.lr", "optim.lr=", "optim.betas=[0.9"])
def test_an_invalid_override_hides_no_folder(tmp_path: Path, override: str) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    folders = RunFolders(run, [override])
    (error,) = errors_of(run, folders.overrides, 2, folders.facts)
    assert error.where == f"override {override}"


def test_an_error_of_the_config_comes_before_the_packing(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    before = listing(tmp_path)
    with pytest.raises(ConfigError):
        pack_folders(run, ["backbone.config.patch_size=7"])
    with pytest.raises(ConfigError):
        pack_folders(run, None, 3)  # ranks, which the batch size must be a multiple of
    assert listing(tmp_path) == before


def test_splits_are_not_classes(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos" / "train")
    make_photos(tmp_path / "photos" / "val")
    run = str(write_config(tmp_path))
    with pytest.raises(ConfigError) as caught:
        pack_folders(run, None)
    assert caught.value.fix == f"{KEY}={tmp_path / 'photos' / 'train'}"
    validated = [
        f"{KEY}={tmp_path / 'photos' / 'train'}",
        f"data.validation.main.path={tmp_path / 'photos' / 'val'}",
        "evaluation.every_steps=2",
    ]
    pack_folders(run, validated)
    assert (shards_of(tmp_path) / "train").is_dir()
    assert (shards_of(tmp_path, "validation-main") / "train").is_dir()


@pytest.mark.parametrize("damaged", [True, False])
def test_folders_without_a_usable_image(tmp_path: Path, damaged: bool) -> None:
    (tmp_path / "photos").mkdir()
    if damaged:
        for number in range(8):
            (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"no image")
    run = str(write_config(tmp_path, "mae", text=False))
    if damaged:
        for limit in (0.05, 1):
            with pytest.raises(DataError):
                pack_folders(run, [f"data.max_corrupt_fraction={limit}"])
        assert not any((tmp_path / "out" / "shards").glob("main*"))
    else:
        assert pack_folders(run, None) == []
        assert any(KEY in str(error.where) for error in errors_of(run))
