"""Training that goes on from weights, by the command line: rates by layer, the start as a teacher, resumes, export."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from forked import Forks
from safetensors.torch import load_file, save_file
from shapes import metrics, write_run
from tiny import tiny_start

from m3i_scale.checkpoint.manifest import verify
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.config import load_run
from m3i_scale.config.optim import learning_rate

pytestmark = pytest.mark.slow

RECIPES = ("continue_images", "continue_m3i", "continue_siglip")
STEPS = 3


class Continued:
    """Runs of each recipe that began with weights of their own, and how they ended."""

    def __init__(self, root: Path, shards: Path, forks: Forks) -> None:
        self.forks, self.starts = forks, {name: root / name / "start" for name in RECIPES}
        self.files, self.ends = {}, {}
        for name in RECIPES:
            shutil.copytree(tiny_start(), self.starts[name])
            given = [f"backbone.from_pretrained={self.starts[name]}", f"optim.steps={STEPS}", "optim.layer_decay=0.5"]
            self.files[name] = write_run(root / name, shards, name, *given)
            self.ends[name] = self.call("train", name)

    def call(self, command: str, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.forks.run(command, str(self.files[name]), *overrides)

    def newest(self, name: str) -> Path:
        return max((self.files[name].parent / "out" / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory, shards: Path, forks: Forks) -> Continued:
    return Continued(tmp_path_factory.mktemp("continued"), shards, forks)


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_each_layer_at_its_own_rate(continued: Continued, name: str) -> None:
    assert continued.ends[name].returncode == 0, continued.ends[name].stderr
    records = metrics(continued.files[name])
    assert sorted(records) == [1, 2, 3]
    optim = load_run(str(continued.files[name])).optim
    for step, record in records.items():
        assert record["lr"] == pytest.approx(learning_rate(step - 1, optim))
        assert record["lr_lowest"] == pytest.approx(record["lr"] * 0.5**3)  # embeddings, below two layers and a norm
        assert all(value not in ("nan", "inf", "-inf") for value in record.values())


def test_an_anchor_begins_to_pull_when_the_backbone_moves(continued: Continued) -> None:
    """The input of this recipe shows the whole view."""
    records = metrics(continued.files["continue_siglip"])
    assert records[1]["grad_norm/anchor"] < records[3]["grad_norm/anchor"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_holds_no_teacher(continued: Continued, name: str) -> None:
    saved = SavedTensors(continued.newest(name))
    names = {key for kind in saved.kinds() for key in saved.names(kind)}
    assert any(key.startswith("student.") for key in names)
    assert not [key for key in names if key.startswith("teachers.")]
    assert verify(continued.newest(name)) == []


def test_what_is_planned_and_checked_holds_the_start(continued: Continued) -> None:
    checked = continued.call("check", "continue_siglip")
    assert checked.returncode == 0, checked.stderr
    refused = continued.call("check", "continue_siglip", "backbone.from_pretrained=null")
    assert refused.returncode == 2
    assert "recipe.teachers.start.from_pretrained: student" in refused.stderr
    planned = continued.call("plan", "continue_siglip", "--ranks-per-node", "1", "--json")
    assert planned.returncode == 0, planned.stderr
    parameters = json.loads(planned.stdout)["parameters"]
    assert parameters["teacher"] == sum(value.numel() for value in load_file(_weights(tiny_start())).values())


def test_a_run_goes_on_with_other_rates_and_from_a_start_that_has_moved(continued: Continued, tmp_path: Path) -> None:
    name = "continue_images"
    shutil.copytree(continued.files[name].parent, tmp_path / "run")  # others read the run as it ended
    file = tmp_path / "run" / continued.files[name].name
    shutil.move(continued.starts[name], tmp_path / "moved")
    moved = [f"backbone.from_pretrained={tmp_path / 'moved'}", f"output_dir={tmp_path / 'run' / 'out'}"]
    more = continued.forks.run("train", str(file), *moved, "optim.steps=5", "optim.layer_decay=0.25")
    assert more.returncode == 0, more.stderr
    assert "layer_decay" in more.stdout + more.stderr
    records = metrics(file)
    assert sorted(records) == [1, 2, 3, 4, 5]
    assert records[4]["lr_lowest"] == pytest.approx(records[4]["lr"] * 0.25**3)
    even = continued.forks.run("train", str(file), *moved, "optim.steps=6", "optim.layer_decay=1")
    assert even.returncode == 0, even.stderr
    assert "lr_lowest" not in metrics(file)[6]


def test_a_run_does_not_go_on_beside_another_start(continued: Continued, tmp_path: Path) -> None:
    shutil.copytree(tiny_start(), tmp_path / "other")
    path = _weights(tmp_path / "other")
    save_file({key: value + 0.1 for key, value in load_file(path).items()}, path)
    other = f"backbone.from_pretrained={tmp_path / 'other'}"
    refused = continued.call("train", "continue_m3i", other, "optim.steps=5")
    assert refused.returncode == 2
    assert "teachers_sha256.start was" in refused.stderr


def test_an_export_names_no_folder_and_needs_no_teacher(continued: Continued, shards: Path, tmp_path: Path) -> None:
    name = "continue_siglip"
    away = continued.starts[name].rename(tmp_path / "away")
    out = continued.forks.run("export", str(continued.files[name].parent / "out"), "--output", str(tmp_path / "export"))
    away.rename(continued.starts[name])
    assert out.returncode == 0, out.stderr
    text = (tmp_path / "export" / "heads" / "objective.json").read_text()
    assert json.loads(text)["run"]["recipe"]["teachers"] == {"start": {"from_pretrained": "student"}}
    assert str(continued.starts[name]) not in text
    data = ["--data", str(shards / "val"), "--measure", "retrieval", "--json"]
    measured = continued.forks.run("evaluate", str(tmp_path / "export"), *data)
    assert measured.returncode == 0, measured.stderr


def _weights(folder: Path | str) -> Path:
    return Path(folder) / "model.safetensors"
