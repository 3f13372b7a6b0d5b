"""The league: configs of all methods, and the way from metrics of a training to the table."""

import json
import sys
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from m3i_scale.config import RunConfig, parse_section
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.report.run_files import read_run

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
            for step, value in ((1, 0.2), (2, 0.5), (3, 0.4))
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))

    monkeypatch.setattr(_trainings, "tool", train)
    options = ["--data", data, "--output", tmp_path / "out", "--small", "--only", "mae", "--only", "byol"]
    done = invoke(*options, "--markdown", tmp_path / "table.md")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["mae"]["knn"], document["mae"]["best_knn"]) == (0.4, 0.5)
    assert document["byol"]["knn"] == pytest.approx(0.5)  # of the EMA teacher, as published
    assert document["byol"]["published"] == {"knn": 56.0, "linear": 63.9}
    assert document["not_run"] == []
    assert "| mae | 50.0 (40.0) | 72.1 | 50.0 (40.0) | 84.1 |" in (tmp_path / "table.md").read_text()
    curve = read_run(tmp_path / "out" / "curves" / "mae")
    assert [line["step"] for line in curve.evaluations] == [1, 2, 3]

    monkeypatch.setattr("time.monotonic", iter([0.0, *[100.0] * 10]).__next__)
    again = invoke(*options, "--only", "simclr", "--hours", "0.01")
    document = json.loads(again.stdout)
    assert document["not_run"] == ["simclr"]  # no time is left; the others are finished
    assert document["mae"]["best_knn"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "mea"], "did you mean 'mae'"),
        ([], "--data is required"),
        (["--data", "DATA"], "full-size trainings take days"),
        (["--data", "DATA/train", "--small"], "no shards of 'train'"),
    ],
)
def test_options_that_cannot_work(data, tmp_path, options, message):
    options = [option.replace("DATA", str(data)) for option in options]
    result = invoke("--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.bench
def test_a_dry_run_plans_every_method(tmp_path):
    done = invoke("--dry-run", "--output", tmp_path / "out")
    document = json.loads(done.stdout)
    assert document["hours"] == pytest.approx(sum(row["hours"] for row in document.values() if "published" in str(row)))
    assert 0.05 < document["mae"]["hours"] < document["dino"]["hours"] < 5
