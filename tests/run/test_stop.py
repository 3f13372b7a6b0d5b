"""Asking a run to stop: who listens, who does not, and what is no run. That a run obeys is tested in test_resume."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.host.output_dir import launch_lock, launch_of, lock_directory
from m3i_scale.run.hooks import Preemption
from m3i_scale.run.stop import stop


def asked(run: str, *overrides: str) -> dict[str, object]:
    return stop(run, list(overrides), wait=False, tell=print)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(str(tmp_path))
    assert caught.value.where == str(tmp_path)
    with pytest.raises(ConfigError) as caught:
        asked("m3i", f"output_dir={tmp_path / 'none'}")
    assert caught.value.where == str(tmp_path / "none")
    with pytest.raises(ConfigError) as caught:
        asked(str(tmp_path / "nowhere"))
    assert str(caught.value.where).endswith("/nowhere")
    with pytest.raises(ConfigError) as caught:
        asked(str(tmp_path), "seed=1")
    assert caught.value.where == "seed=1"
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_runs_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
    told = CliRunner().invoke(app, ["stop", "m3i", f"output_dir={tmp_path}", "--json"])
    assert told.exit_code == 0
    assert {"status": "idle", "step": 8}.items() <= json.loads(told.stdout).items()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_launch_lock_that_cannot_be_looked_at_is_no_launch(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    lock = tmp_path / ".launch-lock"
    lock.symlink_to(lock)  # ELOOP, for root too
    assert launch_of(tmp_path) is None
    assert asked(str(tmp_path))["status"] == "idle"
    lock.unlink()
    with launch_lock(tmp_path):
        assert launch_of(tmp_path) is not None


def test_a_run_file_with_classes_of_a_package_that_is_not_here_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    own = "recipe.targets.0.regularizer={kind: nowhere_to_be_found.method.Mine}"
    assert asked("m3i", f"output_dir={tmp_path}", own)["status"] == "idle"


def test_a_run_hears_of_its_own_request_and_of_no_other(tmp_path: Path) -> None:
    with lock_directory(tmp_path, trains=True):
        rank_0, other = Preemption(SimpleNamespace(), tmp_path), Preemption(SimpleNamespace())
        request = tmp_path / ".stop-request.json"
        request.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))  # to the run that was here before
        assert not rank_0.vote()
        assert asked(str(tmp_path))["status"] == "asked"
        deadline = time.monotonic() + 300
        while not rank_0.vote() and time.monotonic() < deadline:  # it looks once a second
            time.sleep(0.05)
        assert rank_0.vote()
        assert not other.vote()
    assert asked(str(tmp_path))["status"] == "idle"
    (tmp_path / ".lock-holder.json").write_text("{}")
    with lock_directory(tmp_path, trains=True):
        assert not Preemption(SimpleNamespace(), tmp_path).vote()


@pytest.mark.parametrize(
    ("left", "status", "code"), [("preempted", "stopped", 0), ("finished", "finished", 0), ("failed", "ended", 1)]
)
def test_how_the_run_has_left_is_told_whether_it_saved_since_or_not(
    tmp_path: Path, left: str, status: str, code: int
) -> None:
    (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
    begun = threading.Event()

    def run() -> None:
        with lock_directory(tmp_path, trains=True):
            asked_to_stop = Preemption(SimpleNamespace(), tmp_path)
            begun.set()
            while not asked_to_stop.vote():
                time.sleep(0.01)
            (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "end", "step": 8, "status": left}) + "\n")

    trains = threading.Thread(target=run)
    trains.start()
    assert begun.wait(300)
    told = CliRunner().invoke(app, ["stop", str(tmp_path), "--json"])
    trains.join()
    assert told.exit_code == code
    assert json.loads(told.stdout[told.stdout.index("{") :])["status"] == status


def test_who_does_not_listen_is_not_asked(tmp_path: Path) -> None:
    with lock_directory(tmp_path), pytest.raises(CheckpointError) as caught:
        asked(str(tmp_path))
    assert caught.value.where == str(tmp_path)
    with launch_lock(tmp_path), pytest.raises(CheckpointError) as caught:
        asked(str(tmp_path))
    assert caught.value.where == str(tmp_path)
    assert not (tmp_path / ".stop-request.json").exists()
