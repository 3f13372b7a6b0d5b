"""`m3i-scale init`: config files that are valid as written, with sizes that fit the images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from m3i_scale.cli import app
from m3i_scale.config import find_run_file, load_run, run_values
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.run.check import errors_of
from m3i_scale.tasks.init_command import Machine, fitting_sizes
from m3i_scale.tasks.packed_folders import RunFolders


def make_images(
    folder: Path, number: int = 12, *, classes: bool = False, captions: bool = False, side: int = 80
) -> Path:
    for index in range(number):
        place = folder / f"class{index % 3}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side + 20, side), (index * 20, 0, 90)).save(place / f"{index}.png")
        if captions:
            (place / f"{index}.txt").write_text(f"image {index}")
    return folder


def init(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


@pytest.mark.parametrize(
    ("classes", "captions", "recipe"),
    [
        (True, True, "m3i_mini"),
        (True, False, "m3i_no_text"),
        (False, True, "m3i_no_category"),
        (False, False, "sim"),
    ],
)
def test_the_file_is_valid_as_written(tmp_path: Path, classes: bool, captions: bool, recipe: str) -> None:
    photos, file = make_images(tmp_path / "my photos", classes=classes, captions=captions), tmp_path / "run.yaml"
    result = init(photos, "--output", file)
    assert result.exit_code == 0, result.exception
    assert f"m3i-scale train {file}" in result.output
    text = file.read_text()
    assert f"extends: {recipe} " in text
    assert all("#" in line or line.endswith(":") for line in text.splitlines())
    assert errors_of(str(file), None, 1, RunFolders(str(file), None).facts) == []
    run = load_run(str(file))
    assert run.optim.batch_size <= 12
    assert run.backbone.config["image_size"] <= 80
    assert Path(run.data.datasets["main"].path) == photos


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    photos, file = make_images(tmp_path / "photos"), tmp_path / "run.yaml"
    file.write_text("mine")
    assert isinstance(init(photos, "--output", file).exception, ConfigError)
    assert file.read_text() == "mine"
    assert init(photos, "--output", file, "--overwrite", "--recipe", "mae").exit_code == 0
    assert run_values(str(file))["recipe"]["name"] == "mae"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    photos, file = make_images(tmp_path / "photos"), tmp_path / "missing" / "run.yaml"
    error = init(photos, "--output", file).exception
    assert isinstance(error, ConfigError)
    assert error.where == str(file)


@pytest.mark.parametrize("recipe", ["clip", "supervised", "segment", "sym"])
def test_a_recipe_that_does_not_fit_writes_nothing(tmp_path: Path, recipe: str) -> None:
    photos, file = make_images(tmp_path / "photos"), tmp_path / "run.yaml"
    error = init(photos, "--output", file, "--recipe", recipe).exception
    assert isinstance(error, UserError)
    assert error.fix
    assert not file.exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged", "splits", "shards"])
def test_folders_that_are_no_images(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "photos"
    if kind == "splits":
        make_images(folder / "train")
        make_images(folder / "val")
    elif kind != "missing":
        folder.mkdir()
    if kind == "damaged":
        (folder / "a.jpg").write_bytes(b"no image")
    if kind == "shards":
        (folder / "a.tar").write_bytes(b"")
    error = init(folder, "--output", tmp_path / "run.yaml").exception
    assert isinstance(error, UserError)
    assert error.fix
    if kind == "splits":
        assert str(folder / "train") in error.fix
    assert not (tmp_path / "run.yaml").exists()


def test_runs_of_two_folders_do_not_share_an_output_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for folder in ("cats/train", "dogs/train", "cats/train", "2024", "no \U0001f600"):
        photos = make_images(tmp_path / folder)
        assert init(photos, "--output", "run.yaml", "--overwrite").exit_code == 0
        run = load_run("run.yaml")
        assert Path(run.data.datasets["main"].path) == photos
        run.output_dir.mkdir(parents=True)
        names.append(run.name)
    assert names == ["cats-train", "dogs-train", "cats-train-2", "2024", "no"]


@pytest.mark.parametrize("gpus", [2, 3, 6])
def test_the_file_fits_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(Machine, "of_this", staticmethod(lambda: Machine(gpus, "zero3_cpu_fp32")))
    photos, file = make_images(tmp_path / "photos", 40), tmp_path / "run.yaml"
    assert init(photos, "--output", file).exit_code == 0
    assert errors_of(str(file), None, gpus, RunFolders(str(file), None).facts) == []


@pytest.mark.parametrize("images", [2, 7, 40, 1_000, 49_999, 200_000, 5_000_000])
@pytest.mark.parametrize("side", [17, 32, 63, 64, 100, 4_000])
@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 6, 8, 16])
def test_sizes_fit_the_images(images: int, side: int, gpus: int) -> None:
    sizes = fitting_sizes(images, side, gpus)
    assert sizes.batch_size <= images
    assert sizes.image_size <= max(side, 16)
    assert sizes.image_size % sizes.patch_size == 0
    ranks = max(gpus, 1)
    if ranks <= images:
        assert sizes.streams % ranks == 0
        assert sizes.batch_size % (sizes.micro_batch_size * ranks) == 0
        assert sizes.micro_batch_size % (sizes.streams // ranks) == 0
    assert sizes.epochs <= 320 or sizes.steps == 2


def test_a_folder_instead_of_a_config_file_names_init(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_run_file(str(tmp_path))
    assert "m3i-scale init" in str(caught.value.fix)
