"""Secrets travel only by name, stand on no command line, and are shown to nobody."""

import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_case import FIELDS, a_job
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import ConfigError
from m3i_scale.launch.description import Variable, hidden, travelling, without_secret_variables
from m3i_scale.launch.execute import write_files
from m3i_scale.launch_command import LAUNCHERS, render
from m3i_scale.text import HIDDEN

VALUE = "hf_it's $plutonium"


def test_a_secret_that_was_not_named_does_not_reach_the_launcher():
    here = {"HF_TOKEN": "a", "MLFLOW_TRACKING_TOKEN": "b", "HOME": "/home/me"}
    assert without_secret_variables(here, ()) == {"HOME": "/home/me"}
    assert without_secret_variables(here, (Variable("HF_TOKEN", "a", True),)) == {"HF_TOKEN": "a", "HOME": "/home/me"}


def test_what_is_to_travel_must_be_there():
    with pytest.raises(ConfigError) as caught:
        travelling(["HF_TOKEN"], {}, interface=None)
    assert caught.value.where == "environment: HF_TOKEN"


@given(st.text())
def test_what_is_shown_of_a_secret_does_not_depend_on_it(value):
    assert hidden([Variable("X_KEY", value, True)]) == (Variable("X_KEY", HIDDEN, True),)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_secret_stands_on_no_command_line_and_only_in_private_files(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    plan = render(launcher, a_job(output_dir=str(tmp_path), environment=("HF_TOKEN", "A=b"), **FIELDS[launcher]))
    write_files(plan)
    for command in plan.commands:
        assert not any("plutonium" in word for word in command.argv)
    for file in plan.files:
        mode = stat.S_IMODE((plan.folder / file.name).stat().st_mode)
        assert mode == file.mode
        assert "plutonium" not in file.text or mode == 0o600
    carried = any("plutonium" in file.text for file in plan.files)
    carried |= any(VALUE in command.environment.values() for command in plan.commands)
    # sbatch takes it from the environment, by its name.
    carried |= any("HF_TOKEN" in line for file in plan.files for line in file.text.splitlines() if "--export" in line)
    assert carried


ADDRESSES = (
    "https://me:plutonium@data.example.org/a.tar",
    "https://data.example.org/b.tar?X-Amz-Signature=plutonium",
)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_logins_and_signatures_in_addresses_are_shown_to_nobody(launcher, address, tmp_path):
    shards = f"data.datasets.main.path={address}"
    job = a_job(shards, output_dir=str(tmp_path), **FIELDS[launcher])
    plan = render(launcher, job)
    told = [file.text for file in plan.files if "plutonium" in file.text]
    assert told or any("plutonium" in str(command) for command in plan.commands)  # ranks do get it
    assert all(file.mode in (0o600, 0o700) for file in plan.files if "plutonium" in file.text)
    shown = render(launcher, job.without_secrets())
    assert "plutonium" not in shown.text()
    assert "plutonium" not in json.dumps(shown.document())
    assert [(file.name, file.mode) for file in shown.files] == [(file.name, file.mode) for file in plan.files]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_files_without_secrets_can_be_read_by_all(launcher, tmp_path):
    plan = render(
        launcher, a_job("data.datasets.main.path=/shards/train", output_dir=str(tmp_path), **FIELDS[launcher])
    )
    assert all(file.mode in (0o644, 0o755) for file in plan.files)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_shows_no_secret_and_is_the_same_every_time(launcher, as_json, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    cluster = tmp_path / "cluster.yaml"
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in FIELDS[launcher].items()}
    cluster.write_text(json.dumps(fields))
    output = tmp_path / "run"
    words = ["launch", "m3i", "--with", launcher, "--cluster", str(cluster), "--env", "HF_TOKEN", "--dry-run"]
    words += [*(["--json"] if as_json else []), "data.datasets.main.path=/shards/train", f"output_dir={output}"]
    first, second = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert "plutonium" not in first.stdout
    assert "m3i_scale" in first.stdout
    assert not output.exists()
    if as_json:
        assert json.loads(first.stdout)["launcher"] == launcher
