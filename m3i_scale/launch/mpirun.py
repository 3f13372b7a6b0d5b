"""`mpirun`: Open MPI, or MPICH and Intel MPI with their Hydra. Ranks read their place from the variables of either."""

from __future__ import annotations

from m3i_scale.launch import ssh
from m3i_scale.launch.job import OVER_HOSTS, Job
from m3i_scale.launch.plan import Command, Executable, LaunchFile, LaunchPlan

HONOURS = OVER_HOSTS | {"mpi"}
HOSTFILE = "hostfile"


def render(job: Job) -> LaunchPlan:
    """A hostfile and the command. Values of variables stay in its environment; the command line has their names."""
    open_mpi = job.cluster.mpi == "openmpi"
    variables = {
        **{variable.name: variable.value for variable in job.variables},
        "MASTER_ADDR": job.head_address(),
        "MASTER_PORT": str(job.cluster.master_port),
    }
    argv = _open_mpi(job, list(variables)) if open_mpi else _hydra(job, list(variables))
    needed = (
        Executable("ompi_info", "apt-get install openmpi-bin, or for another MPI `mpi: hydra`")
        if open_mpi
        else Executable("mpiexec.hydra", "apt-get install mpich")
    )
    if open_mpi:
        variables |= open_mpi_settings(job)
    elif job.cluster.ssh:
        variables["HYDRA_LAUNCHER_EXTRA_ARGS"] = " ".join(job.cluster.ssh)
    return LaunchPlan(
        launcher="mpirun",
        folder=job.folder,
        files=(_hostfile(job),) if job.hosts else (),
        commands=(Command((*argv, *job.rank_argv), variables),),
        workdir=job.workdir,
        needs=(needed, *ssh.needs(job)),
        stops=ssh.stop_commands(job),
        port=None if job.hosts else job.cluster.master_port,
    )


def _hostfile(job: Job) -> LaunchFile:
    slots = " slots=" if job.cluster.mpi == "openmpi" else ":"
    return LaunchFile(HOSTFILE, "".join(f"{host.name}{slots}{host.slots}\n" for host in job.hosts))


def open_mpi_settings(job: Job) -> dict[str, str]:
    """Its parameters for ssh and the interface, by variables: options for them differ between versions 4 and 5."""
    settings = {}
    if job.cluster.interface is not None:
        settings["OMPI_MCA_oob_tcp_if_include"] = settings["PRTE_MCA_prte_if_include"] = job.cluster.interface
        settings["OMPI_MCA_btl_tcp_if_include"] = settings["PMIX_MCA_ptl_tcp_if_include"] = job.cluster.interface
    if job.cluster.ssh:
        settings["OMPI_MCA_plm_rsh_args"] = settings["PRTE_MCA_plm_ssh_args"] = " ".join(job.cluster.ssh)
    return settings


def _open_mpi(job: Job, names: list[str]) -> list[str]:
    argv = ["mpirun", "-n", str(job.world_size)]
    # On one machine more ranks than cores are nobody's business but the user's.
    argv += ["--hostfile", str(job.folder / HOSTFILE)] if job.hosts else ["--oversubscribe"]
    argv += ["--wdir", str(job.workdir), "--bind-to", "none"]
    for name in names:
        argv += ["-x", name]
    return argv


def _hydra(job: Job, names: list[str]) -> list[str]:
    argv = ["mpiexec.hydra", "-n", str(job.world_size)]
    if job.hosts:
        argv += ["-launcher", "ssh", "-f", str(job.folder / HOSTFILE)]
    if job.cluster.interface is not None:
        argv += ["-iface", job.cluster.interface]
    return [*argv, "-wdir", str(job.workdir), "-genvlist", ",".join(names)]
