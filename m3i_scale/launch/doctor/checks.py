"""Turn the reports of all hosts into findings, by a table of checks that compare each host with the master node."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from m3i_scale.files import sha256_of_json
from m3i_scale.launch.doctor.facts import local_addresses
from m3i_scale.launch.doctor.findings import Finding, finding
from m3i_scale.text import listed, redact_text, short_differences, size_text

Answers = Mapping[str, Mapping[str, Any]]
"""Answers by host, the master node first."""
MOST_SKEW_S, NOTED_SKEW_S = 30.0, 1.0
_SHOWN = 4


@dataclass(frozen=True)
class Host:
    """The report of a host, with the reports of the master node and of all others."""

    name: str
    own: Mapping[str, Any]
    head: Mapping[str, Any]
    answers: Answers


def findings_of(answers: Answers, checks: Iterable[str] | None = None) -> Iterator[Finding]:
    """Yield the findings of checks for all hosts.

    Args:
        answers: reports of the hosts about themselves.
        checks: names of the checks, in order. Default: all.
    """
    head = next(iter(answers.values()))
    for check in CHECKS if checks is None else checks:
        for name, own in answers.items():
            for value, rest in CHECKS[check](Host(name, own, head, answers)):
                yield finding(check, name, value, **rest)


def digest(answer: Mapping[str, Any]) -> str:
    """Hash Python, packages, code and config. If the hashes are equal, the checks of these find no fault."""
    python = answer["python"]
    same = [python["version"], python["packages"], answer["code"]["sha256"], answer["config"]["sha256"]]
    return sha256_of_json(same)


Seen = Iterator[tuple[str, dict[str, str | None]]]
"""Values, with `fault`, `warning` and `fix` as arguments of `finding`."""


def _python(host: Host) -> Seen:
    version, head = host.own["python"]["version"], host.head["python"]["version"]
    why = f"the head has {head}: pickled messages between ranks, and compiled extensions, may not fit"
    fix = f"install Python {head}, or give --python"
    yield f"{version} at {host.own['python']['path']}", {"fault": why if version != head else None, "fix": fix}


def _packages(host: Host) -> Seen:
    own, head = host.own["python"]["packages"], host.head["python"]["packages"]
    faults = [f"{name} is {why}" for name, why in host.own["python"].get("incomplete", {}).items()]
    faults += [f"{name} missing" for name in own if own[name] is None]
    faults += [f"{name} {own[name]}, the head has {head[name]}" for name in own if own[name] != head[name]]
    fix = "the same environment on all hosts, installed anew where files are missing"
    yield ", ".join(f"{name} {own[name] or 'missing'}" for name in own), {"fault": "; ".join(faults), "fix": fix}


def _commit(host: Host) -> Seen:
    """Compare the code by its bytes; the commit is only a label."""
    own, head = host.own["code"], host.head["code"]
    value = f"{own['commit'] or 'no commit'}, files {own['sha256'][:12]} in {own['path']}"
    commit = head["commit"] or "no commit"
    if own["sha256"] != head["sha256"]:
        why = f"ranks would differ: {other_files(own, head)}; the head has {commit}"
        yield value, {"fault": why, "fix": "check out or install the same on all hosts"}
    else:
        why = f"the head says {commit}; the files are the same"
        yield value, {"warning": why if own["commit"] != head["commit"] else None, "fix": "nothing, if that is meant"}


def other_files(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """List the first code files that differ between two answers."""
    mine, theirs = own["files"], other["files"]
    return listed(sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)), _SHOWN)


def _config(host: Host) -> Seen:
    if "config" not in host.own:
        return
    own = host.own["config"]
    head = next(answer["config"] for answer in host.answers.values() if "config" in answer)
    if "fault" in own:
        where = f" ({own['where']})" if own["where"] else ""
        fix = own["fix"] or "the same run file at the same path on all hosts"
        yield f"{own['fault']}{where}", {"fault": "ranks there would not start", "fix": fix}
    elif "fault" in head or own["sha256"] == head["sha256"]:
        yield f"sha256 {own['sha256'][:12]}", {}
    else:
        apart = [
            f"{key}: {redact_text(mine)}, not {redact_text(theirs)}"
            for key, theirs, mine in short_differences("", head["values"], own["values"])
        ]
        yield (
            f"sha256 {own['sha256'][:12]}, the head has {head['sha256'][:12]}",
            {
                "fault": f"it differs in {listed(apart, _SHOWN, '; ')}",
                "fix": "the same run file, and the same files that it extends, on all hosts",
            },
        )


def _accelerator(host: Host) -> Seen:
    own, head, slots = host.own["devices"], host.head["devices"], host.own["slots"]
    memory = f", {size_text(min(own['memory']))} each" if own["memory"] else ""
    driver = f", driver {own['driver']}" if own["driver"] else ""
    models = ", ".join(dict.fromkeys(own["names"])) or own["kind"]
    seen: dict[str, str | None] = {}
    if own["kind"] != head["kind"]:
        seen["fault"] = f"the head has {head['kind']}, this one {own['kind']}"
        seen["fix"] = "the driver, or CUDA_VISIBLE_DEVICES, of this host"
    elif own["kind"] != "cpu" and own["count"] < slots:
        seen["fault"] = f"{slots} ranks are to run here, one on each"
        seen["fix"] = f"slots={own['count']}, or mend the others"
    elif own["driver"] != head["driver"]:
        seen["warning"] = f"the head has driver {head['driver']}"
        seen["fix"] = "the same driver on all hosts"
    elif own["count"] < slots:
        seen["warning"] = f"{slots} ranks share {own['count']} cores"
        seen["fix"] = f"slots={own['count']} or fewer"
    elif set(own["names"]) != set(head["names"]):
        seen["warning"] = f"the head has {', '.join(dict.fromkeys(head['names']))}; all wait for the slowest"
        seen["fix"] = "hosts of one kind"
    yield f"{own['count']} × {models}{memory}{driver}", seen


def _interface(host: Host) -> Seen:
    """Check that the communication interface is up and has an address."""
    interfaces, chosen = host.own["interfaces"], host.own["interface"]
    known = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in interfaces.items() if addresses)
    addresses = local_addresses(interfaces, chosen)
    if chosen is not None and chosen not in interfaces:
        why = f"Gloo and NCCL listen on '{chosen}' alone (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); up here: {known}"
        fix = "another --interface, or bring it up there; it must have one name on all hosts"
        yield f"'{chosen}' is not up", {"fault": why, "fix": fix}
    elif not addresses:
        why = "without an IPv4 address no rank of another host can reach it"
        yield chosen or known, {"fault": why, "fix": "an address, or another --interface"}
    elif chosen is not None:
        yield f"{chosen} {' '.join(addresses)}", {}
    else:
        why = "several addresses: gloo takes the one on the route to the head, NCCL the first that it finds"
        yield known, {"warning": why if len(addresses) > 1 else None, "fix": "choose with --interface"}


def _names(host: Host) -> Seen:
    """Check that the host resolves every host name to the right address. Its name may resolve to the loopback: ranks on
    several hosts use the route to the master node."""
    faults, notes = [], []
    for name, told in host.own["names"].items():
        of_itself = name == host.name or name not in host.answers
        if of_itself and "fault" not in told and _loopback(told["addresses"]):  # Debian and Ubuntu: 127.0.1.1
            notes.append(f"its own name {name} means {', '.join(told['addresses'])}")
        elif (wrong := _wrong_address(name, told, host.answers)) is not None:
            faults.append(wrong)
    value = "; ".join(faults or notes) or f"{len(host.own['names'])} names are known, with the right addresses"
    if faults:
        fix = "/etc/hosts or the name server of this host"
        yield value, {"fault": "ranks there look for others in the wrong place, and wait", "fix": fix}
    else:
        yield value, {}


def _loopback(addresses: list[str]) -> bool:
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _wrong_address(name: str, told: Mapping[str, Any], answers: Answers) -> str | None:
    if "fault" in told:
        return f"{name} is unknown: {told['fault']}" if name in answers or len(answers) > 1 else None
    if name not in answers:
        return None  # the host is down, so its addresses are unknown
    right = {address for addresses in answers[name]["interfaces"].values() for address in addresses}
    wrong = [address for address in told["addresses"] if address.partition("%")[0] not in right]
    return f"{name} means {', '.join(wrong)}, which is no address of that host" if wrong else None


def _environment(host: Host) -> Seen:
    """Check that the environment variables that affect a run are the same as on the master node."""
    own, head = host.own["variables"], host.head["variables"]
    names = sorted(name for name in {*own, *head} if own.get(name) != head.get(name))
    others = [f"{name}={own.get(name, '(not set)')}" for name in names]
    why = f"other than on {next(iter(host.answers))}: {listed(others, _SHOWN)}" if others else None
    yield f"{len(own)} variables that change a run", {"warning": why, "fix": "send them from here: --env NAME=value"}


def _shards(host: Host) -> Seen:
    """Check that the first shard of every source can be read."""
    for source, told in host.own.get("shards", {}).items():
        name = f"{source}: {told['shard']}"
        if "fault" in told:
            why = "a rank there would end the run, or wait for ever"
            fix = "mount or copy the shards there; credentials travel with --env NAME"
            yield f"{name}: {told['fault']}", {"fault": why, "fix": fix}
        else:
            took = f"{told['read']:,} bytes of {name} in {told['seconds'] * 1e3:.1f} ms"
            yield f"{took}, 1 of {told['shards']} shards", {}


CHECKS: Mapping[str, Callable[[Host], Seen]] = {
    "python": _python,
    "packages": _packages,
    "commit": _commit,
    "config": _config,
    "accelerator": _accelerator,
    "interface": _interface,
    "names": _names,
    "environment": _environment,
    "shards": _shards,
}
"""The checks against the master node, in the order of the report."""


def clock_findings(offsets: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Compare every host's clock with the master node's clock.

    Args:
        offsets: seconds by which a host is ahead of the requesting machine, and their uncertainty.
    """
    zero, head_error = next(iter(offsets.values()))
    for host, (offset, error) in offsets.items():
        skew, within = offset - zero, error + head_error
        fault = warning = None
        if abs(skew) - within > MOST_SKEW_S:
            fault = "locks and files of other hosts are judged by their age, and signed requests for shards are refused"
        elif abs(skew) - within > NOTED_SKEW_S:
            warning = "logs of the hosts do not line up"
        fix = "a time service on all hosts (chrony, systemd-timesyncd)"
        yield finding("clock", host, f"{skew:+.3f} s ± {within:.3f} s", fault=fault, warning=warning, fix=fix)
