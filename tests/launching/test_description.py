"""One description for all launchers; what one of them cannot honor is an error, never left out."""

import dataclasses
from pathlib import Path

import pytest
from launch_case import FIELDS, OUTPUT, a_job, a_script, path_with

from m3i_scale.errors import ConfigError
from m3i_scale.launch.description import Cluster, read_cluster
from m3i_scale.launch_command import LAUNCHERS, READY_FILES, find_launcher, read_job, render

OTHER_VALUES = {
    "nodes": 3,
    "ranks_per_node": 5,
    "hostfile": None,  # written by the test
    "hosts": ("node3 slots=2", "node4 slots=2"),
    "include": ("node1",),
    "exclude": ("node2",),
    "interface": "eth7",
    "master_address": "10.0.0.7",
    "master_port": 29507,
    "environment": ("A=b",),
    "python": "/data/other/bin/python",
    "workdir": "/data/elsewhere",
    "ssh": ("-4",),
    "transport": "srun",
    "max_restarts": 7,
    "min_nodes": 1,
    "restart_pause_s": 7.0,
    "probe_s": 7.0,
    "silence_s": 77.0,
    "gpus_per_node": 0,
    "cpus_per_rank": 7,
    "partition": "gpu",
    "account": "me",
    "time_limit": "1:00:00",
    "requeue": False,
    "sbatch": ("--qos=high",),
    "container_image": "image:2",
    "container_runtime": "apptainer",
    "container_mounts": ("/data/mounted",),
    "namespace": "me",
    "storage_gib": 7,
    "data_claim": "shards",
}


def fields_with(launcher: str, field: str, hostfile: Path) -> tuple[dict, dict]:
    """Fields that a launcher accepts, and the same with another value of `field`."""
    before = dict(FIELDS[launcher])
    if field == "ranks_per_node" and "hosts" in before:
        before = {"ranks_per_node": 2}
    if field in ("container_runtime", "container_mounts"):
        before["container_image"] = "image:1"
    if field == "transport":
        before = {"ranks_per_node": 2}
    if field == "min_nodes":
        before["max_restarts"] = 1
    after = before | {field: OTHER_VALUES[field]}
    if field == "hostfile":
        hostfile.write_text("node5 slots=2\n")
        after = {key: value for key, value in after.items() if key != "hosts"} | {"hostfile": hostfile}
    return before, after


def rendered(launcher: str, fields: dict) -> dict:
    return render(launcher, a_job(**fields)).document()


def an_allocation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two hosts of Slurm."""
    a_script(folder, "scontrol", "echo n1; echo n2")
    monkeypatch.setenv("PATH", path_with(folder))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")


def test_hosts_of_an_allocation_are_those_of_srun(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        Cluster(transport="srun", ranks_per_node=2).named_hosts()
    assert caught.value.where == "transport: srun"
    an_allocation(tmp_path, monkeypatch)
    hosts = Cluster(transport="srun", ranks_per_node=2, exclude=("n1",)).named_hosts()
    assert [(host.name, host.slots) for host in hosts] == [("n2", 2)]
    with pytest.raises(ConfigError):
        Cluster(transport="srun").named_hosts()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert [host.slots for host in Cluster(transport="srun").named_hosts()] == [4, 4]


@pytest.mark.parametrize("name", ["n1,n2", "n[1-2]", "/etc/hosts", "n1"])
def test_what_slurm_names_and_srun_would_read_otherwise_is_refused(name, tmp_path, monkeypatch):
    an_allocation(tmp_path, monkeypatch)
    a_script(tmp_path, "scontrol", f"echo n1; echo '{name}'")
    with pytest.raises(ConfigError) as caught:
        Cluster(transport="srun", ranks_per_node=2).named_hosts()
    assert "SLURM_JOB_NODELIST" in str(caught.value.where)


def test_a_number_of_machines_beside_an_allocation_is_answered_with_what_srun_takes():
    strange = Cluster.model_construct(_fields_set={"nodes"}, nodes=2, transport="srun")
    with pytest.raises(ConfigError) as caught:
        render("elastic", dataclasses.replace(a_job(), cluster=strange))
    assert "--hostfile" not in str(caught.value.fix)


def test_every_field_is_tried_here():
    assert set(OTHER_VALUES) == set(Cluster.model_fields)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_field_that_is_honoured_changes_something(launcher, tmp_path, monkeypatch):
    an_allocation(tmp_path, monkeypatch)
    idle = []
    for field in find_launcher(launcher).HONORS:
        before, after = fields_with(launcher, field, tmp_path / "hostfile")
        if rendered(launcher, before) == rendered(launcher, after):
            idle.append(field)
    assert idle == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_field_without_effect_is_an_error(launcher):
    job = a_job()
    for field in set(OTHER_VALUES) - set(find_launcher(launcher).HONORS):
        fields = {field: OTHER_VALUES[field] or Path("/data/hostfile")}
        strange = Cluster.model_construct(_fields_set=set(fields), **fields)  # whatever it would need beside it
        with pytest.raises(ConfigError) as caught:
            render(launcher, type(job)(**{**vars(job), "cluster": strange}))
        assert str(caught.value.where).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nods": 2}, "unknown key 'nods'"),
        ({"hosts": ["a slots=1"], "hostfile": "x"}, "both name the hosts"),
        ({"hosts": ["a slots=1"], "nodes": 1}, "`nodes` has no effect where hosts are named"),
        ({"include": ["a"]}, "`include` has no effect where no hosts are named"),
        ({"ssh": ["-4"]}, "`ssh` has no effect where no hosts are named"),
        ({"transport": "srun", "hosts": ["a slots=1"]}, "`hosts` has no effect with srun"),
        ({"container_runtime": "pyxis"}, "no effect without `container_image`"),
        ({"time_limit": "24h"}, "no time limit"),
        ({"time_limit": "0:00:00"}, "no time limit"),
        ({"interface": "eth0; id"}, "interface"),
        ({"master_address": "a b"}, "no host name"),
        ({"python": "venv/bin/python"}, "another place on every host"),
        ({"workdir": "/data\n"}, "one line"),
        ({"sbatch": ["--qos=a\n#SBATCH --x"]}, "one line"),
        ({"partition": "a b"}, "letters"),
        ({"container_image": "-v"}, "no image"),
        ({"environment": ["1A=b"]}, "no name of an environment variable"),
        ({"environment": ["A=b", "A"]}, "named twice"),
        ({"environment": ["RANK=0"]}, "set by the launcher"),
        ({"environment": ["NCCL_SOCKET_IFNAME=eth0"]}, "set by `interface`"),
        ({"environment": ["HF_TOKEN=hf_abc"]}, "write the name alone"),
    ],
)
def test_a_description_that_does_not_hold_together_is_an_error(fields, said):
    with pytest.raises(ConfigError) as caught:
        read_cluster(None, fields)
    assert said in str(caught.value)
    assert "hf_abc" not in str(caught.value)


def test_options_take_the_place_of_what_the_file_says(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("hostfile: hosts.txt\ninterface: eth0\nssh: ['-4']\n")
    assert read_cluster(path, {}).hostfile == tmp_path / "hosts.txt"
    cluster = read_cluster(path, {"interface": "eth1", "hosts": ["a slots=1"], "nodes": None, "include": []})
    assert (cluster.interface, cluster.hosts, cluster.hostfile) == ("eth1", ("a slots=1",), None)
    assert cluster.ssh == ("-4",)


@pytest.mark.parametrize("nobody", ["hostfile:", "hostfile: null", "hosts: []"])
def test_a_description_that_has_forgotten_its_hosts_is_never_a_local_run(tmp_path, nobody):
    path = tmp_path / "cluster.yaml"
    path.write_text(f"{nobody}\nranks_per_node: 8\n")
    with pytest.raises(ConfigError) as caught:
        read_cluster(path, {})
    assert str(path) in str(caught.value.where)
    path.write_text(f"{nobody}\n")
    assert read_cluster(path, {"hosts": ["a slots=1"]}).hosts == ("a slots=1",)


def test_a_file_that_is_no_description_is_named(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("[1")
    with pytest.raises(ConfigError) as caught:
        read_cluster(path, {})
    assert str(path) in str(caught.value.where)
    path.write_text("intrface: eth0\n")
    with pytest.raises(ConfigError) as caught:
        read_cluster(path, {})
    assert "'interface'" in str(caught.value.fix)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "local"])
def test_several_machines_must_have_names(launcher):
    fields = {"nodes": 2, "ranks_per_node": 2}
    with pytest.raises(ConfigError) as caught:
        render(launcher, a_job(**fields))
    assert caught.value.where == "nodes: 2"


@pytest.mark.parametrize("launcher", READY_FILES)
def test_a_launcher_that_people_start_themselves_has_a_ready_file(launcher):
    with pytest.raises(ConfigError) as caught:
        render(launcher, a_job())
    assert caught.value.where == "--with"
    assert f"launchers/{launcher}.sh" in str(caught.value.fix)


def test_hosts_that_are_one_machine_are_refused():
    for name, other in (("localhost", "node2"), ("127.0.0.1", "node2")):
        with pytest.raises(ConfigError) as caught:
            a_job(hosts=(f"{name} slots=2", f"{other} slots=2"))
        assert caught.value.where == f"hosts: {name}, {other}"
        assert f"'{name}'" in caught.value.what
    assert len(a_job(hosts=("localhost slots=2",)).hosts) == 1


def test_the_address_of_an_interface_of_another_machine_is_not_guessed():
    with pytest.raises(ConfigError) as caught:
        render("torchrun", a_job(hosts=("node1 slots=2", "node2 slots=2"), interface="eth0"))
    assert caught.value.where == "interface: eth0"
    assert "--master-address" in str(caught.value.fix)


def test_the_head_waits_at_the_address_of_the_interface():
    (command,) = render("deepspeed", a_job(hosts=("localhost slots=2",), interface="lo")).commands
    assert "--master_addr=127.0.0.1" in command.argv
    with pytest.raises(ConfigError) as caught:
        render("deepspeed", a_job(hosts=("localhost slots=2",), interface="eth77"))
    assert caught.value.where == "interface: eth77"


def test_paths_are_absolute_on_all_hosts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: m3i\n")
    _, job = read_job("mine.yaml", [], Cluster(ranks_per_node=1))
    assert job.run == str(tmp_path / "mine.yaml")
    assert job.folder == tmp_path / "runs" / "run" / "launch"
    assert a_job().folder == Path(OUTPUT) / "launch"
