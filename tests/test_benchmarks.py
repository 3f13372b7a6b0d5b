"""Benchmarks keep standard output for their one JSON document."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("name", ["step", "resume", "recipes", "one_stage", "dcnv3"])
def test_what_libraries_print_goes_elsewhere(name):
    script = f"import {name}, os; os.system('echo from a child'); print('from a library'); {name}.emit({{'a': 1}})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"a": 1}
    assert "from a library" in done.stderr


def test_fused_attention_is_counted_with_its_backward_pass(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _cost import count_flop

    query = torch.randn(2, 3, 50, 32, requires_grad=True)

    def step():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    product = 2 * 2 * 3 * 50 * 50 * 32
    assert count_flop(step) == 6 * product  # two forward, four backward
