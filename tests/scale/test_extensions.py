"""Lock files of killed builders go; those of living ones stay."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from m3i_scale.engine import extensions
from m3i_scale.engine.engine import awaited_optimizer
from m3i_scale.engine.extensions import awaited_build, find_ninja, keep_to_environment, sweep_stale_locks

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path):
    folder = tmp_path / "py311_cpu" / "fused_adam"
    folder.mkdir(parents=True)
    return folder / "lock"


def test_the_lock_of_a_living_builder_stays_and_that_of_a_killed_one_goes(tmp_path, lock):
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "building\n"
        assert sweep_stale_locks(tmp_path) == []
        assert lock.exists()
        builder.send_signal(signal.SIGKILL)
        builder.wait()
        assert lock.exists()
        assert sweep_stale_locks(tmp_path) == [lock]
        FileBaton(str(lock)).wait()  # would wait for ever
    finally:
        builder.kill()
        builder.wait()


def test_what_a_start_waits_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    name = "fused_adam"
    assert str(tmp_path) in awaited_build(name)
    folder = tmp_path / "py311_cpu" / name
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    assert str(folder / "lock") in awaited_build(name)
    (folder / "lock").unlink()
    (folder / f"{name}.so").touch()
    assert awaited_build(name) is None


def test_the_optimizer_that_has_to_be_built_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    own, zero = {"optimizer": {"params": {}}}, {"stage": 3}
    assert "fused_adam" in awaited_optimizer({**own, "zero_optimization": zero})
    zero_offload = zero | {"offload_optimizer": {"device": "cpu"}}
    assert "cpu_adam" in awaited_optimizer({**own, "zero_optimization": zero_offload})
    assert awaited_optimizer({"optimizer": {"params": {"torch_adam": True}}, "zero_optimization": zero}) is None


def test_the_build_by_hand_builds_where_training_looks(tmp_path):
    own = {name: value for name, value in os.environ.items() if name != "TORCH_EXTENSIONS_DIR"}
    environment = own | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = Path(__file__).parents[2] / "launchers" / "_build.py"
    subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True)
    assert list(tmp_path.rglob("*.so")) == []
    assert list((Path(sys.prefix) / "torch_extensions").glob("*/*.so"))


def test_ranks_that_sweep_at_once_leave_no_stale_lock(tmp_path, lock):
    for _time in range(3):
        lock.touch()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _rank: sweep_stale_locks(tmp_path), range(8)))
        assert not lock.exists()


def test_the_folder_of_torch_is_swept_by_default(tmp_path, lock, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent.parent))
    lock.touch()
    assert sweep_stale_locks() == [lock]


def test_on_a_shared_file_system_a_fresh_lock_is_believed(tmp_path, lock, monkeypatch):
    monkeypatch.setattr(extensions, "_file_system", lambda path: "nfs4")
    lock.touch()
    assert sweep_stale_locks(tmp_path) == []
    long_ago = lock.stat().st_mtime - extensions.FOREIGN_AGE_S - 1
    os.utime(lock, (long_ago, long_ago))
    assert sweep_stale_locks(tmp_path) == [lock]


def test_a_lock_that_was_taken_anew_during_the_sweep_stays(tmp_path, lock, monkeypatch):
    lock.touch()

    def taken_anew(status):
        lock.rename(lock.with_name("old"))
        lock.touch()
        return False

    monkeypatch.setattr(extensions, "_is_open", taken_anew)
    assert sweep_stale_locks(tmp_path) == []
    assert lock.exists()


def test_no_folder_no_locks(tmp_path):
    assert sweep_stale_locks(tmp_path / "none") == []


def test_two_environments_do_not_build_over_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that it is put back whatever it was
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    keep_to_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    keep_to_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"


@pytest.mark.parametrize("reason", ["no environment", "read-only"])
def test_without_a_folder_of_ones_own_torch_decides(tmp_path, monkeypatch, reason):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that it is put back whatever it was
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix if reason == "no environment" else str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    keep_to_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


@pytest.mark.parametrize("elsewhere", [True, False], ids=["another version on PATH", "none on PATH"])
def test_the_ninja_beside_the_interpreter_builds(tmp_path, monkeypatch, elsewhere):
    for folder in ("environment", *(["system"] if elsewhere else [])):
        program = tmp_path / folder / "ninja"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    find_ninja()
    assert shutil.which("ninja") == str(tmp_path / "environment" / "ninja")
    before = os.environ["PATH"]
    find_ninja()
    assert os.environ["PATH"] == before


def test_without_a_ninja_beside_the_interpreter_path_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    before = os.environ["PATH"]
    find_ninja()
    assert os.environ["PATH"] == before
