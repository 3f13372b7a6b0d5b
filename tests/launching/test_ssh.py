"""What a host is told over ssh, run by a shell as ssh hands it to one."""

import shutil
import subprocess

import pytest
from launch import ROOT
from launch_case import TWO_HOSTS, a_job, a_script, path_with
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.elastic import link
from m3i_scale.elastic.link import HostError, Inbox, RemoteShell, connect, explain_end
from m3i_scale.errors import UserError
from m3i_scale.launch.hosts import Host
from m3i_scale.launch_command import render


def test_a_host_that_does_not_see_the_script_says_so(tmp_path):
    output_dir = tmp_path / "it's `HOME`"
    plan = render("torchrun", a_job(output_dir=str(output_dir), **TWO_HOSTS))
    *_, host, line = plan.commands[1].argv
    assert host == "node2"
    script = output_dir / "launch" / "torchrun.sh"

    blind = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert blind.returncode == 2
    assert blind.stderr.splitlines()[0] == f"node2 does not see {script}"
    assert "fix: set output_dir to a folder of a file system that all hosts mount" in blind.stderr

    script.parent.mkdir(parents=True)
    script.write_text('echo "place $1"\nexit 7\n')
    seeing = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (seeing.returncode, seeing.stdout) == (7, "place 1\n")


def test_agents_without_an_ssh_to_start_them_are_told_of_as_hosts_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    site = RemoteShell(python="python3", workdir="/", output_dir="/out", launch="one")
    links, reasons = connect([Host("node1", 1), Host("node2", 1)], site, Inbox())
    assert links == []
    error = HostError("ssh cannot be started here: No such file or directory", "connect")
    assert reasons == dict.fromkeys(("node1", "node2"), error)


def test_ssh_under_pdsh_gives_up_a_silent_host_and_what_is_given_counts_first(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -oConnectTimeout=7")
    (command,) = render("deepspeed", a_job(ssh=("-oServerAliveInterval=3",), **TWO_HOSTS)).commands
    arguments = command.environment["PDSH_SSH_ARGS_APPEND"].split()
    asked = subprocess.run(["ssh", "-G", *arguments, "node1"], capture_output=True, text=True, check=True)
    known = dict(line.split(" ", 1) for line in asked.stdout.splitlines())
    assert (known["serveraliveinterval"], known["serveralivecountmax"], known["connecttimeout"]) == ("3", "4", "7")
    assert known["port"] == "2222"


@pytest.mark.parametrize("transport", ["ssh", "srun"])
def test_an_end_is_told_of_what_reached_the_host(transport):
    site = RemoteShell(python="python3", workdir="/", output_dir="/out", launch="one", transport=transport)
    assert explain_end(255, ["it broke"], site) == HostError(f"{transport}: it broke", "connect")
    assert explain_end(127, ["bash: python3: command not found"], site).kind == "start"
    assert explain_end(1, ["python3: No module named m3i_scale.elastic.agent"], site).kind == "start"
    missing = explain_end(1, ["ModuleNotFoundError: No module named 'pydantic'", f"{transport}: error: exited"], site)
    assert missing.kind == "start"
    assert "pydantic" in missing.what
    assert explain_end(1, ["bash: line 1: cd: /nowhere: No such file or directory"], site).kind == "start"
    assert explain_end(1, ["RuntimeError: it broke"], site).kind == "agent"


SSH = r"""
case "${@: -2:1}" in
  node1) exec bash -c "${@: -1}" ;;
  node2) exec bash -c 'cd() { builtin cd "$OTHER"; }; '"${@: -1}" ;;
  *) echo "ssh: connect to host node3 port 22: No route to host" >&2; exit 255 ;;
esac
"""
STARTED = 'touch "$(dirname "$0")/started"'


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder on PATH with an `ssh` that knows three hosts: one as this, one with other code, one that is down."""
    folder = tmp_path / "bin"
    folder.mkdir()
    a_script(folder, "ssh", SSH)
    a_script(folder, "pdsh", STARTED)
    for name in ("m3i_scale", "recipes", "protocols", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "m3i_scale" / "cli.py").open("a") as file:
        file.write("# another commit\n")
    monkeypatch.setenv("OTHER", str(tmp_path / "other"))
    monkeypatch.setenv("PATH", path_with(folder))
    monkeypatch.setattr(link, "_CLOSE_S", 300.0)  # a busy machine may need longer until it tells how a process ended
    return folder


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_hosts_that_cannot_be_used_are_all_told_before_a_launcher_starts(programs, tmp_path, launcher):
    cluster, out = tmp_path / "cluster.yaml", tmp_path / "out"
    cluster.write_text("hosts: [node1 slots=1, node2 slots=1, node3 slots=1]\n")
    overrides = ["data.datasets.main.path=/data/train", "data.streams=3", "optim.batch_size=3072"]
    done = CliRunner().invoke(
        app, ["launch", "mae", "--with", launcher, "--cluster", str(cluster), *overrides, f"output_dir={out}"]
    )
    assert isinstance(done.exception, UserError), done.output
    assert "2 of 3 hosts cannot be used" in done.exception.what
    of_node2, of_node3 = str(done.exception.where).split("; ")
    assert of_node2.startswith("node2: the code in ")
    assert of_node2.endswith("m3i_scale/cli.py")
    assert of_node3 == "node3: ssh: connect to host node3 port 22: No route to host"
    assert not (programs / "started").exists()
    assert not (out / "failure.json").exists()
