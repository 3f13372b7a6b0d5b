"""From what hosts said of the network, and of each other's files, to findings."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from m3i_scale.launch.doctor.findings import Finding, fault, good, warning
from m3i_scale.launch.doctor.judge import Answers
from m3i_scale.launch.doctor.network import own_addresses

Pair = tuple[str, str]
SLOW = 2.0
"""A straggler has less than one in so many of the median's bandwidth."""
SLOW_LATENCY = 5.0
"""Latency varies more: beyond this factor of the median it is noted."""


def interface_findings(answers: Answers, interface: str | None) -> Iterator[Finding]:
    """The interface that ranks talk over is up on every host, and has an address."""
    for host, answer in answers.items():
        there: dict[str, list[str]] = answer["interfaces"]
        known = ", ".join(f"{name} {' '.join(found)}" for name, found in there.items() if found)
        if interface is not None and interface not in there:
            why = f"ranks listen on '{interface}' alone (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); up here: {known}"
            fix = "another --interface, or bring it up there; it must have one name on all hosts"
            yield fault("interface", host, f"'{interface}' is not up", why=why, fix=fix)
            continue
        addresses = own_addresses(there, interface)
        if not addresses:
            why = "without an IPv4 address no rank of another host can reach it"
            yield fault("interface", host, interface or known, why=why, fix="an address, or another --interface")
        elif interface is None and len(addresses) > 1:
            why = "several addresses: Gloo takes the one of the host's own name, NCCL the first that it finds"
            yield warning("interface", host, known, why=why, fix="choose with --interface")
        else:
            yield good("interface", host, f"{interface} {' '.join(addresses)}" if interface else known)


def name_findings(answers: Answers, *, chosen: bool) -> Iterator[Finding]:
    """Every host knows every host by its right address.

    Args:
        answers: of the hosts.
        chosen: an interface is given, so that ranks do not ask for the address of their own name.
    """
    for host, answer in answers.items():
        faults, notes = [], []
        for name, told in answer["names"].items():
            own = "fault" not in told and (name == host or name not in answers) and _loopback(told["addresses"])
            wrong = None if own else _wrong_address(name, told, answers)
            if own:  # Debian and Ubuntu give a host's name 127.0.1.1
                notes.append(f"its own name {name} means {', '.join(told['addresses'])}")
            elif wrong:
                faults.append(wrong)
        value = "; ".join(faults or notes) or f"{len(answer['names'])} names are known, with the right addresses"
        fix = "/etc/hosts or the name server of this host"
        if faults:
            yield fault("names", host, value, why="ranks there look for others in the wrong place, and wait", fix=fix)
        elif notes and len(answers) > 1 and not chosen:
            why = "Gloo would listen where no other host can reach it"
            yield fault("names", host, value, why=why, fix=f"--interface, or {fix}")
        else:
            yield good("names", host, value)


def _loopback(addresses: list[str]) -> bool:
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _wrong_address(name: str, told: Mapping[str, Any], answers: Answers) -> str | None:
    if "fault" in told:
        return f"{name} is unknown: {told['fault']}" if name in answers or len(answers) > 1 else None
    if name not in answers:
        return None  # the host is down, and nobody can say what its addresses are
    right = {address for found in answers[name]["interfaces"].values() for address in found}
    wrong = [address for address in told["addresses"] if address.partition("%")[0] not in right]
    return f"{name} means {', '.join(wrong)}, which is no address of that host" if wrong else None


def port_findings(reached: Mapping[str, Mapping[str, Any]], head: str, address: str, port: int) -> Iterator[Finding]:
    """Every host reaches the port where rank 0 will wait."""
    for host, told in reached.items():
        if "fault" not in told:
            yield good("port", host, f"{address}:{port} on {head} in {told['ms']:.1f} ms")
            continue
        why = "rank 0 waits there for the others; they would wait for it until the time is over"
        fix = f"open the port on {head} for {host} (firewall), or choose another: --master-port, --interface"
        yield fault("port", host, f"{address}:{port} on {head}: {told['fault']}", why=why, fix=fix)


def shared_findings(
    notes: Mapping[str, Mapping[str, Any]], seen: Mapping[str, list[str]], folder: str
) -> Iterator[Finding]:
    """The run's folder is one and the same on all hosts.

    Args:
        notes: by host, what became of its note, and its name.
        seen: by host, names of the notes that it has found.
        folder: the head's output_dir.
    """
    head, *_ = notes
    why = "every rank writes its part of a checkpoint there, and waits for files of rank 0"
    fix = "a file system that all hosts mount at the same path; output_dir there"
    for host, note in notes.items():
        if "fault" in note:
            yield fault("shared", host, f"{note['path']}: {note['fault']}", why=why, fix=f"make it writable, or {fix}")
            continue
        missing = [other for other in notes if other != host and notes[other]["name"] not in seen.get(host, [])]
        own = note["name"] in seen.get(head, [])
        if head in missing or not own:
            value = f"{folder} is not the head's: what {head} writes is not seen here"
            yield fault("shared", host, value, why=why, fix=fix)
        else:
            there = len(notes) - 1 - len(missing)
            value = f"{folder}: reads what {there} other hosts write" if len(notes) > 1 else f"{folder}: can be written"
            yield good("shared", host, value)


def pair_findings(measured: Mapping[Pair, Mapping[str, Any]], factor: float = SLOW) -> Iterator[Finding]:
    """All-reduce and all-gather of every two hosts; who is slow with everybody, and which pairs are slow beside that.

    A host counts with its best partner: one slow link makes its own host slow with all, and no other.
    """
    good_pairs = {pair: told for pair, told in measured.items() if "fault" not in told}
    best: dict[str, float] = {}
    for pair, told in good_pairs.items():
        for host in pair:
            best[host] = max(best.get(host, 0.0), told["all_reduce_gb_s"])
    median = statistics.median(best.values()) if best else 0.0
    slow_hosts = {host for host, rate in best.items() if rate * factor < median}
    usual = [told for pair, told in good_pairs.items() if not slow_hosts & set(pair)]
    pair_median = statistics.median(told["all_reduce_gb_s"] for told in usual) if usual else 0.0
    latency = statistics.median(told["latency_us"] for told in good_pairs.values()) if good_pairs else 0.0
    for pair, told in measured.items():
        yield _pair(pair, told, slow_hosts, pair_median, latency, factor)
    for host, own in best.items():
        if len(best) > 2 and host in slow_hosts:
            why = f"the best of its pairs; the median host has {rate(median)}, and all ranks wait for the slowest"
            fix = f"cable, switch port, speed and driver of the interface of {host} (ethtool); or leave it out"
            yield fault("straggler", host, f"{rate(own)} all-reduce", why=why, fix=fix)
        elif len(best) > 2:
            yield good("straggler", host, f"{rate(own)} all-reduce with its best partner")


def _pair(
    pair: Pair, told: Mapping[str, Any], slow_hosts: set[str], median: float, latency: float, factor: float
) -> Finding:
    name = " ↔ ".join(pair)
    if "fault" in told:
        why = "ranks talk over ports of their own beside that of rank 0, in both directions"
        return fault("bandwidth", name, told["fault"], why=why, fix="open all ports between the hosts, or --interface")
    value = figures(told)
    slow = slow_hosts & set(pair)
    if slow:
        return warning("bandwidth", name, value, why=f"{', '.join(sorted(slow))}: see straggler", fix="mend that first")
    if told["all_reduce_gb_s"] * factor < median:
        why = f"less than 1/{factor:g} of the median of {rate(median)}"
        return fault("bandwidth", name, value, why=why, fix="what lies between these two: switches, routes")
    if told["latency_us"] > SLOW_LATENCY * latency:
        why = f"more than {SLOW_LATENCY:g} times the median of {latency:.0f} µs"
        return warning("bandwidth", name, value, why=why, fix="routes, and what else runs on the two hosts")
    return good("bandwidth", name, value)


def group_finding(told: Mapping[str, Any], count: int) -> Finding:
    """All hosts at the same time."""
    if "fault" in told:
        why = "what a training step does cannot be done"
        return fault("group", "all", f"{count} hosts: {told['fault']}", why=why, fix="mend what stands above first")
    return good("group", "all", f"{count} hosts: {figures(told)}")


def figures(told: Mapping[str, Any]) -> str:
    """Of a group, in a line."""
    rates = f"all-reduce {rate(told['all_reduce_gb_s'])}, all-gather {rate(told['all_gather_gb_s'])}"
    return f"{rates}, {told['latency_us']:.0f} µs ({told['backend']})"


def rate(gb_s: float) -> str:
    """A bandwidth for a person."""
    return f"{gb_s:.2f} GB/s" if gb_s >= 0.1 else f"{gb_s * 1e3:.2f} MB/s"
