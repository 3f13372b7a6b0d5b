"""All that a host can tell by itself, in one answer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from m3i_scale.launch.doctor import facts
from m3i_scale.launch.doctor.findings import Finding
from m3i_scale.launch.doctor.machine import disk_finding, machine_findings
from m3i_scale.launch.doctor.machine import look as look_at_machine
from m3i_scale.launch.doctor.needs import Needs
from m3i_scale.launch.doctor.shared import write_note


def look(request: dict[str, Any], left: list[Path]) -> dict[str, Any]:
    """Facts, and findings that need no other host.

    Args:
        request: name of the host, its needs, run file and overrides or None, names of all hosts, variables that were
            sent, name of the note.
        left: gets what is to be removed.
    """
    host, needs = request["host"], Needs(**request["needs"])
    devices = facts.devices()
    found: list[Finding] = machine_findings(host, look_at_machine(), needs, on_host=devices["kind"] == "cpu")
    answer: dict[str, Any] = {
        "python": {**facts.interpreter(), "incomplete": facts.incomplete_packages()},
        "code": facts.code(),
        "interfaces": facts.interfaces(),
        "names": facts.names(request["hosts"]),
        "variables": facts.variables(),
        "received": facts.received(request["sent"]),
        "devices": devices,
    }
    if request["run"] is not None:
        run, answer["config"] = facts.run_file(request["run"], request["overrides"])
        if run is not None:
            answer["output_dir"] = str(run.output_dir.absolute())
            answer["shards"] = facts.first_shards(run)
            answer["note"] = write_note(run.output_dir.absolute(), request["note"], left)
            if "fault" not in answer["note"]:
                found.append(disk_finding(host, run.output_dir.absolute(), needs))
    return {**answer, "findings": [asdict(item) for item in found]}
