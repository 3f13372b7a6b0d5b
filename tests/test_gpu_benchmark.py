"""benchmarks/gpu.py: what happens to sections that fail, and the parts of it that need no GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

SECTIONS = {
    "holds": "rows.must('row', 1, 1, ok=True)\n    rows.figure('figure', float('nan'))",
    "fails": "rows.at_most('good', 2, 1)\n    rows.at_most('nan', 2, float('nan'))",
    "crashes": "rows.must('before', 1, 1, ok=True)\n    raise RuntimeError",
    "hangs": (
        "import os, pathlib, subprocess, time\n    child = subprocess.Popen(['sleep', '600'])\n"
        "    rows.must('before', 1, 1, ok=True)\n    rows.figure('child', child.pid)\n"
        "    pathlib.Path(os.environ['HANGING']).touch()\n    time.sleep(600)"
    ),
}


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    import gpu

    yield gpu
    sys.path.remove(str(BENCHMARKS))


def run(gpu, monkeypatch, tmp_path, name, limit_s=600.0):
    folder = tmp_path / "gpu_sections"
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"def measure(mode, rows):\n    {SECTIONS[name]}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return gpu.run_section(
        gpu.Section(name, limit_s, ("cpu",)), "cpu", limit_s, {"sections": {}}, tmp_path / "out.json"
    )


def test_a_section_whose_rows_hold_is_ok(gpu, monkeypatch, tmp_path):
    result = run(gpu, monkeypatch, tmp_path, "holds")
    assert (result["ok"], result["error"], result["must"]) == (True, None, {"row": [1, 1, True]})


def test_one_row_that_does_not_hold_is_enough_and_nan_never_holds(gpu, monkeypatch, tmp_path):
    result = run(gpu, monkeypatch, tmp_path, "fails")
    assert not result["ok"]
    assert [ok for _, _, ok in result["must"].values()] == [True, False]


def test_rows_of_a_section_that_crashes_are_kept(gpu, monkeypatch, tmp_path):
    result = run(gpu, monkeypatch, tmp_path, "crashes")
    assert not result["ok"]
    assert result["error"]
    assert result["must"] == {"before": [1, 1, True]}


def test_a_section_that_hangs_ends_at_its_limit_with_what_it_has_started(gpu, monkeypatch, tmp_path):
    hanging, kept = tmp_path / "hanging", tmp_path / "out.json"

    def monotonic():  # its limit is reached once it hangs and its rows are kept, however long it takes to start
        return 1e9 if hanging.exists() and kept.exists() and "before" in kept.read_text() else 0.0

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    monkeypatch.setenv("HANGING", str(hanging))
    result = run(gpu, monkeypatch, tmp_path, "hangs")
    assert not result["ok"]
    assert result["must"] == {"before": [1, 1, True]}
    assert ended_by(result["figures"]["child"], time.monotonic() + 60)
    assert json.loads(kept.read_text())["sections"]["hangs"]["must"] == result["must"]


def ended_by(pid, deadline):
    """Wait for the end of a process: the signal that kills a group returns before its processes have ended."""
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def call(*arguments):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "tpu"),
        ("--device", "cpu", "--fake"),
        ("--device", "cpu", "--only", "parrity"),
        ("--fake", "--only", "train"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments):
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.rstrip().splitlines()[-1].startswith("error:")


@pytest.mark.bench
def test_what_no_gpu_is_needed_for_holds():
    done = call("--device", "cpu", "--only", "facts", "--only", "start", "--only", "parity")
    document = json.loads(done.stdout)
    assert [name for name, section in document["sections"].items() if not section["ok"]] == []
    assert done.returncode == 0
    assert len(document["sections"]["parity"]["must"]) > 60


@pytest.mark.bench
def test_what_a_cuda_device_would_see_holds():
    document = json.loads(call("--fake").stdout)
    assert document["sections"]
    assert [name for name, section in document["sections"].items() if not section["ok"]] == []
