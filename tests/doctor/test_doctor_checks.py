"""What every check says of a planted fault, from what hosts answer."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from m3i_scale.elastic.doctor import checks
from m3i_scale.elastic.doctor.doctor_command import doctor_table
from m3i_scale.elastic.doctor.group import PARTNERS
from m3i_scale.host.findings import Answers, Finding, compare_hosts, errors_in, finding, not_ready
from m3i_scale.host.machine import Machine, Needs, disk_finding, machine_findings, read_machine
from m3i_scale.run import software

GIB = 2**30
HOSTS = ("one", "two", "three")
OTHER_CODE = {"sha256": "ef" * 32, "commit": "abc", "path": "/m3i_scale", "files": {"a.py": "ef", "b.py": "ef"}}


def answer(number: int) -> dict[str, Any]:
    return {
        "python": {"version": "3.11.7", "path": "/venv/bin/python", "packages": {"torch": "2.9", "deepspeed": "0.19"}},
        "code": {"sha256": "ab" * 32, "commit": "abc", "path": "/m3i_scale", "files": {"a.py": "ab"}},
        "config": {"sha256": "cd" * 32, "values": {"run": {"seed": 0}}},
        "slots": 8,
        "devices": {"kind": "cuda", "count": 8, "names": ["H100"] * 8, "driver": "570", "memory": [80 * GIB] * 8},
        "interface": "eth0",
        "interfaces": {"lo": ["127.0.0.1", "::1"], "eth0": [f"10.0.0.{number + 1}"]},
        "variables": {"OMP_NUM_THREADS": "1"},
        "shards": {"photos": {"shard": "/s/a.tar", "read": 65536, "shards": 3, "seconds": 0.001}},
    }


@pytest.fixture
def answers() -> dict[str, dict[str, Any]]:
    return {name: answer(number) for number, name in enumerate(HOSTS)}


def compare(answers: Answers, check: str) -> list[Finding]:
    return list(compare_hosts(answers, {check: checks.CHECKS[check]}))


@pytest.mark.parametrize("check", checks.CHECKS)
def test_equal_hosts_have_no_fault(check: str, answers: dict[str, dict[str, Any]]):
    found = compare(answers, check)
    assert [(item.check, item.host, item.ok, item.warning) for item in found] == [
        (check, host, True, False) for host in HOSTS
    ]


PLANTED: dict[str, tuple[str, tuple[str, ...], Any, str]] = {
    "another Python": ("python", ("python", "version"), "3.12.1", "3.11.7"),
    "another package": ("packages", ("python", "packages", "torch"), "2.8", "torch 2.8, the master node has 2.9"),
    "no package": ("packages", ("python", "packages", "deepspeed"), None, "deepspeed"),
    "other files": ("commit", ("code",), OTHER_CODE, "ranks would differ: a.py, b.py; the master node has abc"),
    "another run file": ("config", ("config",), {"sha256": "0", "values": {"run": {"seed": 7}}}, "run.seed: 7, not 0"),
    "no config file": (
        "config",
        ("config",),
        {"error": "no config file 'x'", "where": "/x", "fix": None},
        "no config file",
    ),
    "no devices": ("accelerator", ("devices", "kind"), "cpu", "the master node has cuda"),
    "a device gone": ("accelerator", ("devices", "count"), 7, "8 ranks"),
    "no shards": ("shards", ("shards", "photos"), {"shard": "/s/a.tar", "error": "No such file"}, "No such file"),
    "no interface": ("interface", ("interfaces",), {"lo": ["127.0.0.1"]}, "'eth0' is not up"),
    "no address": ("interface", ("interfaces", "eth0"), [], "IPv4"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_on_its_host_alone(name: str, answers: dict[str, dict[str, Any]]):
    check, path, value, told = PLANTED[name]
    *above, last = path
    place = answers["two"]
    for key in above:
        place = place[key]
    place[last] = value
    bad = errors_in(compare(answers, check))
    assert [(item.check, item.host) for item in bad] == [(check, "two")]
    assert told in f"{bad[0].value} {bad[0].why}"
    assert bad[0].why
    assert bad[0].fix


@pytest.mark.parametrize("shards", ["https://u:SECRET@h/x.tar", "s3://b/x?sig=SECRET"])
def test_run_files_are_compared_without_their_secrets(shards: str, answers: dict[str, dict[str, Any]]):
    for host, value in (("one", shards), ("two", "/data/x.tar")):
        answers[host]["config"] = {"sha256": host, "values": {"run": {"data": {"datasets": {"a": {"path": value}}}}}}
    assert "SECRET" not in repr([item.to_json() for item in compare(answers, "config")])
    assert "run.data.datasets.a.path" in str([item.why for item in compare(answers, "config")])


COMPARED = [name for name, (check, *_) in PLANTED.items() if check in ("python", "packages", "commit", "config")]


@pytest.mark.parametrize("name", [name for name in COMPARED if name != "no config file"])
def test_what_ranks_compare_first_differs_where_a_fault_would_be_found(name: str):
    _, (*above, last), value, _ = PLANTED[name]
    own, head = answer(1), answer(0)
    assert software.digest(own) == software.digest(head)
    place = own
    for key in above:
        place = place[key]
    place[last] = value
    assert software.digest(own) != software.digest(head)


def test_grouped_values_say_whose_they_are():
    values = {"one": "3.11 at /a", "two": "3.11 at /b", "three": "3.11 at /a"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor_table(finding("python", host, value).to_json() for host, value in values.items()))
    text = console.export_text()
    assert "one, three: 3.11 at /a" in text
    assert "two: 3.11 at /b" in text


NOTED: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "another driver": ("accelerator", ("devices", "driver"), "535"),
    "another model": ("accelerator", ("devices", "names"), ["A100"] * 8),
    "a variable of its own": ("environment", ("variables",), {"NCCL_IB_DISABLE": "1"}),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_is_only_worth_a_look_is_a_warning(name: str, answers: dict[str, dict[str, Any]]):
    check, path, value = NOTED[name]
    *above, last = path
    place = answers["three"]
    for key in above:
        place = place[key]
    place[last] = value
    found = [item for item in compare(answers, check) if item.warning]
    assert [(item.host, item.ok) for item in found] == [("three", True)]


MACHINE = Machine(64 * GIB, 128 * GIB, 8 * GIB, 16 * GIB, 65536, 65536, cores=64, threads=None)


@pytest.mark.parametrize(
    ("check", "machine", "needs"),
    [
        ("memory", MACHINE, Needs(memory_bytes=65 * GIB)),
        ("shm", MACHINE, Needs(shm_bytes=9 * GIB)),
        ("shm", replace(MACHINE, shm_free=None, shm_total=None), Needs()),
        ("files", replace(MACHINE, files_soft=256, files_hard=256), Needs(open_files=300)),
    ],
)
def test_a_machine_that_has_less_than_a_run_needs(check: str, machine: Machine, needs: Needs):
    found = machine_findings("one", machine, needs, on_host=False)
    assert [item.check for item in errors_in(found)] == [check]
    assert errors_in(machine_findings("one", MACHINE, Needs(), on_host=False)) == []


def test_states_of_hosts_that_compute_count_as_their_memory():
    needs = Needs(memory_bytes=40 * GIB, state_bytes=40 * GIB)
    assert [item.check for item in errors_in(machine_findings("one", MACHINE, needs, on_host=True))] == ["memory"]
    assert errors_in(machine_findings("one", MACHINE, needs, on_host=False)) == []


def test_small_shared_memory_and_low_limits_are_warned_of():
    small = replace(MACHINE, shm_free=2**26, shm_total=2**26, files_soft=1024)
    found = machine_findings("one", small, Needs(ranks=8), on_host=False)
    assert {item.check for item in found if item.warning} == {"shm", "files"}
    assert errors_in(found) == []


@pytest.mark.parametrize(
    ("cores", "threads", "warned"), [(64, None, False), (64, 8, False), (64, 16, True), (4, None, True), (8, 1, False)]
)
def test_more_threads_than_cores_are_warned_of(cores: int, threads: int | None, warned: bool):
    found = machine_findings("one", replace(MACHINE, cores=cores, threads=threads), Needs(ranks=8), on_host=False)
    assert [item.warning for item in found if item.check == "threads"] == [warned]
    assert errors_in(found) == []


def test_the_limit_of_a_container_counts(tmp_path: Path):
    for name, text in (("memory.max", "1000000"), ("memory.current", "400000"), ("memory.stat", "inactive_file 50000")):
        (tmp_path / name).write_text(text)
    found = read_machine(cgroup=tmp_path)
    assert (found.memory_total, found.memory_available) == (1000000, 650000)
    (tmp_path / "memory.max").write_text("max")
    assert read_machine(cgroup=tmp_path).memory_total > 1000000


def test_a_disk_is_held_against_one_checkpoint_and_against_all(tmp_path: Path):
    assert disk_finding("one", tmp_path / "no" / "such", Needs(checkpoint_bytes=1, kept_bytes=1)).ok
    one = disk_finding("one", tmp_path, Needs(checkpoint_bytes=2**60))
    both = disk_finding("one", tmp_path, Needs(checkpoint_bytes=1, kept_bytes=2**60, kept_checkpoints=3))
    assert (one.ok, both.ok) == (False, False)
    assert "3 checkpoints" in str(both.why)


def test_ports_folders_and_groups():
    answers = {host: {"port": {"ms": 0.1}} for host in HOSTS}
    answers["two"] = {"port": {"error": "timed out"}}
    assert [item.ok for item in checks.port_findings(answers, "one", "10.0.0.1:29500")] == [True, False, True]
    answers["one"] = {"port": {"error": "Address already in use"}}
    assert [item.host for item in checks.port_findings(answers, "one", "10.0.0.1:29500")] == ["one"]
    notes = {
        "one": {"path": "/out", "visible": ["one"]},
        "two": {"path": "/out", "visible": ["two"]},
        "three": {"path": "/out", "visible": [], "error": "Permission denied"},
        "four": {"path": "/out", "visible": ["one", "four"]},  # a copy: the head does not see its note
    }
    shared = list(checks.shared_findings({host: {"shared": note} for host, note in notes.items()}))
    assert [item.host for item in errors_in(shared)] == ["two", "three", "four"]


def network(rate: float, **fields: Any) -> dict[str, Any]:
    return {"network": {"all_reduce_gb_s": 0.5, "host_gb_s": rate, "latency_us": 50.0, "backend": "gloo", **fields}}


def test_a_group_is_as_fast_as_its_slowest_host():
    answers = {"a": network(1.0), "b": network(1.0, all_reduce_gb_s=0.25, latency_us=80.0)}
    (group,) = checks.group_findings(answers, 2)
    assert (group.check, group.ok, group.value) == ("group", True, "2 hosts: all-reduce 0.25 GB/s, 80 µs (gloo)")


def test_a_group_without_the_answer_of_a_host_is_an_error_with_its_reason():
    failed = {"a": network(1.0), "b": {"group_error": "Socket Timeout"}, "c": network(1.0)}
    ended = {"a": network(1.0), "c": network(1.0)}
    for answers, reason in ((failed, "b: Socket Timeout"), (ended, "a host has stopped answering")):
        (group,) = checks.group_findings(answers, 3)
        assert (group.host, group.ok, group.value) == ("all", False, f"3 hosts: {reason}")


def stragglers(rates: dict[str, float]) -> list[str]:
    answers = {host: network(rate) for host, rate in rates.items()}
    return [item.host for item in errors_in(checks.group_findings(answers, len(rates)))]


def test_a_slow_host_is_named():
    assert stragglers({"a": 1.0, "b": 0.9, "c": 0.1}) == ["c"]
    assert stragglers({"a": 1.0, "b": 0.9, "c": 0.6}) == []
    assert stragglers({"a": 1.0, "b": 0.1}) == []  # of two hosts, either could be the slow one


@pytest.mark.parametrize("hosts", range(2, 10))
def test_every_host_has_a_partner_that_is_fast_if_another_one_is_slow(hosts: int):
    partners = {host: {(turn - host) % hosts for turn in range(PARTNERS)} - {host} for host in range(hosts)}
    assert all(host in partners[other] for host in partners for other in partners[host])
    assert min(map(len, partners.values())) >= min(hosts - 1, 2)


def test_faults_become_one_error():
    faults = [finding("shm", "a", "1 MiB", error="w", fix="f"), finding("disk", "b", "2 MiB", error="x", fix="g")]
    error = not_ready(faults)
    assert (error.what, error.where, error.fix) == ("shm: 1 MiB", "a; disk on b: 2 MiB (x)", "f; g")
    assert errors_in([finding("shm", "a", "")]) == []
