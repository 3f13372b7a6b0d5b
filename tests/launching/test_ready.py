"""The ready-to-edit files in launchers/: what the renderers make of one example, and some that nobody renders, under
which ranks find their place all the same."""

import json
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from launch import environment, free_port

from m3i_scale.launch_command import LAUNCHERS, READY_FILES
from m3i_scale.rank_variables import adopt_rank_variables

LAUNCHERS_FOLDER = Path(__file__).resolve().parents[2] / "launchers"
READY = runpy.run_path(str(LAUNCHERS_FOLDER / "_ready.py"))["ready_files"]()
BY_HAND = {"mpirun.sh": [[]], "deepspeed/openmpi.sh": [[]], "accelerate.sh": [["0"], ["1"]]}
"""Arguments of every start, by file."""
TELLS = """
import json, os, pathlib, sys
pathlib.Path(f"told-{os.getpid()}.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


@pytest.mark.parametrize("path", READY)
def test_a_ready_file_is_what_the_renderer_makes(path):
    written = (LAUNCHERS_FOLDER / path).read_text(encoding="utf-8")
    assert written == READY[path], "run `python launchers/_ready.py`"


def test_every_launcher_has_one():
    assert {Path(path).parts[0].partition(".")[0] for path in READY} == set(LAUNCHERS)
    assert {f"{name}.sh" for name in READY_FILES} < set(BY_HAND)


@pytest.mark.parametrize("path", [path for path in [*READY, *BY_HAND] if path.endswith((".sh", ".sbatch"))])
def test_a_ready_script_is_one_for_bash(path):
    assert subprocess.run(["bash", "-n", LAUNCHERS_FOLDER / path], check=False).returncode == 0


@pytest.mark.parametrize("path", [path for path in READY if path.endswith(".yaml")])
def test_a_ready_manifest_is_yaml(path):
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(READY[path]))


NEEDS_MPI = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs openmpi-bin")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if path == "accelerate.sh" else [NEEDS_MPI]) for path in BY_HAND]
)
def test_ranks_find_their_place(path, tmp_path):
    """Edited for this machine, with a package that says what it was given."""
    port = str(free_port())
    interfaces = psutil.net_if_addrs().items()  # Open MPI does not take the loopback
    card = next(name for name, known in interfaces if name != "lo" and socket.AF_INET in {one.family for one in known})
    edits = {
        "/data/m3i-scale": str(tmp_path),
        "/data/venv/bin/python": sys.executable,
        "10.0.0.1": "127.0.0.1",
        "29500": port,
        "eth0": card,
        "-n 16": "-n 2",
        "num_processes: 16": "num_processes: 2",
    }
    for name in ("mpirun.sh", "accelerate.sh", "accelerate.yaml", "deepspeed/openmpi.sh"):
        text = (LAUNCHERS_FOLDER / name).read_text()
        for example, here in edits.items():
            text = text.replace(example, here)
        (tmp_path / "launchers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "launchers" / name).write_text(text)
    (tmp_path / "launchers" / "deepspeed" / "hostfile").write_text("localhost slots=2\n")
    (tmp_path / "m3i_scale").mkdir()
    (tmp_path / "m3i_scale" / "__init__.py").touch()
    (tmp_path / "m3i_scale" / "__main__.py").write_text(TELLS)

    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    starts = [
        subprocess.Popen(["bash", tmp_path / "launchers" / path, *place], env=environment(**as_root))
        for place in BY_HAND[path]
    ]
    assert [start.wait(1800) for start in starts] == [0] * len(starts)
    told = [json.loads(file.read_text()) for file in tmp_path.glob("told-*.json")]
    for arguments, variables in told:
        adopt_rank_variables(variables)
        assert [word for word in arguments if not word.startswith("--local_rank=")][:2] == ["train", "m3i"]
        assert (variables["WORLD_SIZE"], variables["GLOO_SOCKET_IFNAME"]) == ("2", card)
        assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("127.0.0.1", port)
    assert sorted(variables["RANK"] for _, variables in told) == ["0", "1"]
