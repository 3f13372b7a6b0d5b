"""Scaling: the tables of docs/benchmarks/scaling.md are those of the plan, and links between hosts are what they are
called."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "scaling.md"
TABLE = re.compile(r"<!-- table: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
root_only = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="network namespaces need root; the build machine has it"
)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--json", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("m3iw")}


def test_the_tables_of_the_page_are_those_of_the_plan():
    """Some of their rows; `benchmarks/scaling.py --write docs/benchmarks/scaling.md` makes all of them anew."""
    done = run("scaling", "--gpus", "8", "--gpus", "128")
    assert done.returncode == 0, done.stderr[-3000:]
    tables, page = json.loads(done.stdout)["tables"], dict(TABLE.findall(PAGE.read_text(encoding="utf-8")))
    assert tables.keys() == page.keys()
    for name, table in tables.items():
        lines = page[name].splitlines()
        assert lines[0] == f"| {' | '.join(table['columns'])} |", name
        assert table["rows"], name
        for row in table["rows"]:
            assert f"| {' | '.join(row)} |" in lines, name


def test_rows_that_are_not_there_are_refused():
    done = run("scaling", "--gpus", "9")
    assert done.returncode == 2
    assert "no row of 9 GPUs" in done.stderr


def test_links_need_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _links

    from m3i_scale.errors import UserError

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError):
        _links.check_links()


@root_only
def test_what_a_link_adds_is_measured_beside_what_the_plan_says():
    """Two ranks in namespaces of their own. Times depend on the machine; the bytes that leave a rank do not."""
    small = ["--ranks", "2", "--rounds", "1", "--steps", "1", "--width", "64", "--depth", "2", "--batch", "2"]
    before = namespaces()
    done = run("weak_scaling", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    links = {case["link"] for case in told["cases"]}
    assert links == {"left alone", "1 Gbit/s", "10 Gbit/s", "1 ms"}
    for case in told["cases"]:
        # Headers of packets, and sums for votes and norms, come on top of the tensors.
        assert case["predicted_bytes"] < case["sent_bytes"] < 1.1 * case["predicted_bytes"] + 50_000, case
        if case["link"] != "left alone":
            assert case["predicted_added_s"] >= 0
            assert case["step_error"] == pytest.approx(case["predicted_step_s"] / case["step_s"] - 1)
    # A delay is a delay: a step of a ring takes no less, whatever else the machine does.
    assert min(case["probe"]["latency_us"] for case in told["cases"] if case["link"] == "1 ms") >= 1000
    assert namespaces() <= before
