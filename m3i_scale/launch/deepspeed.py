"""Write the inputs of the `deepspeed` launcher: its hostfile, environment file and command line.

DeepSpeed 0.19.8 (launcher/runner.py, launcher/multinode_runner.py) with pdsh pastes everything into one line for the
hosts' shells. It puts a value of `.deepspeed_env` with any unusual character in double quotes, unchanged. It does the
same with an argument that contains a space, but escapes its double quotes; it pastes other arguments bare. pdsh then
replaces `%h`, `%n` and `%u`. Values that cannot survive that, or must not appear on a command line or in a log, go into
a file that the hosts read (`--venv_script`).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence

from m3i_scale.errors import ConfigError
from m3i_scale.launch import OVER_HOSTS, PRIVATE, Command, Executable, LaunchFile, LaunchPlan, shell
from m3i_scale.launch.description import Variable
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.job import Job

HONORS = OVER_HOSTS
HOSTFILE = "hostfile"
ENVIRONMENT = "deepspeed_env"
PRIVATE_ENVIRONMENT = "environment.sh"
_MODULE = "deepspeed.launcher.runner"
_SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
"""Variable with arguments that pdsh passes to ssh; a user's value precedes the ones added here."""
_PASTED = re.compile(r"[\w@+=:,./-]+", re.ASCII)
"""Text that a shell and pdsh leave unchanged."""


def render(job: Job) -> LaunchPlan:
    """Return files and the launcher's command."""
    return _by_pdsh(job) if job.hosts else _on_this_machine(job)


def hostfile(hosts: Sequence[Host]) -> LaunchFile:
    """Return a hostfile with a line for every host."""
    return LaunchFile(HOSTFILE, "".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def _on_this_machine(job: Job) -> LaunchPlan:
    # A separate file, because otherwise an existing /job/hostfile would be used.
    here = Host("localhost", job.ranks_per_node)
    variables = {variable.name: variable.value for variable in job.variables}
    return LaunchPlan(
        launcher="deepspeed",
        folder=job.folder,
        files=(hostfile([here]),),
        commands=(Command(_argv(job, ["--no_ssh_check"], job.train), variables),),
        workdir=job.workdir,
        needs=shell.needs(job),
        stops=shell.stop_commands(job),
        port=job.cluster.master_port,
    )


def _by_pdsh(job: Job) -> LaunchPlan:
    for what, path in (("working directory", str(job.workdir)), ("interpreter", job.python)):
        if not _PASTED.fullmatch(path):
            raise ConfigError(
                f"the path of the {what} must not need quotes: DeepSpeed pastes it into a shell command",
                where=path,
                fix="use a path of letters, digits and @ + = : , . / - _, or `--with torchrun`",
            )
    for word in job.cluster.ssh:
        if re.search(r"\s", word):
            raise ConfigError(
                f"an argument of ssh must not have spaces with pdsh, got {word!r}",
                where="ssh",
                fix="set the option in ~/.ssh/config",
            )
    public = [variable for variable in job.plain if _survives(variable.value)]
    private = [variable for variable in job.variables if variable not in public]
    files = [hostfile(job.hosts), LaunchFile(ENVIRONMENT, "".join(map(_environment_line, public)))]
    options = ["--launcher=pdsh", "--no_ssh_check", "--force_multi"]
    if private:
        script = job.folder / PRIVATE_ENVIRONMENT
        files.append(LaunchFile(PRIVATE_ENVIRONMENT, "\n".join(shell.export_lines(private)) + "\n", PRIVATE))
        options.append(f"--venv_script={_for_pdsh(shlex.quote(str(script)))}")
    limits = [f"-o{option}" for option in ("BatchMode=yes", *shell.UNLESS_GIVEN)]
    variables = {
        "DS_ENV_FILE": str(job.folder / ENVIRONMENT),
        _SSH_ARGUMENTS: " ".join(filter(None, [*job.cluster.ssh, os.environ.get(_SSH_ARGUMENTS), *limits])),
    }
    return LaunchPlan(
        launcher="deepspeed",
        folder=job.folder,
        files=tuple(files),
        commands=(Command(_argv(job, options, map(_pasted, job.train)), variables),),
        workdir=job.workdir,
        needs=(Executable("pdsh", "apt-get install pdsh"), *shell.needs(job)),
        stops=shell.stop_commands(job),
    )


def _argv(job: Job, options: Iterable[str], train: Iterable[str]) -> tuple[str, ...]:
    launcher = (job.python, "-m", _MODULE, f"--hostfile={job.folder / HOSTFILE}")
    rendezvous = (f"--master_addr={job.head_address()}", f"--master_port={job.cluster.master_port}")
    return (*launcher, *rendezvous, *options, "--no_local_rank", "--module", *train)


def _survives(value: str) -> bool:
    """Return whether `.deepspeed_env` can carry a value: one line, no outer spaces, no pdsh placeholder."""
    return value == value.strip() and value.isprintable() and "%" not in value and value != ""


def _environment_line(variable: Variable) -> str:
    """Return a line of `.deepspeed_env`, escaped because DeepSpeed puts the value in double quotes."""
    value = re.sub(r'(["\\$`])', r"\\\1", variable.value)
    return f"{variable.name}={value}\n"


def _pasted(word: str) -> str:
    """Escape an argument for DeepSpeed and pdsh (see the module docstring), so that a rank gets `word`."""
    text = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return _for_pdsh(text)


def _for_pdsh(text: str) -> str:
    return text.replace("%", "%%")
