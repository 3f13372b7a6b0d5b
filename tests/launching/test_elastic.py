"""The loop of attempts, with agents and ranks as real processes of this machine in place of hosts."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, environment

from m3i_scale.config import load_run
from m3i_scale.elastic import link
from m3i_scale.elastic.attempts import Launch
from m3i_scale.elastic.link import Inbox, RemoteShell, connect
from m3i_scale.elastic.rendezvous import Policy, Work
from m3i_scale.elastic.worlds import ComparedSamples
from m3i_scale.errors import EXIT_PREEMPTED
from m3i_scale.host.failures import read_attempts
from m3i_scale.host.output_dir import ATTEMPTS
from m3i_scale.host.processes import MARK
from m3i_scale.launch.hosts import Host

WAIT_S = 300.0
PLAYS = ROOT / "tests" / "cluster" / "playing_rank.py"
SICK = f"""
import os, sys
sys.exit(3 if "|node1|" in os.environ["{MARK}"] else 0)
"""
AT_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
OWN = """
from m3i_scale.objective.regularizers import DenseRegularizer

class Quiet(DenseRegularizer):
    pass
"""
OVERRIDES = ["data.streams=24", "optim.batch_size=192", "optim.micro_batch_size=24"]


@pytest.fixture(autouse=True)
def hosts_are_this_machine(monkeypatch):
    monkeypatch.setattr(link, "is_here", lambda name: True)
    monkeypatch.setattr(link, "_CLOSE_S", WAIT_S)  # a busy machine may need longer until it tells how a process ended


def a_site(folder: Path) -> RemoteShell:
    paths = environment()["PYTHONPATH"]
    return RemoteShell(
        sys.executable,
        str(folder),
        str(folder / "out"),
        environment={"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"},
        connect_s=WAIT_S,
        silence_s=WAIT_S,
    )


def a_launch(
    folder: Path, slots: tuple[int, ...], policy: Policy, command: tuple[str, ...], recipe: str = "m3i"
) -> Launch:
    run = load_run(recipe, [*OVERRIDES, f"output_dir={folder / 'out'}"])
    names = tuple(Host(f"node{number}", count) for number, count in enumerate(slots))
    return Launch(Work(run, command, names, a_site(folder)), policy, print)


def a_file(folder: Path, command: list[str], *overrides: str) -> Path:
    """Write the input of `python -m m3i_scale.elastic.launch` for two ranks on this machine."""
    given = {
        "run": load_run("m3i", [*OVERRIDES, f"output_dir={folder / 'out'}", *overrides]).model_dump(mode="json"),
        "python": sys.executable,
        "workdir": str(folder),
        "environment": {"PYTHONPATH": environment()["PYTHONPATH"]},
        "ssh": [],
        "transport": "ssh",
        "hosts": ["localhost slots=2"],
        **dict.fromkeys(("interface", "master_address", "master_port", "min_hosts")),
        "silence_s": WAIT_S,
        "max_restarts": 0,
        "pause_s": 0,
        "probe_s": 30,
        "command": command,
    }
    file = folder / "elastic.json"
    file.write_text(json.dumps(given))
    return file


def attempts(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / ATTEMPTS).read_text())


def unreachable(monkeypatch, *names: str) -> None:
    reach = link.agent_command
    monkeypatch.setattr(link, "agent_command", lambda name, *given: ["false"] if name in names else reach(name, *given))


@pytest.mark.parametrize(
    ("slots", "min_hosts", "worlds", "exit_code"),
    [((1, 1, 1), 2, [3, 3, 2], 0), ((1, 1, 1), 3, [3, 3, 3], 1), ((5, 1), 1, [2, 2, 2], 1)],
    ids=["left out", "wanted", "five ranks do not fit"],
)
def test_a_host_that_fails_first_twice_running_is_left_out_where_the_others_are_enough(
    tmp_path, capsys, slots, min_hosts, worlds, exit_code
):
    policy = Policy(max_restarts=2, min_hosts=min_hosts, pause_s=0.0, probe_s=0.1)
    assert a_launch(tmp_path, slots, policy, (sys.executable, "-c", SICK)).run() == exit_code
    found = attempts(tmp_path)
    assert [len(item["hosts"]) for item in found] == worlds
    assert [item["cause"]["host"] for item in found if item["cause"]] == ["node1"] * (3 if exit_code else 2)
    assert list(found[-1]["left_out"]) == ([] if exit_code else ["node1"])
    assert found[-1]["came_back"] == []  # it answers, and nobody stops for it
    assert [note.status for note in read_attempts(tmp_path / "out")] == [item["status"] for item in found]
    told = capsys.readouterr().out
    assert (told.count("host node1: "), told.count("without node1: ")) == ((1, 0) if exit_code else (0, 1))


OUT_OF_MEMORY = """
import sys
if "optim.micro_batch_size=48" in sys.argv:
    sys.exit("OutOfMemoryError: CUDA out of memory")
"""


def compared(tmp_path, monkeypatch, policy: Policy, program: str = "pass", recipe: str = "m3i") -> Launch:
    """Four hosts, two of which are gone."""
    unreachable(monkeypatch, "node2", "node3")
    return a_launch(tmp_path, (1, 1, 1, 1), policy, (sys.executable, "-c", program), recipe)


def test_fewer_ranks_get_a_larger_micro_batch_and_so_compare_as_many_samples(tmp_path, monkeypatch, capsys):
    assert compared(tmp_path, monkeypatch, Policy(min_hosts=2)).run() == 0
    (item,) = attempts(tmp_path)
    assert (item["ranks"], item["micro_batch_size"]) == (2, 48)
    assert "contrastive batch" not in capsys.readouterr().out


def test_a_larger_micro_batch_that_runs_out_of_memory_becomes_the_usual_one_without_a_restart(
    tmp_path, monkeypatch, capsys
):
    assert compared(tmp_path, monkeypatch, Policy(min_hosts=2), OUT_OF_MEMORY).run() == 0
    assert [item["micro_batch_size"] for item in attempts(tmp_path)] == [48, 24]
    assert "the global contrastive batch is 48, was 96" in capsys.readouterr().out


def test_a_recipe_that_compares_no_samples_keeps_its_micro_batch(tmp_path, monkeypatch, capsys):
    assert compared(tmp_path, monkeypatch, Policy(min_hosts=2), recipe="mae").run() == 0
    assert attempts(tmp_path)[0]["micro_batch_size"] == 24
    assert "contrastive batch" not in capsys.readouterr().out


def test_losses_over_all_samples_of_a_step_keep_their_micro_batch() -> None:
    hosts = [Host(f"node{number}", 1) for number in range(4)]
    micro, joint = (load_run("clip", [f"optim.contrastive_batch={kind}"]) for kind in ("micro", "global"))
    assert ComparedSamples(micro, hosts, 1).usual == 4 * micro.optim.micro_batch_size
    assert ComparedSamples(joint, hosts, 1).usual is None


def test_a_host_that_was_silent_before_is_asked_beside_the_others_and_not_waited_for(tmp_path, monkeypatch):
    reach = link.agent_command
    asked: list[float | None] = []

    def silent(name: str, site: RemoteShell, patience_s: float | None = None) -> list[str]:
        asked.append(patience_s)
        return ["sleep", "60"] if name == "node1" else reach(name, site, patience_s)

    monkeypatch.setattr(link, "agent_command", silent)
    monkeypatch.setattr(link, "UNRESPONSIVE_S", 0.2)
    hosts = [Host("node0", 1), Host("node1", 1)]
    links, reasons = connect(hosts, a_site(tmp_path), Inbox(), unresponsive={"node1"})
    for one in links:
        one.close()
    assert asked == [None, 0.2]
    assert [one.host.name for one in links] == ["node0"]
    assert list(reasons) == ["node1"]


OLDER = """
import json, sys
from m3i_scale import __version__
print(json.dumps({"kind": "hello", "version": __version__, "left": [], "error": None}), flush=True)
sys.stdin.read()
"""


def test_a_host_whose_code_does_not_yet_say_what_it_is_cannot_be_used(tmp_path, monkeypatch):
    reach = link.agent_command
    older = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", OLDER]
    monkeypatch.setattr(link, "agent_command", lambda name, *given: older if name == "node1" else reach(name, *given))
    links, reasons = connect([Host("node0", 1), Host("node1", 1)], a_site(tmp_path), Inbox())
    for one in links:
        one.close()
    assert [one.host.name for one in links] == ["node0"]
    assert "older than here" in reasons["node1"].what


def test_nobody_asks_on_when_nobody_waits_for_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "agent_command", lambda *_: ["sleep", "60"])
    links, reasons = connect([Host("node1", 1)], a_site(tmp_path), Inbox(), over=lambda: True)
    assert (links, list(reasons)) == ([], ["node1"])


def test_a_launch_file_may_name_classes_of_ones_own(tmp_path):
    """`python -m m3i_scale.elastic.launch FILE` has read no run file."""
    (tmp_path / "own_quiet.py").write_text(OWN)
    (tmp_path / "out").mkdir()
    file = a_file(tmp_path, [sys.executable, "-c", "pass"], "recipe.targets.0.regularizer=own_quiet.Quiet")
    variables = environment()
    variables["PYTHONPATH"] += f":{tmp_path}"
    command = [sys.executable, "-m", "m3i_scale.elastic.launch", str(file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (tmp_path / "out" / ATTEMPTS).exists(), done.stderr
    assert "own_quiet" not in done.stderr


def test_a_terminal_that_is_lost_lets_the_ranks_save(tmp_path):
    """It goes with its last writer: what is told from then on cannot be written."""
    out = tmp_path / "out"
    out.mkdir()
    file = a_file(tmp_path, [sys.executable, str(PLAYS), str(out), "100000"])
    own, others = pty.openpty()
    command = ["env", "--default-signal=HUP", sys.executable, "-c", AT_TERMINAL]
    command += [sys.executable, "-m", "m3i_scale.elastic.launch"]
    launched = subprocess.Popen(
        [*command, str(file)],
        env=environment(),
        stdin=others,
        stdout=others,
        stderr=others,
        start_new_session=True,
    )
    os.close(others)
    try:
        deadline, said = time.monotonic() + WAIT_S, b""
        while b" at step 200 " not in said:  # which the launch has heard of
            assert time.monotonic() < deadline, said
            with contextlib.suppress(OSError):
                said += os.read(own, 1 << 16)
        os.close(own)
        assert launched.wait(WAIT_S) == EXIT_PREEMPTED
    finally:
        launched.kill()
        launched.wait()
    (item,) = attempts(tmp_path)
    assert item["status"] == "preempted"


def test_a_launch_whose_ranks_were_asked_to_stop_says_last_of_all_that_it_has(tmp_path, capsys):
    assert a_launch(tmp_path, (1,), Policy(), (sys.executable, "-c", "raise SystemExit(75)")).run() == EXIT_PREEMPTED
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped")
