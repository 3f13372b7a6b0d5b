"""Commands are run, signals handed on, exit codes kept, and nothing is left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from launch import free_port
from launch_case import a_job, a_script, path_with
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import CheckpointError, UserError
from m3i_scale.host.failures import Failure
from m3i_scale.host.output_dir import RANK_RECORDS, launch_lock, lock_directory
from m3i_scale.host.rank_record import write_record
from m3i_scale.launch import Command, LaunchFile, LaunchPlan
from m3i_scale.launch.execute import check_needs, execute, write_files
from m3i_scale.launch.shell import as_pattern
from m3i_scale.launch_command import render

WAIT_S = 300
# One write a line: two ranks share a pipe, and unbuffered print writes the end of its line apart.
SAVES = "import os, signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))"
SAVES += "; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); os.write(1, b'ready\\n'); time.sleep(600)"


def a_plan(folder, *programs, **more):
    commands = tuple(Command((sys.executable, "-c", program)) for program in programs)
    return LaunchPlan("test", folder / "launch", more.pop("files", ()), commands, folder, **more)


def test_the_exit_code_is_that_of_the_command_that_failed(tmp_path):
    for codes, expected in (((0, 0), 0), ((0, 3), 3), ((75, 0), 75)):
        plan = a_plan(tmp_path, *(f"raise SystemExit({code})" for code in codes))
        assert execute(plan, plan, os.environ).code == expected
    plan = a_plan(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert execute(plan, plan, os.environ).code == 137


def test_the_first_failure_counts_and_ends_those_that_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("m3i_scale.launch.execute._GRACE_S", 0.5)
    plan = a_plan(tmp_path, "import time; time.sleep(600); open('waited', 'w')", "raise SystemExit(4)")
    assert execute(plan, plan, os.environ).code == 4
    assert not (tmp_path / "waited").exists()


STAYS = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
open("rank", "w").write(str(rank.pid))
time.sleep(600)
"""


def test_ranks_in_sessions_of_their_own_end_with_the_launcher_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("m3i_scale.launch.execute._GRACE_S", 0.5)
    waits = "import os, time\nwhile not (os.path.exists('rank') and open('rank').read()): time.sleep(0.05)\n"
    plan = a_plan(tmp_path, STAYS, f"{waits}raise SystemExit(4)")
    assert execute(plan, plan, os.environ).code == 4
    rank, deadline = int((tmp_path / "rank").read_text()), time.monotonic() + WAIT_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


NEEDED = {
    "deepspeed": ("pdsh", {"hosts": ("node1 slots=1", "node2 slots=1"), "master_address": "node1"}),
    "slurm": ("slurm-client", {"ranks_per_node": 1}),
    "kubeflow": ("kubernetes-client", {"ranks_per_node": 1, "container_image": "a:1"}),
    "torchrun": ("openssh-client", {"hosts": ("node1 slots=1",)}),
}


@pytest.mark.parametrize("launcher", NEEDED)
def test_a_program_that_is_not_here_is_named_with_its_package(launcher, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    package, fields = NEEDED[launcher]
    with pytest.raises(UserError) as caught:
        check_needs(render(launcher, a_job(output_dir=str(tmp_path), **fields)))
    assert caught.value.where == f"--with {launcher}"
    assert caught.value.fix == f"apt-get install {package}"


def test_a_port_that_is_taken_is_refused_before_the_start(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()
        plan = a_plan(tmp_path, "pass", port=listener.getsockname()[1])
        with pytest.raises(UserError) as caught:
            check_needs(plan)
        assert f"--master-port {plan.port + 1}" in str(caught.value.fix)
    check_needs(plan)


def test_files_replace_older_ones_and_are_never_readable_by_others(tmp_path):
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "a.sh").write_text("old")
    (folder / "a.sh").chmod(0o644)
    write_files(a_plan(tmp_path, files=(LaunchFile("a.sh", "new", 0o600),)))
    assert (folder / "a.sh").read_text() == "new"
    assert (folder / "a.sh").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["a.sh"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "launch").write_text("a file")
    with pytest.raises(UserError) as caught:
        write_files(a_plan(tmp_path, files=(LaunchFile("a", ""),)))
    assert caught.value.where == str(tmp_path / "launch")


def launched(tmp_path, *words):
    """`m3i-scale launch` in a process of its own, with a rank's Python that waits for a signal."""
    a_script(tmp_path, "python-waits", SAVES.replace("; ", "\n"), f"{sys.executable} -u")
    command = ["env", "--default-signal=HUP"]  # whatever these tests are run under
    command += [
        sys.executable,
        "-m",
        "m3i_scale",
        "launch",
        "m3i",
        f"output_dir={tmp_path / 'run'}",
        "data.datasets.main.path=/data/train",
    ]
    command += ["--python", str(tmp_path / "python-waits"), "--workdir", str(tmp_path), *words]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_ready(process, count):
    lines = []
    while sum("ready" in line for line in lines) < count:
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_their_exit_code_comes_back(tmp_path, number):
    port = free_port()
    process = launched(tmp_path, "--with", "local", "--ranks-per-node", "2", "--master-port", str(port))
    until_ready(process, 2)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(WAIT_S) == 75
    assert not psutil.wait_procs(ranks, timeout=WAIT_S)[1]  # who has lost its parent is reaped a moment later


def test_ranks_below_another_launcher_are_asked_themselves(tmp_path):
    """What starts them must not be hit: it would end them before they have saved."""
    program, ready = tmp_path / "rank.py", tmp_path / "it-runs"
    program.write_text(SAVES.replace("os.write(1, b'ready\\n')", f"open({str(ready)!r}, 'w')").replace("; ", "\n"))
    rank = (sys.executable, "-u", str(program))
    starter = f"import subprocess, sys; sys.exit(subprocess.call({rank!r}))"
    stop = Command(("pkill", "-USR2", "-f", "--", f"^{as_pattern(' '.join(rank))}$"))
    plan = LaunchPlan("test", tmp_path, (), (Command((sys.executable, "-c", starter)),), tmp_path, stops=(stop,))

    def ask():
        while not ready.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    assert execute(plan, plan, os.environ).code == 75


def test_torchrun_waits_for_its_ranks_and_ends_as_they_do(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(SAVES.replace("; ", "\n"))
    root = str(Path(__file__).resolve().parents[2])
    agent = subprocess.Popen(
        [sys.executable, "-m", "m3i_scale.launch.torchrun_agent", "--standalone", "--nproc-per-node=2", str(program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until_ready(agent, 2)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(WAIT_S) == 75


def test_a_mistake_in_the_run_file_ends_a_launch_before_anything_is_written(tmp_path):
    result = CliRunner().invoke(
        app,
        ["launch", "m3i", "--with", "slurm", "--ranks-per-node", "2", f"output_dir={tmp_path / 'run'}", "optim.lrr=1"],
    )
    assert result.exit_code != 0
    assert "optim.lrr" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_an_interpreter_that_is_not_here_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        check_needs(render("local", a_job(output_dir=str(tmp_path), ranks_per_node=1, python="/nowhere/python")))
    assert caught.value.where == "--with local"
    assert "--python" in caught.value.fix


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_launch_beside_ranks_that_still_train_writes_nothing(tmp_path, tmp_path_factory, monkeypatch, launcher):
    """Their launcher has been killed, or was sbatch, and they hold the folder themselves."""
    programs = tmp_path_factory.mktemp("bin")
    a_script(programs, "sbatch", "exit 1")
    monkeypatch.setenv("PATH", path_with(programs))
    with lock_directory(tmp_path):
        write_record(tmp_path / RANK_RECORDS, Failure(1.0, "node1", 0, 1, None, "silent", "of the run that lives"))
        before = sorted(tmp_path.rglob("*"))
        words = ["launch", "m3i", "--with", launcher, "--ranks-per-node", "1", f"output_dir={tmp_path}"]
        result = CliRunner().invoke(app, [*words, "data.datasets.main.path=/data/train"])
        after = [path for path in sorted(tmp_path.rglob("*")) if path.name != ".launch-lock"]
    assert isinstance(result.exception, CheckpointError)
    assert result.exception.where == str(tmp_path)
    assert after == before


@pytest.mark.parametrize("launcher", ["torchrun", "elastic"])
def test_a_launch_beside_another_leaves_its_files(tmp_path, launcher):
    words = ["launch", "m3i", "--with", launcher, "--ranks-per-node", "1", f"output_dir={tmp_path}"]
    with launch_lock(tmp_path):
        result = CliRunner().invoke(app, [*words, "data.datasets.main.path=/data/train"])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "launch").exists()
