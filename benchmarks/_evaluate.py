"""Evaluate an export on several datasets in one process.

    python benchmarks/_evaluate.py EXPORT '[{"data": …, "measures": […]}, …]' --json

Prints a list with the documents of `evaluate`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from m3i_scale.output import print_json, reserve_stdout


def evaluate_all(model: Path, probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the document of every evaluation; without metrics if a model without a text tower would need one."""
    from m3i_scale.evaluation.commands import evaluate
    from m3i_scale.evaluation.job import WITH_TEXT
    from m3i_scale.evaluation.towers import why_no_towers

    no_towers, documents = why_no_towers(model), []
    for probe in probes:
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in probe.items()}
        if no_towers is not None and set(options["measures"]) <= set(WITH_TEXT):
            absent = dict.fromkeys(options["measures"], no_towers)
            documents.append({"measures": {}, "not_measured": absent})
        else:
            documents.append(evaluate(model, **options))
    return documents


if __name__ == "__main__":
    reserve_stdout()
    print_json(evaluate_all(Path(sys.argv[1]), json.loads(sys.argv[2])))
