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

from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError, DataError, UserError
from m3i_scale.files import read_json
from m3i_scale.run.check import errors_of
from m3i_scale.tasks.packed_folders import RunFolders, pack_folders

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


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]


def test_a_run_on_a_folder_resumes_by_the_same_command_and_from_its_written_config(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "disc" / "damaged.jpg").write_bytes(b"no image")
    run = write_config(tmp_path)
    first = command("train", run)
    assert first.returncode == 0, first.stderr
    shards = tmp_path / "out" / "shards" / "main"
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


def test_launch_packs_before_two_ranks_start(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = write_config(tmp_path, "m3i_no_text", text=False)
    launched = command("launch", run, "--with", "local", "--ranks-per-node", 2, "data.num_workers=0")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert steps_of(tmp_path) == [1, 2]
    assert load_run(str(tmp_path / "out" / "run.yaml")).data.datasets["main"].path.endswith("out/shards/main/train")


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
    assert packed == [f'{KEY}="{tmp_path / "out" / "shards" / "main" / "train"}"']
    monkeypatch.setenv("RANK", "0")
    assert pack_folders(run, None) == packed


def test_images_that_changed_are_packed_again_without_a_checkpoint(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    shards = tmp_path / "out" / "shards" / "main" / "train"

    def samples() -> int:
        return sum(facts["samples"] for facts in read_json(shards / "manifest.json")["shards"].values())

    pack_folders(run, None)
    assert samples() == 24
    draw("bar", "red", 3).save(tmp_path / "photos" / "bar" / "new.png")
    pack_folders(run, None)
    assert samples() == 25
    (tmp_path / "photos" / "bar" / "new.txt").write_text("a caption counts, too")
    assert RunFolders(run, None).unpacked


def test_a_folder_of_other_shards_is_left_as_it_is(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    theirs = tmp_path / "out" / "shards" / "main" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ConfigError):
        pack_folders(run, None)
    assert theirs.read_text() == "mine"


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


def test_an_error_of_the_config_comes_before_the_packing(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    run = str(write_config(tmp_path))
    before = listing(tmp_path)
    with pytest.raises(ConfigError):
        pack_folders(run, ["backbone.config.patch_size=7"])
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
    assert {path.name for path in (tmp_path / "out" / "shards").iterdir() if not path.name.startswith(".")} == {
        "main",
        "validation-main",
    }


@pytest.mark.parametrize("damaged", [True, False])
def test_folders_without_a_usable_image(tmp_path: Path, damaged: bool) -> None:
    (tmp_path / "photos").mkdir()
    if damaged:
        for number in range(8):
            (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"no image")
    run = str(write_config(tmp_path, "mae", text=False))
    if damaged:
        with pytest.raises(DataError, match="none of the 8 images"):
            pack_folders(run, None)
        assert not (tmp_path / "out" / "shards" / "main").exists()
    else:
        assert pack_folders(run, None) == []
        assert any(KEY in str(error.where) for error in errors_of(run))
