"""Turn the answers of all hosts into findings: comparisons with the master node, and measurements of the group."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from m3i_scale.host.findings import Answers, Check, Finding, HostReport, Results, finding
from m3i_scale.run import software
from m3i_scale.text import listed, size_text

_SLOW = 2.0
"""A straggler has less than the median bandwidth divided by this factor."""
_MAX_LISTED = 4


def local_addresses(interfaces: Mapping[str, list[str]], name: str | None) -> list[str]:
    """Return the IPv4 addresses of an interface, or of all but the loopback."""
    chosen = [name] if name is not None else [known for known in interfaces if known != "lo"]
    return [address for known in chosen for address in interfaces.get(known, []) if ":" not in address]


def _accelerator(host: HostReport) -> Results:
    answer, master, slots = host.answer["devices"], host.master["devices"], host.answer["slots"]
    memory = f", {size_text(min(answer['memory']))} each" if answer["memory"] else ""
    driver = f", driver {answer['driver']}" if answer["driver"] else ""
    models = ", ".join(dict.fromkeys(answer["names"])) or answer["kind"]
    result: dict[str, str | None] = {}
    if answer["kind"] != master["kind"]:
        result["error"] = f"the master node has {master['kind']}, this one {answer['kind']}"
        result["fix"] = "the driver, or CUDA_VISIBLE_DEVICES, of this host"
    elif answer["kind"] != "cpu" and answer["count"] < slots:
        result["error"] = f"{slots} ranks are to run here, one on each"
        result["fix"] = f"slots={answer['count']}, or fix the missing devices"
    elif answer["driver"] != master["driver"]:
        result["warning"] = f"the master node has driver {master['driver']}"
        result["fix"] = "the same driver on all hosts"
    elif answer["count"] < slots:
        result["warning"] = f"{slots} ranks share {answer['count']} cores"
        result["fix"] = f"slots={answer['count']} or fewer"
    elif set(answer["names"]) != set(master["names"]):
        result["warning"] = f"the master node has {', '.join(dict.fromkeys(master['names']))}; all wait for the slowest"
        result["fix"] = "hosts of one kind"
    yield f"{answer['count']} × {models}{memory}{driver}", result


def _interface(host: HostReport) -> Results:
    interfaces, chosen = host.answer["interfaces"], host.answer["interface"]
    known = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in interfaces.items() if addresses)
    addresses = local_addresses(interfaces, chosen)
    if chosen is not None and chosen not in interfaces:
        why = f"Gloo and NCCL listen on '{chosen}' alone (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); up here: {known}"
        fix = "use another --interface, or bring it up there; it must have the same name on all hosts"
        yield f"'{chosen}' is not up", {"error": why, "fix": fix}
    elif not addresses:
        why = "without an IPv4 address no rank of another host can reach it"
        yield chosen or known, {"error": why, "fix": "an address, or another --interface"}
    elif chosen is not None:
        yield f"{chosen} {' '.join(addresses)}", {}
    else:
        why = "several addresses: gloo takes the one on the route to the master node, NCCL the first that it finds"
        yield known, {"warning": why if len(addresses) > 1 else None, "fix": "choose with --interface"}


def _environment(host: HostReport) -> Results:
    answer, master = host.answer["variables"], host.master["variables"]
    names = sorted(name for name in {*answer, *master} if answer.get(name) != master.get(name))
    others = [f"{name}={answer.get(name, '(not set)')}" for name in names]
    why = f"other than on {next(iter(host.answers))}: {listed(others, _MAX_LISTED)}" if others else None
    yield f"{len(answer)} variables compared", {"warning": why, "fix": "send them from here: --env NAME=value"}


def _shards(host: HostReport) -> Results:
    for source, answer in host.answer.get("shards", {}).items():
        name = f"{source}: {answer['shard']}"
        if "error" in answer:
            why = "a rank there would end the run, or wait for ever"
            fix = "mount or copy the shards there; credentials travel with --env NAME"
            yield f"{name}: {answer['error']}", {"error": why, "fix": fix}
        else:
            took = f"{answer['read']:,} bytes of {name} in {answer['seconds'] * 1e3:.1f} ms"
            yield f"{took}, 1 of {answer['shards']} shards", {}


CHECKS: Mapping[str, Check] = {
    **software.CHECKS,
    "accelerator": _accelerator,
    "interface": _interface,
    "environment": _environment,
    "shards": _shards,
}
"""The checks against the master node, in the order of the report."""


def port_findings(answers: Answers, head: str, address: str) -> Iterator[Finding]:
    """Check that every host can connect to rank 0's port."""
    if "error" in answers[head]["port"]:
        why = "rank 0 waits for the others at that address and port"
        fix = "set another --master-port, or correct --interface and --master-address"
        yield finding("port", head, f"{address}: {answers[head]['port']['error']}", error=why, fix=fix)
        return
    why = "rank 0 waits there for the others; they would wait for it until the time is over"
    for host, answer in answers.items():
        fix = f"open the port on {head} for {host} (firewall), or choose another: --master-port, --interface"
        if "error" in answer["port"]:
            yield finding("port", host, f"{address} on {head}: {answer['port']['error']}", error=why, fix=fix)
        else:
            took = "is open" if host == head else f"on {head} in {answer['port']['ms']:.1f} ms"
            yield finding("port", host, f"{address} {took}")


def shared_findings(answers: Answers) -> Iterator[Finding]:
    """Check that the run's folder is shared by all hosts: each has written a note, and read the others' notes."""
    notes = {host: answer["shared"] for host, answer in answers.items() if "shared" in answer}
    if not notes:
        return
    head = next(iter(notes))
    why = "every rank writes its part of a checkpoint there, and waits for files of rank 0"
    fix = "set output_dir to a file system that all hosts mount at the same path"
    for host, note in notes.items():
        if "error" in note:
            value = f"{note['path']}: {note['error']}"
            yield finding("shared", host, value, error=why, fix=f"make it writable, or {fix}")
            continue
        others = [other for other in note["visible"] if other != host]
        apart = host != head and (head not in note["visible"] or host not in notes[head].get("visible", []))
        value = f"{note['path']}: reads what {len(others)} other hosts write"
        if apart:
            value = f"{note['path']} is not that of the master node: what {head} writes is not visible here"
        elif len(notes) == 1:
            value = f"{note['path']}: can be written"
        yield finding("shared", host, value, error=why if apart else None, fix=fix)


def group_findings(answers: Answers, count: int) -> Iterator[Finding]:
    """Evaluate the all-reduce of the `count` hosts that joined, and find slow ones. Ended hosts are missing."""
    errors = [f"{host}: {answer['group_error']}" for host, answer in answers.items() if "group_error" in answer]
    measured = {host: answer["network"] for host, answer in answers.items() if "network" in answer}
    if not errors and len(measured) < count:
        errors = ["a host has stopped answering"]
    if errors:
        why = "ranks use ports of their own besides the port of rank 0, in both directions"
        value = f"{count} hosts: {listed(errors, _MAX_LISTED, '; ')}"
        fix = "open all ports between the hosts, or set --interface; first fix the errors above"
        yield finding("group", "all", value, error=why, fix=fix)
        return
    rate = min(network["all_reduce_gb_s"] for network in measured.values())
    latency = max(network["latency_us"] for network in measured.values())
    backend = next(iter(measured.values()))["backend"]
    yield finding("group", "all", f"{count} hosts: all-reduce {_rate_text(rate)}, {latency:.0f} µs ({backend})")
    if count > 2:
        yield from straggler_findings({host: network["host_gb_s"] for host, network in measured.items()})


def straggler_findings(rates: Mapping[str, float]) -> Iterator[Finding]:
    """Compare the bandwidth of each host, in GB/s with its best partner, with the median."""
    median = statistics.median(rates.values())
    for host, rate in rates.items():
        why = f"the median host has {_rate_text(median)}, and all ranks wait for the slowest"
        fix = f"check cable, switch port, speed and driver of the interface of {host} (ethtool), or leave out the host"
        slow = rate * _SLOW < median
        yield finding("straggler", host, f"{_rate_text(rate)} in each direction", error=why if slow else None, fix=fix)


def _rate_text(gb_s: float) -> str:
    return f"{gb_s:.2f} GB/s" if gb_s >= 0.1 else f"{gb_s * 1e3:.2f} MB/s"
