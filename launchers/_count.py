"""Say what is in JUnit reports: the slowest tests, and how many passed, failed and were skipped."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SLOWEST = 40


def count(suites: list[Element]) -> str:
    """Return `tests: N passed, N failed, N skipped`. A test whose set-up or tear-down breaks counts as failed."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    failed = totals["failures"] + totals["errors"]
    passed = totals["tests"] - failed - totals["skipped"]
    return f"tests: {passed} passed, {failed} failed, {totals['skipped']} skipped"


def slowest(suites: list[Element]) -> list[str]:
    """Return the tests that took longest, set-up and tear-down included, with their seconds."""
    cases = [case for suite in suites for case in suite.iter("testcase")]
    cases.sort(key=lambda case: float(case.get("time", 0)), reverse=True)
    return [
        f"{float(case.get('time', 0)):8.1f} s {case.get('classname')}::{case.get('name')}" for case in cases[:SLOWEST]
    ]


def read_suites(reports: list[str]) -> list[Element]:
    """Return the suites of some reports; one without content, which was never finished, has none."""
    return [suite for text in reports if text.strip() for suite in ElementTree.fromstring(text).iter("testsuite")]


def unfinished(reports: list[str]) -> str:
    """Return how many reports have no content, to be added to the count; empty where all are finished."""
    empty = sum(not text.strip() for text in reports)
    return f"; {empty} of {len(reports)} reports were never finished" if empty else ""


if __name__ == "__main__":
    reports = [Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
    suites = read_suites(reports)
    print("slowest:", *slowest(suites), sep="\n")
    print(count(suites) + unfinished(reports))
