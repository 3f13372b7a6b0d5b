"""Hostfiles are read strictly: what is not a host is an error with its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.errors import ConfigError
from m3i_scale.launch.hosts import Host, is_host_name, parse_hosts, read_hostfile, select

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
HOSTS = st.lists(st.builds(Host, NAMES, st.integers(1, 1024)), min_size=1, max_size=6, unique_by=lambda host: host.name)


def test_comments_and_empty_lines_are_left_out(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# all of them\nnode1 slots=8\n\n  10.0.0.2\tslots=4  # older\n")
    assert read_hostfile(path) == (Host("node1", 8), Host("10.0.0.2", 4))


@given(HOSTS)
def test_what_is_written_is_read(hosts):
    lines = [f"{host.name} slots={host.slots}" for host in hosts]
    assert parse_hosts(lines, where="here") == tuple(hosts)


@pytest.mark.parametrize(
    "line",
    [
        "node2",
        "node2 slots",
        "node2 slots=",
        "node2 slots=0",
        "node2 slots=-1",
        "node2 slots=two",
        "node2 slots=2.5",
        "node2 slots=99999999999999999999",
        "node2 slots=٣",
        "node2 slots=8 max_slots=9",
        "node2 slots = 8",
        "node2, slots=8",
        "user@node2 slots=8",
        "node2:22 slots=8",
        "-oProxyCommand=x slots=8",
        "node2; slots=8",
        "$(id) slots=8",
        "node[1-2] slots=8",
        "node..2 slots=8",
        "node2- slots=8",
        f"{'a' * 254} slots=8",
        "node1 slots=4",
        "NODE1 slots=4",
    ],
)
def test_a_line_that_is_no_host_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "hostfile"
    path.write_text(f"# heads\nnode1 slots=8\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert f"{path}, line 3" in str(caught.value)


@given(st.text(max_size=30))
def test_no_line_makes_anything_but_a_host_or_an_error(line):
    try:
        hosts = parse_hosts([line], where="here")
    except ConfigError:
        return
    assert len(hosts) == 1
    assert is_host_name(hosts[0].name)
    assert hosts[0].name.isascii()


@pytest.mark.parametrize("text", ["", "# nobody\n\n"])
def test_a_file_without_hosts_is_an_error(tmp_path, text):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert caught.value.where == str(path)


def test_a_file_that_does_not_exist_is_never_a_local_run(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_hostfile(tmp_path / "hostfiel")
    assert caught.value.where == str(tmp_path / "hostfiel")


THREE = (Host("a", 1), Host("b", 2), Host("c", 3))


def test_hosts_are_chosen_in_their_order():
    assert select(THREE, include=["c", "a"], exclude=[]) == (THREE[0], THREE[2])
    assert select(THREE, include=[], exclude=["b"]) == (THREE[0], THREE[2])
    assert select(THREE, include=[], exclude=[]) == THREE


@pytest.mark.parametrize(
    ("include", "exclude"),
    [(["d"], []), ([], ["d"]), (["a"], ["b"]), ([], ["a", "b", "c"])],
)
def test_a_choice_without_sense_is_an_error(include, exclude):
    with pytest.raises(ConfigError):
        select(THREE, include=include, exclude=exclude)
