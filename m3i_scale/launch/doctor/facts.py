"""Collect facts of this host: interpreter, packages, code, config file, devices, interfaces, names, variables, shards.

Every fact is plain JSON. Nothing is evaluated here: `checks.py` compares the answers of all hosts.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

import psutil

from m3i_scale.config import RunConfig, load_run, resource_folder
from m3i_scale.errors import UserError
from m3i_scale.files import sha256_of, sha256_of_json
from m3i_scale.text import is_secret, without_secrets

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "m3i-scale")
_PACKAGE = Path(__file__).resolve().parents[2]
_TELLING = re.compile(r"(NCCL|GLOO|TORCH|DS|OMP|CUDA|UCX|HF|XDG)_\w+|LD_LIBRARY_PATH|PYTHONPATH|TZ|LANG|LC_ALL")
_GIT_S = 5
_MODULE = re.compile(r"^[A-Za-z_]\w*(?:/__init__)?\.py(?=,)", re.MULTILINE)
"""Importable modules, in the file list of an installed package."""
READ_BYTES = 1 << 16
"""Bytes to read of the first shard of every source."""


def software_versions() -> dict[str, Any]:
    """Return the versions of Python and of the packages that a run depends on; None for a missing package."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    if versions["m3i-scale"] is None:  # a checkout on PYTHONPATH
        from m3i_scale import __version__

        versions["m3i-scale"] = __version__
    return {"version": platform.python_version(), "path": sys.executable, "packages": versions}


def incomplete_packages() -> dict[str, str]:
    """Return the incomplete ones of this package's requirements, and why: an interrupted removal or installation may
    leave a version without files."""
    try:
        wanted = [
            re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires("m3i-scale") or [] if "extra ==" not in line
        ]
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        wanted = [name for name in PACKAGES if name != "m3i-scale"]
    incomplete: dict[str, str] = {}
    for name in wanted:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            incomplete[name] = "not installed"
            continue
        modules = _MODULE.findall(installed.read_text("RECORD") or "")  # may be missing with some installers
        gone = [path for path in modules if not Path(str(installed.locate_file(path))).is_file()]
        if gone:
            incomplete[name] = f"installed without {', '.join(gone)}"
    return incomplete


_IN_WHEEL = ("_recipes", "_protocols", "_ds_configs")


def code() -> dict[str, Any]:
    """Hash the package's files, recipes, protocols and DeepSpeed files, one hash over all, and include the commit of a
    checkout."""
    files: dict[str, str] = {}
    folders = [resource_folder("recipes"), resource_folder("protocols"), resource_folder("ds_configs")]
    for folder in (_PACKAGE, *folders):
        for path in sorted(folder.rglob("*")):
            again = path.relative_to(folder).parts[0] in _IN_WHEEL  # read below
            if path.suffix in (".py", ".yaml", ".json") and not again:
                name = f"{folder.name.removeprefix('_')}/{path.relative_to(folder).as_posix()}"
                files[name] = sha256_of(path)[:16]
    return {"sha256": sha256_of_json(files), "commit": commit(), "path": str(_PACKAGE), "files": files}


def commit() -> str | None:
    """Return the commit of the checkout that contains this package; None without one."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(_PACKAGE.parent), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here; the hash is sufficient
        return None
    return done.stdout.strip() or None


def run_file(name: str, overrides: Sequence[str]) -> tuple[RunConfig | None, dict[str, Any]]:
    """Return the run as resolved on this host (see `run_values`), or the error."""
    try:
        run = load_run(name, list(overrides))
        return run, run_values(run)
    except UserError as error:
        return None, {"fault": error.what, "where": error.where, "fix": error.fix}


def run_values(run: RunConfig) -> dict[str, Any]:
    """Return all values of a run and of its DeepSpeed config, and their hash."""
    from m3i_scale.scale.deepspeed.resolve import load_ds_config

    whole = {"run": run.model_dump(mode="json"), "deepspeed": load_ds_config(run.deepspeed)}
    return {"sha256": sha256_of_json(whole), "values": whole}


def devices() -> dict[str, Any]:
    """Return the accelerators found by DeepSpeed."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    kind = accelerator.device_name()
    if kind == "cpu":
        return {"kind": "cpu", "count": os.cpu_count(), "names": [processor()], "driver": None, "memory": None}
    count = accelerator.device_count()
    names: list[str] = []
    if kind == "cuda":
        import torch

        names = [torch.cuda.get_device_name(number) for number in range(count)]
    memory = [accelerator.total_memory(number) for number in range(count)]
    return {"kind": kind, "count": count, "names": names, "driver": _driver(), "memory": memory}


def processor() -> str:
    """Return the name of this host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel module, or AMD's."""
    for path in (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return None


def interfaces() -> dict[str, list[str]]:
    """Return the IPv4 and IPv6 addresses of the interfaces that are up."""
    states = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [address.address.partition("%")[0] for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def local_addresses(interfaces: Mapping[str, list[str]], name: str | None) -> list[str]:
    """Return the IPv4 addresses of an interface, or of all but the loopback."""
    chosen = [name] if name is not None else [known for known in interfaces if known != "lo"]
    return [address for known in chosen for address in interfaces.get(known, []) if ":" not in address]


def names(hosts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the addresses to which this host resolves every name, or the error."""
    addresses: dict[str, dict[str, Any]] = {}
    for host in dict.fromkeys([*hosts, socket.gethostname()]):
        try:
            known = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses[host] = {"addresses": sorted({str(item[4][0]) for item in known})}
        except OSError as error:
            addresses[host] = {"fault": error.strerror or str(error)}
    return addresses


def variables() -> dict[str, str]:
    """Return the environment variables that affect computation or communication of a run, without secrets."""
    return {key: value for key, value in os.environ.items() if _TELLING.fullmatch(key) and not is_secret(key)}


def first_shards(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the first shard of every source, and the number of bytes read here, or the error."""
    return {name: _first_shard(run, name, source.path) for name, source in _sources(run).items()}


def _sources(run: RunConfig) -> dict[str, Any]:
    validation = {f"validation {name}": source for name, source in run.data.validation.items()}
    return {**run.data.datasets, **validation}


def _first_shard(run: RunConfig, name: str, shards: str) -> dict[str, Any]:
    from m3i_scale.data.remote.access import Access
    from m3i_scale.data.remote.address import Url
    from m3i_scale.data.remote.faults import FaultError
    from m3i_scale.data.remote.fetch import facts, read_range
    from m3i_scale.data.shards import expand_shards

    began = time.perf_counter()
    first: Any = without_secrets(shards)
    try:
        first, *rest = expand_shards(shards, f"dataset '{name}'")
        if not isinstance(first, Url):
            with first.open("rb") as file:
                read = len(file.read(READ_BYTES))
        else:
            access = Access(attempts=2, timeout_s=min(run.data.read_timeout_s, 10.0))
            size = facts(first, access).size
            read = len(read_range(first, 0, min(size, READ_BYTES), access))
    except (UserError, FaultError) as error:
        where = error.where if isinstance(error, UserError) else without_secrets(shards)
        return {"shard": where or without_secrets(shards), "fault": without_secrets(str(error).splitlines()[0])}
    except OSError as error:
        return {"shard": str(first), "fault": error.strerror or str(error)}
    more = {"shards": 1 + len(rest), "seconds": time.perf_counter() - began}
    return {"shard": str(first), "read": read, **more} | ({} if read else {"fault": "the shard is empty"})
