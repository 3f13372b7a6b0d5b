"""Probes over a stand-in for ssh: what they do with shells that talk, forget, refuse or hang, and that none stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launch import ROOT, environment, free_port

from m3i_scale.errors import ConfigError
from m3i_scale.launch.description import Cluster
from m3i_scale.launch.doctor.channel import MODULE, Channel, ProbeError, Way
from m3i_scale.launch.doctor.examine import Examination, Patience
from m3i_scale.launch.doctor.findings import Finding
from m3i_scale.launch.doctor.network import Listener, open_store, reach
from m3i_scale.launch.doctor.patient import Patient
from m3i_scale.launch.doctor.shared import read_notes, remove_notes, write_note
from m3i_scale.launch.environment import Variable
from m3i_scale.run.doctor import examine as doctor

SSH = r"""#!/bin/bash
while [ "$1" != -- ]; do shift; done
echo "Welcome to $2."
echo "{not ours}"
case "$2" in
  refused) echo "ssh: connect to host refused port 22: Connection refused" >&2; exit 255 ;;
  silent) exec sleep 300 ;;
  forgetful) exec bash -c 'export() { case "$1" in PLANTED=*) ;; *) builtin export "$@" ;; esac; }; '"$3" ;;
  old) exec bash -c "${3/ exec \// exec /nowhere/}" ;;
  poor) exec bash -c "${3/ -u / -S -u }" ;;
  bare) exec bash -c "${3/m3i_scale.launch.doctor.probe/m3i_scale.launch.no_doctor}" ;;
esac
exec bash -c "$3"
"""
NASTY = "a b'\"$(touch /tmp/never)\n;"


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(autouse=True)
def none_stays() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)  # servers that other tests share
    yield
    children = [process for process in psutil.Process().children(recursive=True) if process not in before]
    _, alive = psutil.wait_procs(children, timeout=5)
    assert [process.cmdline() for process in alive] == []


def way(**more: Any) -> Way:
    return Way(python=sys.executable, workdir=str(ROOT), variables=(), deadline_s=120, **more)


def examine(hosts: list[str], tmp_path: Path, **more: Any) -> dict[tuple[str, str], Finding]:
    variables = (Variable("PLANTED", NASTY), Variable("MY_TOKEN", "secret", secret=True))
    started = Way(sys.executable, str(tmp_path), variables, deadline_s=120)
    options: dict[str, Any] = {"port": free_port(), "master_address": "127.0.0.1", "interface": "lo", **more}
    patient = Patient(dict.fromkeys(hosts, 1), started, **options)
    with Examination(patient, Patience(start_s=20)) as examination:
        return {(item.check, item.host): item for item in examination.findings()}


def test_hosts_that_do_not_start_do_not_hold_up_the_others(tmp_path: Path):
    run = {"extends": "mae", "output_dir": "out/of/it", "data": {"sources": {"photos": {"shards": "/no/such"}}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    found = examine(["here", "forgetful", "refused", "old", "poor", "bare"], tmp_path, run=str(tmp_path / "run.yaml"))
    told = {key: (item.ok, item.value) for key, item in found.items()}
    assert told["ssh", "refused"] == (False, "ssh: connect to host refused port 22: Connection refused")
    assert told["ssh", "old"] == told["ssh", "bare"] == (True, "reached")
    assert "No such file" in told["python", "old"][1]
    assert "no_doctor" in told["python", "bare"][1]
    assert "No module named" in told["packages", "poor"][1]
    assert not told["packages", "poor"][0]
    assert "--python" in str(found["python", "old"].fix)
    assert "import m3i_scale" in str(found["python", "bare"].fix)
    assert told["environment", "here"] == (True, "2 of 2 variables arrived")
    assert told["environment", "forgetful"] == (False, "PLANTED did not arrive as sent")
    assert not told["shards", "here"][0]
    assert not told["names", "here"][0]  # the names of this test mean nothing
    # The two that are left measure their link, for what it is worth within one machine.
    assert found["bandwidth", "here ↔ forgetful"].ok
    assert told["shared", "forgetful"] == (True, f"{tmp_path}/out/of/it: reads what 1 other hosts write")
    assert not (tmp_path / "out").exists()
    assert not Path("/tmp/never").exists()


def test_the_folder_that_one_host_has_made_goes_when_the_others_have_left_it(tmp_path: Path):
    folder = tmp_path / "out" / "of" / "it"
    maker: list[Path] = []
    other: list[Path] = []
    write_note(folder, "a", maker)
    write_note(folder, "b", other)
    for left in (maker, other, maker, other):
        remove_notes(left)
    assert (maker, other) == ([], [])
    assert not (tmp_path / "out").exists()


def test_a_host_that_says_nothing_is_given_up():
    channel = Channel("silent", way())
    with pytest.raises(ProbeError, match="no answer after") as caught:
        channel.greet(0.3)
    assert not caught.value.reached
    channel.end()


def test_a_port_that_is_taken_is_the_heads_fault(tmp_path: Path):
    listener = Listener("127.0.0.1", 0, 60)
    try:
        found = examine(["here"], tmp_path, port=listener.port)
    finally:
        listener.close()
    assert not found["port", "here"].ok
    assert "cannot be opened" in found["port", "here"].value


def test_a_host_that_is_lost_on_the_way_is_told(tmp_path: Path):
    patient = Patient({"here": 1}, way(), port=free_port())
    with Examination(patient) as examination:
        examination._start()
        examination._channels["here"]._process.kill()
        answers = examination._look()
    assert answers == {}
    assert [(item.check, item.ok) for item in examination._lost] == [("probe", False)]


@pytest.mark.parametrize("ends", ["asker", "time"])
def test_a_probe_ends_with_its_asker_and_with_its_time(ends: str, tmp_path: Path):
    deadline = "60" if ends == "asker" else "1"
    probe = subprocess.Popen(
        [sys.executable, "-m", MODULE, deadline],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    assert probe.stdin is not None
    assert probe.stdout is not None
    assert "here" in json.loads(probe.stdout.readline())["doctor"]
    probe.stdin.write(json.dumps({"do": "listen", "address": "127.0.0.1", "port": 0, "seconds": 60}) + "\n")
    probe.stdin.flush()
    assert json.loads(probe.stdout.readline())["doctor"]["port"]
    if ends == "asker":
        probe.stdin.close()
    assert probe.wait(20) == (0 if ends == "asker" else 1)


def test_a_port_of_somebody_else_and_a_closed_one():
    listener = Listener("127.0.0.1", 0, 60)
    port = listener.port
    assert "ms" in reach("127.0.0.1", port, 3)
    listener.close()
    assert "fault" in reach("127.0.0.1", port, 3)
    Listener("127.0.0.1", port, 60).close()  # it was let go of at once


def test_the_store_listens_at_its_address_alone():
    port = free_port()
    store = open_store("127.0.0.1", port, master=True, seconds=10)
    joined = open_store("127.0.0.1", port, master=False, seconds=10)
    joined.set("key", "value")
    assert store.get("key") == b"value"
    listening = [item for item in psutil.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert {item.laddr.ip for item in listening if item.laddr.port == port} == {"127.0.0.1"}


def test_notes_are_read_and_removed_with_the_folders_that_were_made(tmp_path: Path):
    left: list[Path] = []
    folder = tmp_path / "a" / "b"
    assert "fault" not in write_note(folder, "note", left)
    began = time.monotonic()
    assert read_notes(folder, ["note", "another"], patience_s=0.2) == ["note"]
    assert time.monotonic() - began >= 0.2
    remove_notes(left)
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]
    (tmp_path / "file").write_text("")
    assert "fault" in write_note(tmp_path / "file" / "b", "note", left)


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(ConfigError, match="which are the 2 machines"):
        doctor(None, [], Cluster(nodes=2))
    with pytest.raises(ConfigError, match="no effect without a run file"):
        doctor(None, ["optim.lr=1"], Cluster())
