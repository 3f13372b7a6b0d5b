"""`m3i-scale doctor`: the command and its table. Slow imports happen inside the function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.launch import OVER_HOSTS
from m3i_scale.launch.description import Cluster, takes_cluster
from m3i_scale.options import AsJson, Overrides
from m3i_scale.output import leave_out_accelerator_warning, print_result, wide_console
from m3i_scale.text import listed

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}
_NAMED = 2
_SHOWN = 3


@takes_cluster(field for field in Cluster.model_fields if field in {*OVER_HOSTS, "transport"})
def doctor(
    cluster: Cluster,
    run: Annotated[str | None, typer.Argument(help="Config file, or the name of a built-in config.")] = None,
    overrides: Overrides = None,
    connect_s: Annotated[
        float, typer.Option("--connect-timeout", min=1, metavar="S", help="Timeout of ssh in seconds.")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Check that all hosts are ready: ssh, versions, code, devices, memory, files, network and shards.

    Exit with code 2 if a check fails on any host.
    """
    leave_out_accelerator_warning()
    from m3i_scale.elastic.doctor.command import examine
    from m3i_scale.host.findings import errors_in

    findings = examine(
        run, overrides or [], cluster, connect_s=connect_s, log=wide_console(stderr=True, soft_wrap=True).print
    )
    rows = [finding.to_json() for finding in findings]
    print_result(as_json, rows, lambda: doctor_table(rows))
    if errors_in(findings):
        raise typer.Exit(EXIT_USER_ERROR)


def doctor_table(findings: Iterable[Mapping[str, Any]]) -> Group:
    """Return a table of environment checks and the totals. Passed checks share a line; others have one per host."""
    table = Table("", "check", "host", "found", box=None, pad_edge=False)
    counts = dict.fromkeys(_MARKS, 0)
    by_check: dict[str, list[Mapping[str, Any]]] = {}
    for finding in findings:
        by_check.setdefault(finding["check"], []).append(finding)
        counts[_kind(finding)] += 1
    for check, of_check in by_check.items():
        well = [finding for finding in of_check if _kind(finding) == "ok"]
        if well:
            table.add_row(Text(*_MARKS["ok"]), check, _hosts(well), _together(well))
        for finding in of_check:
            if _kind(finding) != "ok":
                table.add_row(Text(*_MARKS[_kind(finding)]), check, finding["host"], _found(finding))
    totals = f"{counts['ok']} ✓, {counts['warning']} !, {counts['error']} ✗"
    return Group(table, Text(totals, "bold red" if counts["error"] else "bold green"))


def _kind(finding: Mapping[str, Any]) -> str:
    return "error" if not finding["ok"] else "warning" if finding["warning"] else "ok"


def _hosts(found: list[Mapping[str, Any]]) -> str:
    return ", ".join(finding["host"] for finding in found) if len(found) <= _NAMED else f"{len(found)} hosts"


def _together(findings: list[Mapping[str, Any]]) -> Text:
    """Return each distinct value once, with its hosts if there are several; only the first few of many."""
    hosts_of: dict[str, list[str]] = {}
    for finding in findings:
        hosts_of.setdefault(finding["value"], []).append(finding["host"])
    if len(hosts_of) == 1:
        return Text(findings[0]["value"])
    lines = [f"{listed(hosts, _SHOWN)}: {value}" for value, hosts in list(hosts_of.items())[:_SHOWN]]
    more = f"\n… and {len(hosts_of) - _SHOWN} more (--json)" if len(hosts_of) > _SHOWN else ""
    return Text("\n".join(lines) + more)


def _found(finding: Mapping[str, Any]) -> Text:
    text = Text(finding["value"])
    for name in ("why", "fix"):
        if finding[name]:
            text.append(f"\n{name}: {finding[name]}", "dim")
    return text
