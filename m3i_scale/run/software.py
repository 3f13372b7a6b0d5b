"""Identify the software of this host (Python, packages, code, config), and compare it between hosts. A fact is plain
JSON, because hosts send it to each other."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from m3i_scale.config import RunConfig, resource_folder
from m3i_scale.files import sha256_of, sha256_of_json
from m3i_scale.host.findings import Check, HostReport, Results
from m3i_scale.text import listed, redact_text, short_differences

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "m3i-scale")
_PACKAGE = Path(__file__).resolve().parents[1]
_GIT_S = 5
_MAX_LISTED = 4


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


_IN_WHEEL = ("_recipes", "_protocols", "_ds_configs")


def code() -> dict[str, Any]:
    """Hash the package's files, recipes, protocols and DeepSpeed files, with the commit of a checkout."""
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


def run_values(run: RunConfig) -> dict[str, Any]:
    """Return all values of a run and of its DeepSpeed config, and their hash."""
    from m3i_scale.engine.deepspeed.resolve import load_ds_config
    from m3i_scale.engine.deepspeed.schema import AUTO

    raw = None if run.deepspeed == AUTO else load_ds_config(run.deepspeed)
    values = {"run": run.model_dump(mode="json"), "deepspeed": raw}
    return {"sha256": sha256_of_json(values), "values": values}


def digest(answer: Mapping[str, Any]) -> str:
    """Hash Python, packages, code and config. If the hashes are equal, the checks of these find no error."""
    python = answer["python"]
    same = [python["version"], python["packages"], answer["code"]["sha256"], answer["config"]["sha256"]]
    return sha256_of_json(same)


def _python(host: HostReport) -> Results:
    version, expected = host.answer["python"]["version"], host.master["python"]["version"]
    why = f"the master node has {expected}: pickled messages between ranks, and compiled extensions, may not fit"
    fix = f"install Python {expected}, or set --python"
    yield f"{version} at {host.answer['python']['path']}", {"error": why if version != expected else None, "fix": fix}


def _packages(host: HostReport) -> Results:
    answer, master = host.answer["python"]["packages"], host.master["python"]["packages"]
    errors = [f"{name} missing" for name in answer if answer[name] is None]
    differing = [name for name in answer if answer[name] != master[name]]
    errors += [f"{name} {answer[name]}, the master node has {master[name]}" for name in differing]
    value = ", ".join(f"{name} {answer[name] or 'missing'}" for name in answer)
    yield value, {"error": "; ".join(errors), "fix": "the same environment on all hosts"}


def _commit(host: HostReport) -> Results:
    """Compare the code by its bytes; the commit is only a label."""
    answer, master = host.answer["code"], host.master["code"]
    value = f"{answer['commit'] or 'no commit'}, files {answer['sha256'][:12]} in {answer['path']}"
    why = None
    if answer["sha256"] != master["sha256"]:
        commit = master["commit"] or "no commit"
        why = f"ranks would differ: {other_files(answer, master)}; the master node has {commit}"
    yield value, {"error": why, "fix": "check out or install the same on all hosts"}


def other_files(answer: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """List the first code files that differ between two answers."""
    mine, theirs = answer["files"], other["files"]
    return listed(sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)), _MAX_LISTED)


def _config(host: HostReport) -> Results:
    if "config" not in host.answer:
        return
    answer = host.answer["config"]
    master = next(other["config"] for other in host.answers.values() if "config" in other)
    if "error" in answer:
        where = f" ({answer['where']})" if answer["where"] else ""
        fix = answer["fix"] or "put the same config file at the same path on all hosts"
        yield f"{answer['error']}{where}", {"error": "ranks there would not start", "fix": fix}
    elif "error" in master or answer["sha256"] == master["sha256"]:
        yield f"sha256 {answer['sha256'][:12]}", {}
    else:
        apart = [
            f"{key}: {redact_text(mine)}, not {redact_text(theirs)}"
            for key, theirs, mine in short_differences("", master["values"], answer["values"])
        ]
        yield (
            f"sha256 {answer['sha256'][:12]}, the master node has {master['sha256'][:12]}",
            {
                "error": f"it differs in {listed(apart, _MAX_LISTED, '; ')}",
                "fix": "put the same config file, and the files that it extends, on all hosts",
            },
        )


CHECKS: Mapping[str, Check] = {"commit": _commit, "python": _python, "packages": _packages, "config": _config}
"""Comparisons with the master node."""
