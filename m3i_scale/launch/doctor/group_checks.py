"""Turn a rank group's measurements of ports, shared folders and links, one rank per host, into findings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from m3i_scale.launch.doctor.checks import Answers
from m3i_scale.launch.doctor.findings import Finding, finding

Pair = tuple[str, str]
SLOW = 2.0
"""A straggler has less than the median bandwidth divided by this factor."""
SLOW_LATENCY = 5.0
"""Latency varies more: a latency above this multiple of the median is reported."""


def port_findings(answers: Answers, head: str, address: str) -> Iterator[Finding]:
    """Check that every host can connect to rank 0's port."""
    if "fault" in answers[head]["port"]:
        why = "rank 0 waits for the others at that address and port"
        fix = "another --master-port, or what --interface and --master-address say of the head"
        yield finding("port", head, f"{address}: {answers[head]['port']['fault']}", fault=why, fix=fix)
        return
    why = "rank 0 waits there for the others; they would wait for it until the time is over"
    for host, answer in answers.items():
        fix = f"open the port on {head} for {host} (firewall), or choose another: --master-port, --interface"
        if "fault" in answer["port"]:
            yield finding("port", host, f"{address} on {head}: {answer['port']['fault']}", fault=why, fix=fix)
        else:
            took = "is open" if host == head else f"on {head} in {answer['port']['ms']:.1f} ms"
            yield finding("port", host, f"{address} {took}")


def broken_findings(answers: Answers) -> Iterator[Finding]:
    """Report hosts on which the group failed; later checks did not run there."""
    for host, answer in answers.items():
        if "fault" in answer:
            why = "the hosts no longer reach each other through the port of the head, or one of them does not answer"
            yield finding("group", host, answer["fault"], fault=why, fix="mend what stands above first, or ask again")


def shared_findings(answers: Answers) -> Iterator[Finding]:
    """Check that the run's folder is shared by all hosts: each has written a note, and read the others' notes."""
    notes = {host: answer["shared"] for host, answer in answers.items() if "shared" in answer}
    if not notes:
        return
    head = next(iter(notes))
    why = "every rank writes its part of a checkpoint there, and waits for files of rank 0"
    fix = "a file system that all hosts mount at the same path; output_dir there"
    for host, note in notes.items():
        if "fault" in note:
            value = f"{note['path']}: {note['fault']}"
            yield finding("shared", host, value, fault=why, fix=f"make it writable, or {fix}")
            continue
        others = [other for other in note["seen"] if other != host]
        apart = host != head and (head not in note["seen"] or host not in notes[head].get("seen", []))
        value = f"{note['path']}: reads what {len(others)} other hosts write"
        if apart:
            value = f"{note['path']} is not the head's: what {head} writes is not seen here"
        elif len(notes) == 1:
            value = f"{note['path']}: can be written"
        yield finding("shared", host, value, fault=why if apart else None, fix=fix)


def pair_findings(measured: Mapping[Pair, Mapping[str, Any]]) -> Iterator[Finding]:
    """Evaluate the links of all host pairs: which hosts are slow with all others, and which other pairs are slow.

    A host is rated by its best partner: a slow port makes its host slow with all others, and no other host.
    """
    connected = {pair: link for pair, link in measured.items() if "fault" not in link}
    best: dict[str, float] = {}
    for pair, link in connected.items():
        for host in pair:
            best[host] = max(best.get(host, 0.0), link["all_reduce_gb_s"])
    median = statistics.median(best.values()) if best else 0.0
    slow_hosts = {host for host, rate in best.items() if rate * SLOW < median}
    usual = [link["all_reduce_gb_s"] for pair, link in connected.items() if not slow_hosts & set(pair)]
    pair_median = statistics.median(usual) if usual else 0.0
    latency = statistics.median(link["latency_us"] for link in connected.values()) if connected else 0.0
    for pair, link in measured.items():
        yield _pair(pair, link, sorted(slow_hosts & set(pair)), pair_median, latency)
    if len(best) > 2:
        for host, rate in best.items():
            why = f"the best of its pairs; the median host has {rate_text(median)}, and all ranks wait for the slowest"
            fix = f"cable, switch port, speed and driver of the interface of {host} (ethtool); or leave it out"
            value = f"{rate_text(rate)} all-reduce with its best partner"
            yield finding("straggler", host, value, fault=why if host in slow_hosts else None, fix=fix)


def _pair(pair: Pair, told: Mapping[str, Any], slow: list[str], median: float, latency: float) -> Finding:
    name = " ↔ ".join(pair)
    if "fault" in told:
        why = "ranks talk over ports of their own beside that of rank 0, in both directions"
        fix = "open all ports between the hosts, or --interface"
        return finding("bandwidth", name, told["fault"], fault=why, fix=fix)
    value = figures(told)
    if slow:
        return finding("bandwidth", name, value, warning=f"{', '.join(slow)}: see straggler", fix="mend that first")
    if told["all_reduce_gb_s"] * SLOW < median:
        why = f"less than 1/{SLOW:g} of the median of {rate_text(median)}"
        return finding("bandwidth", name, value, fault=why, fix="what lies between these two: switches, routes")
    why = f"more than {SLOW_LATENCY:g} times the median of {latency:.0f} µs"
    late = told["latency_us"] > SLOW_LATENCY * latency
    fix = "routes, and what else runs on the two hosts"
    return finding("bandwidth", name, value, warning=why if late else None, fix=fix)


def group_finding(told: Mapping[str, Any], count: int) -> Finding:
    """Evaluate the concurrent measurement of all hosts."""
    if "fault" in told:
        why = "what a training step does cannot be done"
        value = f"{count} hosts: {told['fault']}"
        return finding("group", "all", value, fault=why, fix="mend what stands above first")
    return finding("group", "all", f"{count} hosts: {figures(told)}")


def slowest(told: list[Mapping[str, Any]], count: int) -> Mapping[str, Any]:
    """Return the slowest result of a group with `count` ranks, or an error."""
    failed = [answer for answer in told if "fault" in answer]
    if failed or len(told) < count:
        return failed[0] if failed else {"fault": "a host has stopped answering"}
    worst = min(told, key=lambda answer: float(answer["all_reduce_gb_s"]))
    return {**worst, "latency_us": max(answer["latency_us"] for answer in told)}


def figures(told: Mapping[str, Any]) -> str:
    """Format a group's measurements as one line."""
    rates = f"all-reduce {rate_text(told['all_reduce_gb_s'])}, all-gather {rate_text(told['all_gather_gb_s'])}"
    return f"{rates}, {told['latency_us']:.0f} µs ({told['backend']})"


def rate_text(gb_s: float) -> str:
    """Format a bandwidth."""
    return f"{gb_s:.2f} GB/s" if gb_s >= 0.1 else f"{gb_s * 1e3:.2f} MB/s"
