"""Count a JUnit report in one line: passed, failed, skipped."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def count(report: str) -> str:
    """`tests: N passed, N failed, N skipped`; a report without content counts as nothing run.

    A test whose set-up or tear-down breaks counts as failed.
    """
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.strip():
        for suite in ElementTree.fromstring(report).iter("testsuite"):
            for key in totals:
                totals[key] += int(suite.get(key, 0))
    failed = totals["failures"] + totals["errors"]
    passed = totals["tests"] - failed - totals["skipped"]
    return f"tests: {passed} passed, {failed} failed, {totals['skipped']} skipped"


if __name__ == "__main__":
    print(count(Path(sys.argv[1]).read_text(encoding="utf-8")))
