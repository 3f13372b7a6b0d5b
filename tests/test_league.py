"""The league: configs of all methods, and the way from metrics of a training to the table."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from m3i_scale.config import RunConfig, parse_section
from m3i_scale.errors import UserError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.report.run_files import read_run
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def data(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "manifest.json").write_text(json.dumps({"split": split}))
    return tmp_path / "data"


def invoke(*arguments):
    import league

    app = Typer()
    app.command()(league.main)
    return CliRunner().invoke(app, [*map(str, arguments)])


def run_of(name, data, *, small, epochs):
    from _league import LeagueRun, Size

    return LeagueRun(name, 0, data.parent / "runs", data, "0", Size(small, epochs), 4)


def test_every_protocol_belongs_to_a_published_result():
    from _league import METHODS, PROTOCOLS

    assert {path.stem for path in PROTOCOLS.glob("*.yaml")} == METHODS.keys()
    assert len(METHODS) == 12


@pytest.mark.parametrize("small", [False, True])
def test_every_protocol_is_a_valid_run(data, small):
    from _league import METHODS

    for name in METHODS:
        values = run_of(name, data, small=small, epochs=100).values(data.parent)
        run = parse_section(RunConfig, values, where=name)
        recipe = parse_recipe(run.recipe)
        assert recipe.targets
        epoch = 9469 // run.optim.batch_size
        assert (run.optim.steps, run.optim.warmup_steps) == (100 * epoch, epoch)
        assert run.evaluation.online.every_steps == 25 * epoch


def test_a_result_is_the_last_and_the_best_evaluation(data, tmp_path, monkeypatch):
    import _trainings

    def train(arguments, log, environment):
        if "simclr" in str(log):
            raise UserError("out of memory")
        folder = log.parent / "run"
        folder.mkdir()
        records = [
            {"kind": "evaluation", "step": step, "time": f"2026-01-01T00:00:0{step}+00:00"}
            | {
                f"evaluation/{encoder}/{metric}": value
                for encoder in ("student", "ema")
                for metric in ("linear", "rankme")
            }
            | {"evaluation/student/knn": value, "evaluation/ema/knn": value + 0.1}
            for step, value in ((0, 0.9), (1, 0.2), (2, 0.5), (3, 0.4))  # the initial weights do not count
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))

    monkeypatch.setattr(_trainings, "tool", train)
    options = [
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--small",
        "--only",
        "mae",
        "--only",
        "byol",
        "--only",
        "mae",
    ]
    done = invoke(*options, "--markdown", tmp_path / "table.md")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["mae"]["knn"], document["mae"]["best_knn"]) == (0.4, 0.5)
    assert document["byol"]["knn"] == pytest.approx(0.5)  # of the EMA teacher, as published
    assert document["byol"]["published"] == {"knn": 56.0, "linear": 63.9}
    assert document["not_run"] == []
    assert "| mae | 50.0 (40.0) | – | 50.0 (40.0) | – |" in (tmp_path / "table.md").read_text()
    curve = read_run(tmp_path / "out" / "curves-small-10-epochs" / "mae")
    assert [line["step"] for line in curve.evaluations] == [0, 1, 2, 3]

    failed = invoke(*options, "--only", "simclr")
    assert failed.exit_code == 1
    document = json.loads(failed.stdout)
    assert "out of memory" in document["failed"]["simclr"]
    assert document["mae"]["best_knn"] == 0.5  # a failure stops no other training

    monkeypatch.setattr("league.time", SimpleNamespace(monotonic=iter([0.0, *[100.0] * 10]).__next__))
    late = invoke(*options, "--only", "simclr", "--hours", "0.01")
    document = json.loads(late.stdout)
    assert (document["not_run"], document["failed"]) == (["simclr"], {})  # no time is left; the others are finished
    assert document["mae"]["best_knn"] == 0.5


def test_published_results_are_in_the_table_of_the_same_size_only():
    from _league import Size
    from league import table

    row = {"best_knn": 0.5, "knn": 0.4, "best_linear": 0.6, "linear": 0.6, "published": {"knn": 72.1, "linear": 84.1}}
    assert "| mae | 50.0 (40.0) | 72.1 | 60.0 (60.0) | 84.1 |" in table({"mae": row}, Size(False, 200))
    assert "72.1" not in table({"mae": row}, Size(False, 100))


def test_small_images_are_an_error_of_full_size_trainings(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    Image.new("RGB", (300, 200)).save(tmp_path / "a.jpg")
    with tarfile.open(data / "train" / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
    result = invoke("--output", tmp_path / "out", "--data", data)
    assert result.exit_code == 2
    assert "images must have at least 224 pixels, got 200" in result.output


def test_a_result_depends_on_the_protocol_and_not_on_bytecode(data, tmp_path, monkeypatch):
    import _trainings

    for name in ("_trainings.py", "_league.py"):
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / "benchmarks" / name).write_text("")
    for name in ("m3i_scale", "ds_configs", "recipes", "protocols/imagenette"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(_trainings, "ROOT", tmp_path)
    run = run_of("mae", data, small=True, epochs=1)
    key = run.key()
    (tmp_path / "m3i_scale" / "a.pyc").write_text("bytecode")
    assert run.key() == key
    (tmp_path / "protocols" / "imagenette" / "mae.yaml").write_text("name: other")
    assert run.key() != key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "mea"], "did you mean 'mae'"),
        ([], "--data is required"),
        (["--data", "DATA"], "full-size trainings take days"),
        (["--data", "DATA/train", "--small"], "no shards of 'train'"),
        (["--dry-run", "--markdown", "a.md"], "--dry-run has no results"),
    ],
)
def test_options_that_cannot_work(data, tmp_path, options, message):
    options = [option.replace("DATA", str(data)) for option in options]
    result = invoke("--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.bench
def test_a_small_training_end_to_end(tmp_path):
    records = []
    for number in range(120):
        pixels = np.random.default_rng(number).integers(0, 100, (64, 64, 3), np.uint8)
        pixels[:, :, number % 3] += 120
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        split = "val" if number % 4 == 0 else "train"
        records.append(Record(f"s{number}", tmp_path / f"{number}.png", label=number % 3, split=split))
    make_shards(ListedInput(records, ["red", "green", "blue"]), tmp_path / "s", name="s", options=ShardOptions())
    command = [sys.executable, str(BENCHMARKS / "league.py"), "--data", str(tmp_path / "s"), "--small", "--json"]
    command += ["--epochs", "1", "--only", "mae", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["mae"]
    assert row["steps"] == row["curve"][-1]["step"] == 73
    assert 0 <= row["knn"] <= row["best_knn"] <= 1


@pytest.mark.bench
def test_a_dry_run_plans_every_method(tmp_path):
    done = invoke("--dry-run", "--output", tmp_path / "out")
    document = json.loads(done.stdout)
    assert document["hours"] == pytest.approx(sum(row["hours"] for row in document.values() if "published" in str(row)))
    assert 0.05 < document["mae"]["hours"] < document["dino"]["hours"] < 5
