"""Whole runs on a simulated GPU: no race, no memory freed too early, no tensor on the wrong device, and known waits.

Every DeepSpeed file of a GPU goes through steps, records, saves, a rewind and a resume; nine models and the rarer parts
of a run go through a few steps. Faults that are planted in the code are found at their lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from preloaded import run_preloaded

FILES = {
    "zero1_bf16": (2, 23, 338),
    "zero2_bf16": (6, 39, 771),
    "zero3_bf16": (7, 89, 717),
    "zero3_bf16_all_reduce": (6, 63, 782),
    "zero3_bf16_cpu_offload": (112, 89, 768),
    "zero3_bf16_lean": (7, 89, 676),
    "zero3_fp16": (8, 90, 670),
}
"""Waits of the host, collectives and kernels of a step of `moco` that is not logged, in small buckets."""
SHORT = {
    "m3i": (2, 63, 1332),
    "m3i in parts": (9, 238, 2194),
    "clip": (6, 69, 1268),
    "siglip": (9, 181, 979),
    "dinov2": (6, 108, 3241),
    "mae": (79, 100, 856),
    "supervised": (7, 72, 553),
    "classification": (2, 34, 324),
    "segmentation": (21, 169, 1864),
    "detection": (69, 74, 2604),
    "stages": (10, 262, 2215),
    "activations on the host": (2, 55, 1022),
    "a host far ahead": (107, 91, 738),
}
"""The same of the last step, which is logged; without what the record waits for."""
SABOTAGED = (
    "copies of batches are not waited for",
    "batches are freed while they are read",
    "weights are gathered before they are written",
    "gathered averages are not waited for",
    "copies of a save are not waited for",
    "averages are saved before they are gathered",
    "stored samples are read before they are there",
    "the optimizer counts its steps on the host",
    "gradients are freed while they are reduced",
    "the loss is read in every micro-batch",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a GPU's own library"),
]
Answers = dict[str, dict[str, Any]]
VARIANTS = ("zero3_bf16_all_reduce", "zero3_bf16_lean", "m3i in parts", "siglip", "supervised", "stages")
"""Runs that mostly repeat parts of other runs. Each takes about 20 seconds, so CI leaves them out."""


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.bench] if name in VARIANTS else []) for name in names]


@pytest.fixture(scope="module")
def simulated(request: pytest.FixtureRequest) -> Answers:
    """Simulate the runs of the selected tests, in forks of one process: imports take longer than most runs."""
    tests = [item for item in request.session.items if item.path == request.path]
    names = sorted({item.callspec.params["name"] for item in tests if isinstance(item, pytest.Function)})
    answers = run_preloaded("simulate.py", arguments=names)
    assert answers.keys() == {*names}
    return answers


def last_step(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the last step of a short run; of a long one, the last one that is not logged."""
    steps: list[dict[str, Any]] = answer["steps"]
    return [step for step in steps if not (name in FILES and step["logged"])][-1]


@pytest.mark.parametrize("name", params([*FILES, *SHORT]))
def test_a_run_has_no_fault(simulated: Answers, name: str) -> None:
    assert "error" not in simulated[name], simulated[name]["error"]
    assert simulated[name]["faults"] == {}


@pytest.mark.parametrize("name", params(FILES))
def test_a_run_saves_goes_back_and_is_resumed(simulated: Answers, name: str) -> None:
    assert [step["step"] for step in simulated[name]["steps"]] == [1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("name", params([*FILES, *SHORT]))
def test_a_step_asks_for_as_much_as_known(simulated: Answers, name: str) -> None:
    step = last_step(name, simulated[name])
    waits, collectives, kernels = (FILES | SHORT)[name]
    found = tuple(sum(step[kind].values()) for kind in ("waits", "collectives"))
    assert found == (waits, collectives), step
    assert step["kernels"] < 1.1 * kernels


@pytest.mark.parametrize("name", SABOTAGED)
def test_what_is_broken_is_found_at_its_line(simulated: Answers, name: str) -> None:
    answer = simulated[name]
    assert "error" not in answer, answer["error"]
    found = answer["steps"][-1]["waits"] if answer["kind"] == "wait" else answer["faults"]
    named = [fault for fault in found if answer["place"] in fault]
    assert named, found
    assert answer["kind"] == "wait" or all(fault.startswith(answer["kind"]) for fault in named)
