"""What a host is told over ssh, run by a shell as ssh hands it to one."""

import subprocess

import pytest
from launch_case import TWO_HOSTS, a_job

from m3i_scale.launch.hosts import Host
from m3i_scale.launch.launchers import render
from m3i_scale.launch.link import Inbox, Site, connect


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_host_that_does_not_see_the_script_says_so(tmp_path, launcher):
    output_dir = tmp_path / "it's $HOME"
    plan = render(launcher, a_job(output_dir=str(output_dir), **TWO_HOSTS))
    *_, host, line = plan.commands[1].argv
    assert host == "node2"
    script = output_dir / "launch" / f"{launcher}.sh"

    blind = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert blind.returncode == 2
    assert blind.stderr.splitlines()[0] == f"node2 does not see {script}"
    assert "fix: set output_dir to a folder of a file system that all hosts have mounted" in blind.stderr

    script.parent.mkdir(parents=True)
    script.write_text('echo "place $1"\nexit 7\n')
    seeing = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (seeing.returncode, seeing.stdout) == (7, "place 1\n")


def test_agents_without_an_ssh_to_start_them_are_told_of_as_hosts_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    site = Site(python="python3", workdir="/", output_dir="/out", launch="one")
    links, reasons = connect([Host("node1", 1), Host("node2", 1)], site, Inbox())
    assert links == []
    assert reasons == dict.fromkeys(("node1", "node2"), "ssh cannot be started here: No such file or directory")
