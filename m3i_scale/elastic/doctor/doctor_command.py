"""`m3i-scale doctor`: the command and its table. Slow imports happen inside the function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from m3i_scale.config import known_runs
from m3i_scale.errors import EXIT_USER_ERROR, ConfigError
from m3i_scale.host.findings import NOT_JUDGED, errors_in
from m3i_scale.host.output_dir import RUN_FILE
from m3i_scale.launch import OVER_HOSTS
from m3i_scale.launch.description import OPTION_NAMES, Cluster, takes_cluster
from m3i_scale.options import AsJson, Overrides
from m3i_scale.output import leave_out_accelerator_warning, print_result, wide_console
from m3i_scale.text import listed

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red"), "skipped": ("–", "dim")}
_NAMED = 2
_SHOWN = 3
_CONNECT_S = 10.0


@takes_cluster(field for field in Cluster.model_fields if field in {*OVER_HOSTS, "transport"})
def doctor(
    cluster: Cluster,
    run: Annotated[
        str | None, typer.Argument(help="Config file, name of a built-in config, or output folder of a run.")
    ] = None,
    overrides: Overrides = None,
    connect_s: Annotated[
        float, typer.Option("--connect-timeout", min=1, metavar="S", help="Timeout of ssh in seconds.")
    ] = _CONNECT_S,
    as_json: AsJson = False,
) -> None:
    """Check that all hosts are ready: ssh, versions, code, devices, memory, files, network and shards.

    Exit with code 2 if a check fails on any host.

    With the output directory of a run, diagnose its records instead. Problems are warnings; the exit code is 0.
    """
    leave_out_accelerator_warning()
    folder = None if run is None or run in known_runs() or not Path(run).is_dir() else Path(run)
    if folder is not None:
        _reject_options(folder, overrides or [], cluster, connect_s)
        from m3i_scale.report.diagnosis import diagnose

        findings = diagnose(folder)
    else:
        from m3i_scale.elastic.doctor.command import examine

        log = wide_console(stderr=True, soft_wrap=True).print
        findings = examine(run, overrides or [], cluster, connect_s=connect_s, log=log)
    rows = [finding.to_json() for finding in findings]
    print_result(as_json, rows, lambda: doctor_table(rows, "host" if folder is None else "run"))
    if errors_in(findings):
        raise typer.Exit(EXIT_USER_ERROR)


def _reject_options(folder: Path, overrides: list[str], cluster: Cluster, connect_s: float) -> None:
    """Raise an error for overrides and for options of a cluster."""
    options = [*cluster.model_fields_set, *(["connect_timeout"] if connect_s != _CONNECT_S else [])]
    given = [*overrides, *(OPTION_NAMES.get(name, "--" + name.replace("_", "-")) for name in sorted(options))]
    if given:
        raise ConfigError(
            f"overrides and cluster options have no effect on the diagnosis of a run: {', '.join(given)}",
            where=str(folder),
            fix=f"leave them out, or check the nodes with the config file: m3i-scale doctor {folder / RUN_FILE}",
        )


def doctor_table(findings: Iterable[Mapping[str, Any]], place: str = "host") -> Group:
    """Return a table of checks and the totals. Passed checks share a line; others have one per host. `place` is the
    header of the column of hosts."""
    table = Table("", "check", place, "found", box=None, pad_edge=False)
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
    totals += f", {counts['skipped']} –" if counts["skipped"] else ""
    return Group(table, Text(totals, "bold red" if counts["error"] else "bold green"))


def _kind(finding: Mapping[str, Any]) -> str:
    if finding["ok"] and not finding["warning"]:
        return "skipped" if finding["value"].startswith(NOT_JUDGED) else "ok"
    return "warning" if finding["ok"] else "error"


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
