"""What every rank would refuse is told where the run is launched."""

import json
from types import SimpleNamespace

import pytest
from launch_case import a_job
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.launch.job import devices_here
from m3i_scale.launch_command import LAUNCHERS

DATA = "data.datasets.main.path=/data/train"


def launch(*words):
    return CliRunner().invoke(app, ["launch", "clip", "--with", "slurm", "--nodes", "1", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ranks-per-node", "2"], "the run has no data"),
        (["--ranks-per-node", "3", DATA], "3 ranks"),
        (["--ranks-per-node", "2", DATA, "data.streams=7"], "7 streams"),
        (["--ranks-per-node", "2", "data.datasets.main.path=https://me:plutonium@h/a.tar"], "contains a user name"),
    ],
)
def test_it_is_refused_and_a_dry_run_says_so(words, told, tmp_path):
    out = f"output_dir={tmp_path / 'run'}"
    done = launch(*words, out)
    assert done.exit_code != 0
    assert told in str(done.exception)
    assert not (tmp_path / "run").exists()
    dry = launch(*words, out, "--dry-run")
    assert dry.exit_code == EXIT_USER_ERROR
    assert f"the run would not start: {str(done.exception).splitlines()[0]}" in dry.stderr
    assert "sbatch" in dry.stdout
    assert "plutonium" not in dry.output + str(done.exception)


def test_a_run_that_fits_says_nothing(tmp_path):
    dry = launch("--ranks-per-node", "2", DATA, f"output_dir={tmp_path}", "--dry-run", "--json")
    assert (dry.exit_code, dry.stderr) == (0, "")
    assert json.loads(dry.stdout)["launcher"] == "slurm"


def test_json_without_a_dry_run_starts_nothing(tmp_path):
    done = launch("--ranks-per-node", "2", DATA, f"output_dir={tmp_path / 'run'}", "--json")
    assert "--json has no effect without --dry-run" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_variables_as_a_mapping_are_refused_without_their_values(tmp_path):
    (tmp_path / "cluster.yaml").write_text("environment:\n  HF_TOKEN: plutonium\n")
    done = launch("--ranks-per-node", "2", "--cluster", str(tmp_path / "cluster.yaml"), "--dry-run", DATA)
    assert "a list of NAME" in str(done.exception)
    assert "plutonium" not in str(done.exception)


def test_pods_without_the_shards_are_refused(tmp_path):
    words = ["launch", "clip", "--with", "kubeflow", "--ranks-per-node", "1", "--container-image", "a:1", "--dry-run"]
    words += [DATA, "output_dir=/output/x"]
    refused = CliRunner().invoke(app, words)
    assert "nothing is mounted" in str(refused.exception)
    assert CliRunner().invoke(app, [*words, "--data-claim", "shards"]).exit_code == 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_shows_a_plan_of_a_built_in_run_alone(launcher):
    devices_here()  # DeepSpeed's first words, which the command line keeps from its document
    image = ["--container-image", "a:1"] if launcher == "kubeflow" else []
    done = CliRunner().invoke(app, ["launch", "m3i", "--with", launcher, *image, "--dry-run", "--json"])
    assert done.exit_code == EXIT_USER_ERROR
    plan = json.loads(done.stdout)
    assert plan["launcher"] == launcher
    assert plan["commands"]
    assert "the run has no data" in done.stderr


def test_a_launch_into_pods_wants_an_image(tmp_path):
    words = ["launch", "clip", "--with", "kubeflow", "--ranks-per-node", "1", "output_dir=/output/x"]
    done = CliRunner().invoke(app, [*words, "data.datasets.main.path=s3://bucket/train"])
    assert "container image" in str(done.exception)


@pytest.mark.parametrize(("name", "count", "ranks"), [("cpu", 2, 1), ("cuda", 4, 4), ("cuda", 0, 1)])
def test_without_a_number_a_machine_has_as_many_ranks_as_accelerators(name, count, ranks, monkeypatch):
    accelerator = SimpleNamespace(device_name=lambda: name, device_count=lambda: count)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    devices_here.cache_clear()
    try:
        assert a_job().ranks_per_node == ranks
    finally:
        devices_here.cache_clear()
