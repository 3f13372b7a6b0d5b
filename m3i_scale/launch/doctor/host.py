"""Answer requests for one host, `python -m m3i_scale.launch.doctor.host VERB`: an agent starts and ends it.

The request is in the environment, which may contain secrets; the answer is a marked line of its output.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from m3i_scale.launch.doctor import facts, machine

MODULE = "m3i_scale.launch.doctor.host"
REQUEST = "M3I_SCALE_DOCTOR"
"""Variable with the request, as JSON."""
MARK = "m3i-scale doctor: "
"""Start of the line with the answer, because libraries print too."""


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Return facts of this host, and findings that need no other host.

    Args:
        request: name of the host, its needs, the interface, config file and overrides or None, names of all hosts.
    """
    host, needs = request["host"], machine.Needs(**request["needs"])
    devices = facts.devices()
    findings = machine.machine_findings(host, machine.look(), needs, on_host=devices["kind"] == "cpu")
    answer: dict[str, Any] = {
        "python": {**facts.software_versions(), "incomplete": facts.incomplete_packages()},
        "code": facts.code(),
        "interface": request["interface"],
        "interfaces": facts.interfaces(),
        "names": facts.names(request["hosts"]),
        "variables": facts.variables(),
        "slots": needs.ranks,
        "devices": devices,
    }
    if request["run"] is not None:
        run, answer["config"] = facts.run_file(request["run"], request["overrides"])
        if run is not None:
            output_dir = run.output_dir.absolute()
            answer |= {"output_dir": str(output_dir), "shards": facts.first_shards(run)}
            findings.append(machine.disk_finding(host, output_dir, needs))
    return {**answer, "findings": [item.to_json() for item in findings]}


def main() -> None:
    """Answer the request in the environment."""
    request = json.loads(os.environ.pop(REQUEST))
    try:
        if sys.argv[1] == "look":
            answer = look(request)
        else:
            from m3i_scale.launch.doctor.group import measure

            answer = measure(request)
    except Exception as error:  # reported by the caller, with the host
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")  # after all other output
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads of libraries


if __name__ == "__main__":
    main()
