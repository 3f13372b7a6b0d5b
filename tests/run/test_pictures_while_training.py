"""Pictures while training: they change nothing of the run, and are the same after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from saved_runs import Done, call, make_calls, make_run
from shapes import metrics
from tiny import DINOV2, LABEL_SETS, MAPS, RECIPES, random_batch, tiny_objective

from m3i_scale.checkpoint.load import evaluating
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.pictures.training import TrainingPictures
from m3i_scale.files import read_json

pytestmark = pytest.mark.slow

EVERY = {"views", "dense_pca", "attention", "similarity"}
ON = ("checkpoint.background=false", "log.pictures_every_steps=2", "log.picture_samples=6")


# ------------------------------------------------------------------ what is drawn


class Words:
    """A tokenizer whose words are numbers."""

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


def learnt(recipe: str, *overrides: str, image: int = 32) -> tuple[Any, TrainingPictures]:
    objective = tiny_objective(recipe, *overrides)
    resolved: Any = SimpleNamespace(label_sets=LABEL_SETS, tokenizer=Words())
    batch = random_batch(6, image=image)
    return objective, TrainingPictures(resolved, objective, batch, random_batch(4, seed=1, image=image))


@pytest.mark.parametrize(
    ("recipe", "overrides", "image", "more"),
    [
        ("m3i", (), 32, set()),
        ("m3i", (*MAPS, "backbone.attention=across_images"), 64, set()),
        ("mae", DINOV2, 32, {"reconstruction"}),
        ("novel_view", (), 32, {"reconstruction"}),
        ("supervised", ("backbone.preset=clip-b/16",), 32, set()),
        ("barlow", (), 32, set()),
    ],
)
def test_every_recipe_has_the_pictures_that_it_has_something_for(
    recipe: str, overrides: tuple[str, ...], image: int, more: set[str]
) -> None:
    objective, pictures = learnt(recipe, *overrides, image=image)
    with evaluating(objective):
        drawn = pictures.draw(pictures.encode(torch.device("cpu")))
    assert {picture.name for picture in drawn} == EVERY | more
    assert all(picture.alt and picture.title and min(picture.image.size) > 100 for picture in drawn)
    assert len({picture.name for picture in drawn}) == len(drawn)


def test_features_that_are_not_finite_are_no_pictures() -> None:
    objective, pictures = learnt("m3i")
    with torch.no_grad():
        objective.student.model.layernorm.weight[3] = torch.nan
    with evaluating(objective), pytest.raises(NotMeasuredError, match="NaN"):
        pictures.draw(pictures.encode(torch.device("cpu")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_that_a_module_remembers_changes(recipe: str) -> None:
    objective, pictures = learnt(recipe)
    objective(random_batch(6))[0].backward()  # queues, centers and running statistics are filled
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    generator = torch.get_rng_state()
    with evaluating(objective):
        pictures.draw(pictures.encode(torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), generator)
    after = objective.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
    assert objective.training


# ------------------------------------------------------------------ on two ranks, under ZeRO-3


@pytest.fixture(scope="module")
def runs(shards: Path, foreground: Done, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """`drawn` is the plain run with pictures; `resumed` goes on with it from step 4; `refused` has a file in their
    place."""
    root = tmp_path_factory.mktemp("pictures")
    folders = {name: make_run(root / name, shards) for name in ("drawn", "refused")}
    (folders["refused"] / "out").mkdir()
    (folders["refused"] / "out" / "pictures").write_text("no folder")
    given = [*ON, f"data.validation.shapes.path={shards / 'val'}"]
    done = make_calls({name: call(folders[name], *given, faults=[]) for name in folders}, folders, root / "results")
    assert done["drawn"].codes == [0, 0], done["drawn"].texts
    folders["resumed"] = root / "resumed"
    shutil.copytree(folders["drawn"], folders["resumed"])
    run_file = folders["resumed"] / "run.yaml"
    run_file.write_text(run_file.read_text().replace(str(folders["drawn"]), str(folders["resumed"])))
    shutil.rmtree(folders["resumed"] / "out" / "checkpoints" / "step-00000006")
    again = {"resumed": call(folders["resumed"], *given, faults=[])}
    done |= make_calls(again, folders, root / "again")
    assert done["resumed"].codes == [0, 0], done["resumed"].texts
    return done | {"plain": foreground}


def files(done: Done) -> dict[str, bytes]:
    root = done.folder / "out" / "pictures"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_losses_and_weights_are_those_of_a_run_without_pictures_to_the_bit(runs: dict[str, Done]) -> None:
    plain, drawn = (metrics(runs[name].folder / "run.yaml") for name in ("plain", "drawn"))
    assert plain == drawn
    for which in ("student", "ema"):
        weights = [dict(saved_weights(runs[name].root / "step-00000006", which)) for name in ("plain", "drawn")]
        assert weights[0].keys() == weights[1].keys()
        assert [name for name, value in weights[0].items() if not torch.equal(weights[1][name], value)] == []


def test_pictures_are_there_of_the_first_step_every_so_many_and_the_last(runs: dict[str, Done]) -> None:
    root = runs["drawn"].folder / "out" / "pictures"
    assert [path.name for path in sorted(root.iterdir())] == [f"step-{step:08d}" for step in (0, 2, 4, 6)]
    for folder in root.iterdir():
        told = read_json(folder / "pictures.json")
        assert folder.name == f"step-{told['step']:08d}"
        assert {one["name"] for one in told["pictures"]} == EVERY
        assert {path.name for path in folder.iterdir()} == {"pictures.json", *(one["file"] for one in told["pictures"])}
        for one in told["pictures"]:
            assert (folder / one["file"]).stat().st_size < 300_000
            Image.open(folder / one["file"]).verify()


def test_they_change_with_what_is_learnt_and_not_with_the_samples(runs: dict[str, Done]) -> None:
    drawn = files(runs["drawn"])
    assert drawn["step-00000000/views.jpg"] == drawn["step-00000006/views.jpg"]
    assert drawn["step-00000000/dense_pca.jpg"] != drawn["step-00000006/dense_pca.jpg"]


def test_a_resume_writes_the_same_pictures(runs: dict[str, Done]) -> None:
    assert files(runs["resumed"]) == files(runs["drawn"])


def test_a_folder_that_cannot_be_written_ends_the_run_on_all_ranks(runs: dict[str, Done]) -> None:
    assert runs["refused"].codes == [2, 2]
    assert any("cannot write the pictures" in text for text in runs["refused"].texts)
    told = (runs["refused"].folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert "train" not in {json.loads(line)["kind"] for line in told}
