"""What stands in an override or in a variable arrives at the rank as it was written, through every shell between."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launch_case import COUNTED, TWO_HOSTS, Teller, a_job, a_script, path_with

from m3i_scale.launch import LaunchPlan
from m3i_scale.launch.execute import write_files
from m3i_scale.launch.slurm import EXIT_REASON
from m3i_scale.launch_command import render

NASTY = (
    "a b",
    "'",
    '"',
    "\\",
    "$HOME",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "&& touch pwned",
    "{0..3}",
    "*",
    "~",
    "%n %h %u %%",
    "100%",
    "!x",
    "#x",
    "é ü 語",
    "-x",
    "a=b",
    ": {x: 1}",
    '\\" $x',
    "\\\\ `",
)
LINES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cn", "Cs", "Zl", "Zp"]), max_size=12)
TEXTS = st.one_of(LINES, st.lists(st.sampled_from(NASTY), max_size=3).map("".join))
VALUES = st.one_of(TEXTS, st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0")))
FUZZ = settings(max_examples=40, deadline=None)


def all_of(examples: tuple[str, ...]):
    """Every one of them is tried, whatever else is."""

    def decorate(test):
        for text in examples:
            test = example(text=text, value=text)(test)
        return test

    return decorate


def the_job(teller: Teller, text: str, value: str, **fields: object):
    return a_job(
        f"text.tokenizer={json.dumps(text, ensure_ascii=False)}",
        output_dir=str(teller.folder / "run"),
        python=str(teller.program),
        workdir=str(teller.folder),
        environment=(f"NASTY={value}",),
        **fields,
    )


def assert_arrived(teller: Teller, value: str, override: str, starts: int) -> list[dict[str, str]]:
    told = [start for start in teller.take() if EXIT_REASON not in start[0]]
    assert len(told) == starts
    for arguments, environment in told:
        assert override in arguments
        assert environment["NASTY"] == value
    assert not list(teller.folder.rglob("pwned"))
    return [environment for _, environment in told]


def run_here(teller: Teller, plan: LaunchPlan, **more: str) -> None:
    """Every command, with `ssh` a shell of this machine, as sshd starts it."""
    for command in plan.commands:
        environment = {"PATH": path_with(teller.folder), "HOME": str(teller.folder), **more, **command.environment}
        done = subprocess.run(
            command.argv, cwd=plan.workdir, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def teller():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        a_script(path, "ssh", 'exec bash -c "${@: -1}"')
        a_script(path, "scontrol", "echo node1")
        a_script(path, "srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
        a_script(path, "sbatch", 'exec bash "$1"')
        yield Teller(path)


@pytest.mark.parametrize("launcher", ["local", "torchrun", "slurm"])
@FUZZ
@given(text=TEXTS, value=VALUES)
@all_of(NASTY)
def test_it_arrives(launcher, teller, text, value):
    fields = {"slurm": COUNTED, "local": {"ranks_per_node": 2}}.get(launcher, TWO_HOSTS)
    job = the_job(teller, text, value, **fields)
    plan = render(launcher, job)
    write_files(plan)
    run_here(
        teller,
        plan,
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_PROCID="1",
        SLURM_LOCALID="1",
        SLURM_NTASKS="4",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_JOB_ID="1",
    )
    told = assert_arrived(teller, value, job.overrides[1], len(plan.commands))
    if launcher in ("slurm", "local"):
        assert told[-1]["RANK"] == "1"


@FUZZ
@given(text=TEXTS, value=VALUES)
@all_of(NASTY)
def test_it_arrives_through_deepspeed_and_pdsh(teller, text, value):
    """DeepSpeed's own runner pastes the line; pdsh's replacement of %n and %% is done here as pdsh 2.35 does it."""
    job = the_job(teller, text, value, **TWO_HOSTS)
    plan = render("deepspeed", job)
    write_files(plan)
    for line in lines_of_deepspeed(plan):
        done = subprocess.run(
            ["bash", "-c", line], cwd="/", env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert_arrived(teller, value, job.overrides[1], 2)


def lines_of_deepspeed(plan: LaunchPlan) -> list[str]:
    """What the shells of the hosts get, according to `deepspeed.launcher`."""
    from deepspeed.launcher import multinode_runner, runner

    (command,) = plan.commands
    arguments = runner.parse_args(command.argv[command.argv.index("deepspeed.launcher.runner") + 1 :])
    hosts = runner.parse_inclusion_exclusion(runner.fetch_hostfile(arguments.hostfile), "", "")
    pdsh = multinode_runner.PDSHRunner(arguments, runner.encode_world_info(hosts))
    for line in Path(command.environment["DS_ENV_FILE"]).read_text(encoding="utf-8").splitlines(keepends=True):
        key, value = line.split("=", maxsplit=1)
        pdsh.add_export(key, value)
    argv, _, _ = pdsh.get_cmd({}, hosts)
    line = " ".join(argv[argv.index("-w") + 2 :])
    line = line.replace(sys.executable, str(plan.commands[0].argv[0]))  # DeepSpeed takes its own
    return [_pdsh(line, place) for place in "01"]


def _pdsh(line: str, place: str) -> str:
    known = {"%%": "%", "%n": place, "%h": f"node{place}", "%u": "me"}
    return re.sub("%[%nhu]", lambda found: known[found.group()], line)


def test_torchrun_knows_all_hosts_and_looks_for_none(teller):
    """A rendezvous that hosts may join or leave complains, when all is over, that the head has left."""
    from torch.distributed.run import config_from_args, parse_args

    plan = render("torchrun", the_job(teller, "", "", hosts=("node1 slots=3", "node2 slots=2"), master_port=29511))
    write_files(plan)
    run_here(teller, plan)
    places = {}
    for arguments, _ in teller.take():
        config, _, _ = config_from_args(parse_args(arguments[2:]))
        places[config.rdzv_configs["rank"]] = (config.rdzv_backend, config.rdzv_endpoint, config.nproc_per_node)
        assert (config.min_nodes, config.max_nodes, config.max_restarts) == (2, 2, 0)
    assert places == {0: ("static", "node1:29511", 3), 1: ("static", "node1:29511", 2)}
