"""From what all hosts said to findings: each is held against the head, which is the first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3i_scale.launch.doctor.findings import Finding, fault, gib, good, warning
from m3i_scale.text import shown

Answers = Mapping[str, Mapping[str, Any]]
"""By host, in the order of the hosts; those that answered."""
MOST_SKEW_S, NOTED_SKEW_S = 30.0, 1.0
_SHOWN = 4


def digest(answer: Mapping[str, Any]) -> str:
    """Hash Python, packages, code and run file: equal where the findings about them have no fault."""
    python = answer["python"]
    same = [python["version"], python["packages"], answer["code"]["sha256"], answer["config"]["sha256"]]
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def python_findings(answers: Answers) -> Iterator[Finding]:
    """One Python on all hosts."""
    head = next(iter(answers.values()))["python"]["version"]
    for host, answer in answers.items():
        python = answer["python"]
        value = f"{python['version']} at {python['path']}"
        if python["version"] == head:
            yield good("python", host, value)
            continue
        why = f"the head has {head}: pickled messages between ranks, and compiled extensions, may not fit"
        yield fault("python", host, value, why=why, fix=f"install Python {head}, or give --python")


def package_findings(answers: Answers) -> Iterator[Finding]:
    """Check that every package has one version on all hosts, with its files."""
    head = next(iter(answers.values()))["python"]["packages"]
    for host, answer in answers.items():
        own = answer["python"]["packages"]
        value = ", ".join(f"{name} {own[name] or 'missing'}" for name in own)
        faults = [f"{name} is {why}" for name, why in answer["python"].get("incomplete", {}).items()]
        faults += [f"{name} missing" for name in own if own[name] is None]
        faults += [f"{name} {own[name]}, the head has {head[name]}" for name in own if own[name] != head[name]]
        if not faults:
            yield good("packages", host, value)
            continue
        fix = "the same environment on all hosts, installed anew where files are missing"
        yield fault("packages", host, value, why="; ".join(faults), fix=fix)


def code_findings(answers: Answers) -> Iterator[Finding]:
    """The same code on all hosts: the bytes count, the commit only names them."""
    head = next(iter(answers.values()))["code"]
    for host, answer in answers.items():
        own = answer["code"]
        value = f"{own['commit'] or 'no commit'}, files {own['sha256'][:12]} in {own['path']}"
        if own["sha256"] != head["sha256"]:
            why = f"ranks would differ: {other_files(own, head)}; the head has {head['commit'] or 'no commit'}"
            yield fault("commit", host, value, why=why, fix="check out or install the same on all hosts")
        elif own["commit"] != head["commit"]:
            why = f"the head says {head['commit'] or 'no commit'}; the files are the same"
            yield warning("commit", host, value, why=why, fix="nothing, if that is meant")
        else:
            yield good("commit", host, value)


def other_files(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name the files of the code that differ between two answers, the first ones."""
    mine, theirs = own["files"], other["files"]
    names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def config_findings(answers: Answers) -> Iterator[Finding]:
    """One run file on all hosts, everything it extends, overrides and the DeepSpeed file included."""
    known = {host: answer["config"] for host, answer in answers.items() if "config" in answer}
    head: Mapping[str, Any] = next(iter(known.values()), {})
    for host, own in known.items():
        if "fault" in own:
            where = f" ({own['where']})" if own["where"] else ""
            fix = own["fix"] or "the same run file at the same path on all hosts"
            yield fault("config", host, f"{own['fault']}{where}", why="ranks there would not start", fix=fix)
        elif "fault" in head or own["sha256"] == head["sha256"]:
            yield good("config", host, f"sha256 {own['sha256'][:12]}")
        else:
            yield fault(
                "config",
                host,
                f"sha256 {own['sha256'][:12]}, the head has {head['sha256'][:12]}",
                why=f"it differs in {_different(own['values'], head['values'])}",
                fix="the same run file, and the same files that it extends, on all hosts",
            )


def _different(own: Mapping[str, str], head: Mapping[str, str]) -> str:
    keys = sorted(key for key in {*own, *head} if own.get(key) != head.get(key))
    told = [f"{key}: {shown(own.get(key, 'not there'))}, not {shown(head.get(key, 'there'))}" for key in keys[:_SHOWN]]
    return "; ".join(told) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def clock_findings(offsets: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Clocks against the head's.

    Args:
        offsets: seconds by which a host is ahead of the machine that asks, and how uncertain that is.
    """
    zero, head_error = next(iter(offsets.values()))
    for host, (offset, error) in offsets.items():
        skew, within = offset - zero, error + head_error
        value = f"{skew:+.3f} s ± {within:.3f} s"
        fix = "a time service on all hosts (chrony, systemd-timesyncd)"
        if abs(skew) - within > MOST_SKEW_S:
            why = "locks and files of other hosts are judged by their age, and signed requests for shards are refused"
            yield fault("clock", host, value, why=why, fix=fix)
        elif abs(skew) - within > NOTED_SKEW_S:
            yield warning("clock", host, value, why="logs of the hosts do not line up", fix=fix)
        else:
            yield good("clock", host, value)


def device_findings(answers: Answers, slots: Mapping[str, int]) -> Iterator[Finding]:
    """The same devices and driver on all hosts, one for every rank."""
    head = next(iter(answers.values()))["devices"]
    for host, answer in answers.items():
        own = answer["devices"]
        memory = f", {gib(min(own['memory']))} each" if own["memory"] else ""
        driver = f", driver {own['driver']}" if own["driver"] else ""
        models = ", ".join(dict.fromkeys(own["names"])) or own["kind"]
        value = f"{own['count']} × {models}{memory}{driver}"
        if own["kind"] != head["kind"]:
            why = f"the head has {head['kind']}, this one {own['kind']}"
            yield fault("accelerator", host, value, why=why, fix="the driver, or CUDA_VISIBLE_DEVICES, of this host")
        elif own["kind"] != "cpu" and own["count"] < slots[host]:
            why = f"{slots[host]} ranks are to run here, one on each"
            yield fault("accelerator", host, value, why=why, fix=f"slots={own['count']}, or mend the others")
        elif own["driver"] != head["driver"]:
            why = f"the head has driver {head['driver']}"
            yield warning("accelerator", host, value, why=why, fix="the same driver on all hosts")
        elif own["kind"] == "cpu" and own["count"] < slots[host]:
            why = f"{slots[host]} ranks share {own['count']} cores"
            yield warning("accelerator", host, value, why=why, fix=f"slots={own['count']} or fewer")
        elif set(own["names"]) != set(head["names"]):
            why = f"the head has {', '.join(dict.fromkeys(head['names']))}; all wait for the slowest"
            yield warning("accelerator", host, value, why=why, fix="hosts of one kind")
        else:
            yield good("accelerator", host, value)


def variable_findings(answers: Answers, sent: Sequence[str]) -> Iterator[Finding]:
    """Variables that were sent have arrived, and no host has others of its own that change a run."""
    head_host, head = next(iter((host, answer["variables"]) for host, answer in answers.items()))
    for host, answer in answers.items():
        lost = [name for name in sent if not answer["received"].get(name)]
        own = answer["variables"]
        if lost:
            why = "the login shell of the host, or what it runs at its start, drops or changes them"
            fix = "look into ~/.bashrc and /etc/profile.d there"
            yield fault("environment", host, f"{', '.join(lost)} did not arrive as sent", why=why, fix=fix)
            continue
        other = sorted(name for name in {*own, *head} if own.get(name) != head.get(name))
        value = f"{len(sent)} of {len(sent)} variables arrived"
        if other:
            told = [f"{name}={own.get(name, '(not set)')}" for name in other[:_SHOWN]]
            why = f"other than on {head_host}: {', '.join(told)}" + (" …" if len(other) > _SHOWN else "")
            yield warning("environment", host, value, why=why, fix="send them from here: --env NAME=value")
        else:
            yield good("environment", host, value)


def shard_findings(answers: Answers) -> Iterator[Finding]:
    """The first shard of every source can be read on every host."""
    for host, answer in answers.items():
        for source, told in answer.get("shards", {}).items():
            name = f"{source}: {told['shard']}"
            if "fault" in told:
                why = "a rank there would end the run, or wait for ever"
                fix = "mount or copy the shards there; credentials travel with --env NAME"
                yield fault("shards", host, f"{name}: {told['fault']}", why=why, fix=fix)
            elif "skipped" in told:
                yield warning("shards", host, name, why=told["skipped"], fix="look at it with `m3i-scale shards peek`")
            else:
                took = f"{told['read']:,} bytes of {name} in {told['seconds'] * 1e3:.1f} ms"
                yield good("shards", host, f"{took}, 1 of {told['shards']} shards")
