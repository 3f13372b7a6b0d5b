"""Hosts behind a stand-in for ssh: shells that talk, forget, refuse or hang; and nothing stays of an examination."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launch import ROOT, environment, free_port

from m3i_scale.elastic import link
from m3i_scale.elastic.doctor.command import Examination
from m3i_scale.elastic.doctor.command import examine as doctor
from m3i_scale.elastic.doctor.group import Group, open_store, reach, read_notes, remove, write_note
from m3i_scale.elastic.doctor.host import Agents
from m3i_scale.elastic.link import RemoteShell
from m3i_scale.errors import ConfigError
from m3i_scale.host.findings import Finding
from m3i_scale.launch.description import Cluster

SSH = r"""#!/bin/bash
host="${@: -2:1}" line="${@: -1}"
echo "Welcome to $host."
echo "{not ours}"
case "$host" in
  refused) echo "ssh: connect to host refused port 22: Connection refused" >&2; exit 255 ;;
  silent) exec sleep 300 ;;
  old) exec bash -c "${line/exec env /exec env /nowhere/python }" ;;
  poor) exec bash -c "${line/ -u / -S -u }" ;;
  bare) exec bash -c "${line/m3i_scale.elastic.agent/m3i_scale.launch.no_agent}" ;;
  lost) export PYTHONPATH="$LOST:$PYTHONPATH" ;;
esac
exec bash -c "$line"
"""
WAIT_S = 300.0
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
    monkeypatch.setattr(link, "_CLOSE_S", WAIT_S)  # a busy machine may need longer until it tells how a process ended


@pytest.fixture(autouse=True)
def none_stays() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)  # servers that other tests share
    yield
    children = [process for process in psutil.Process().children(recursive=True) if process not in before]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert [process.cmdline() for process in alive] == []


def a_site(**more: Any) -> RemoteShell:
    fields = {"python": sys.executable, "workdir": str(ROOT), "output_dir": "", "launch": "one", "connect_s": WAIT_S}
    return RemoteShell(**{**fields, "ssh_to_all": True, "silence_s": WAIT_S, **more})


def examine(hosts: list[str], tmp_path: Path, **more: Any) -> dict[tuple[str, str], Finding]:
    options: dict[str, Any] = {"connect_s": WAIT_S, "report_s": WAIT_S, "join_s": WAIT_S, "measure_s": WAIT_S, **more}
    port = options.pop("port", None) or free_port()
    cluster = Cluster(master_port=port, master_address="127.0.0.1", interface="lo")
    site = a_site(workdir=str(tmp_path), environment={"PLANTED": NASTY, "MY_TOKEN": "secret"})
    findings = Examination(dict.fromkeys(hosts, 1), site, cluster, **options).findings()
    return {(item.check, item.host): item for item in findings}


@pytest.mark.slow
def test_a_host_whose_process_ends_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "sitecustomize.py").write_text(
        "import os, sys\nsys.orig_argv[-1] == 'measure' and os._exit(7)\n"
    )
    monkeypatch.setenv("LOST", str(tmp_path / "lost"))
    found = examine(["here", "lost"], tmp_path, join_s=10.0)
    assert (found["probe", "lost"].ok, found["probe", "lost"].value) == (False, "it ended with exit code 7")
    assert found["port", "here"].ok


def test_hosts_that_do_not_start_do_not_hold_up_the_others(tmp_path: Path):
    run = {"extends": "mae", "output_dir": "out/of/it", "data": {"datasets": {"photos": {"path": "/no/such"}}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    hosts = ["here", "there", "refused", "old", "poor", "bare"]
    found = examine(hosts, tmp_path, run=str(tmp_path / "run.yaml"))
    told = {key: (item.ok, item.value) for key, item in found.items()}
    assert told["ssh", "refused"] == (False, "ssh: connect to host refused port 22: Connection refused")
    assert told["ssh", "old"] == told["ssh", "bare"] == (True, "connected")
    assert "No such file" in told["python", "old"][1]
    assert "no_agent" in told["python", "bare"][1]
    assert "No module named" in told["python", "poor"][1]
    assert not told["python", "poor"][0]
    assert "--python" in str(found["python", "old"].fix)
    assert "m3i_scale" in str(found["python", "bare"].fix)
    assert not told["shards", "here"][0]
    assert found["group", "all"].ok  # of the two that are left
    assert found["group", "all"].value.startswith("2 hosts: all-reduce ")
    assert told["shared", "there"] == (True, f"{tmp_path}/out/of/it: reads what 1 other hosts write")
    assert not (tmp_path / "out").exists()
    assert not Path("/tmp/never").exists()


def test_a_host_that_says_nothing_is_given_up():
    with Agents(["silent"], a_site(connect_s=0.5), WAIT_S) as agents:
        assert agents.hosts == []
    assert agents.errors["silent"].kind == "connect"


def test_the_answer_of_a_process_that_takes_too_long_is_not_waited_for(tmp_path: Path):
    waits = {"host": "two", "hosts": ["one", "two"], "address": "127.0.0.1", "port": free_port(), "join_s": WAIT_S}
    with Agents(["two"], a_site(), WAIT_S) as agents:
        assert agents.hosts == ["two"]
        assert agents.request("measure", {"two": waits}, 1.0) == {}
    assert agents.errors["two"].kind == "agent"


def test_a_port_that_is_taken_is_the_heads_fault(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = examine(["here", "there"], tmp_path, port=listener.getsockname()[1])
    assert [host for (check, host), item in found.items() if check == "port" and not item.ok] == ["here"]
    assert found["group", "all"].warning


def test_a_host_that_cannot_reach_the_head_does_not_hold_up_the_others(tmp_path: Path):
    port = free_port()
    requests = {
        host: {
            "host": host,
            "hosts": ["one", "two", "three"],
            "address": "127.0.0.1",
            "port": port if host != "three" else free_port(),
            "join_s": {"one": 20.0, "two": WAIT_S, "three": 1.0}[host],  # the first waits for the last so long
            "measure_s": WAIT_S,
            "folder": str(tmp_path / "out" / "of" / "it"),
            "token": "token",
        }
        for host in ("one", "two", "three")
    }
    others = {host: requests.pop(host) for host in ("two", "three")}
    with (
        Agents(["one"], a_site(), WAIT_S) as head,
        Agents(list(others), a_site(), WAIT_S) as agents,
        ThreadPoolExecutor(1) as pool,
    ):
        assert head.hosts + agents.hosts == ["one", "two", "three"]
        with socket.create_server(("127.0.0.1", port)) as listener:
            listener.settimeout(WAIT_S)
            joining = pool.submit(agents.request, "measure", others, WAIT_S)
            listener.accept()[0].close()  # the second is ready, however long its imports took
        answers = head.request("measure", requests, WAIT_S) | joining.result()
    assert head.errors == agents.errors == {}
    assert "error" in answers["three"]["port"]
    for host in ("one", "two"):
        assert answers[host]["members"] == ["one", "two"]
        assert answers[host]["shared"]["visible"] == ["one", "two"]
        assert answers[host]["network"]["all_reduce_gb_s"] > 0
        assert answers[host]["network"]["host_gb_s"] > 0
    assert not (tmp_path / "out").exists()


def test_a_port_that_nobody_has_opened_is_waited_for():
    port = free_port()
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        reach("127.0.0.1", port, 0.5)
    assert time.monotonic() - began >= 0.2
    with socket.create_server(("127.0.0.1", port)):
        assert reach("127.0.0.1", port, WAIT_S) > 0


def test_the_store_listens_at_its_address_alone():
    port = free_port()
    store = open_store("127.0.0.1", port, master=True, seconds=WAIT_S)
    joined = open_store("127.0.0.1", port, master=False, seconds=WAIT_S)
    joined.set("key", "value")
    assert store.get("key") == b"value"
    listening = [item for item in psutil.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert {item.laddr.ip for item in listening if item.laddr.port == port} == {"127.0.0.1"}


def test_notes_are_read_and_removed_with_the_folders_that_were_made(tmp_path: Path):
    made: list[Path] = []
    folder = tmp_path / "a" / "b"
    assert write_note(folder, "note", made) is None
    began = time.monotonic()
    assert read_notes(folder, ["note", "another"], wait_s=0.2) == ["note"]
    assert time.monotonic() - began >= 0.2
    remove(made)
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]
    (tmp_path / "file").write_text("")
    assert write_note(tmp_path / "file" / "b", "note", made)


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(ConfigError) as caught:
        doctor(None, [], Cluster(nodes=2))
    assert caught.value.where == "nodes: 2"
    with pytest.raises(ConfigError) as caught:
        doctor(None, ["optim.lr=1"], Cluster())
    assert caught.value.where == "optim.lr=1"


def test_the_head_serves_the_others_until_the_last_has_asked() -> None:
    port = free_port()
    stores = [open_store("127.0.0.1", port, master=master, seconds=WAIT_S) for master in (True, False)]
    head, other = (Group(store, ["n1", "n2"], host, WAIT_S) for store, host in zip(stores, ("n1", "n2"), strict=True))
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(head.leave)
        with pytest.raises(TimeoutError):
            left.result(0.5)
        other.leave()
        left.result(WAIT_S)
