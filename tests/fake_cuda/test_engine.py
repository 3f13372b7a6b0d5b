"""Whole runs on a simulated GPU: no race, no memory freed too early, no tensor on the wrong device, and known waits.

Every DeepSpeed file of a GPU goes through steps, records, saves, a rewind and a resume; nine models and the rarer parts
of a run go through a few steps. Faults that are planted in the code are found at their lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_library import build
from launch import ROOT, environment
from torch.utils.cpp_extension import library_paths

HERE = Path(__file__).parent
FILES = {
    "zero1_bf16": (2, 8),
    "zero2_bf16": (7, 9),
    "zero3_bf16": (5, 87),
    "zero3_bf16_all_reduce": (5, 87),
    "zero3_bf16_cpu_offload": (5, 87),
    "zero3_bf16_lean": (5, 87),
    "zero3_fp16": (5, 87),
}
"""Waits of the host and collectives in a step of `moco` that is not logged, with parameters in small buckets."""
SHORT = (
    "m3i",
    "m3i in parts",
    "clip",
    "siglip",
    "dinov2",
    "mae",
    "supervised",
    "classification",
    "segmentation",
    "detection",
    "phases",
    "activations on the host",
    "a host far ahead",
)
SABOTAGED = (
    "copies of batches are not waited for",
    "batches are freed while they are read",
    "weights are gathered before they are written",
    "gathered averages are not waited for",
    "copies of a save are not waited for",
    "averages are saved before they are gathered",
    "stored samples are read before they are there",
    "the optimizer counts its steps on the host",
    "the loss is read in every micro-batch",
)

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a GPU's own library")
Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def simulated() -> Answers:
    """All runs, forked from one process, whose imports take longer than most of them."""
    preloaded = {"LD_PRELOAD": str(build()), "LD_LIBRARY_PATH": os.pathsep.join(library_paths())}
    command = [sys.executable, str(HERE / "simulate.py")]
    done = subprocess.run(command, env=environment(**preloaded), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers: Answers = json.loads(done.stdout)
    assert answers.keys() == {*FILES, *SHORT, *SABOTAGED}
    return answers


def plain_step(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the last step of a run that is not logged."""
    steps: list[dict[str, Any]] = answer["steps"]
    return [step for step in steps if not step["logged"]][-1]


@pytest.mark.parametrize("name", [*FILES, *SHORT])
def test_a_run_has_no_fault(simulated: Answers, name: str) -> None:
    assert "error" not in simulated[name], simulated[name]["error"]
    assert simulated[name]["faults"] == {}


@pytest.mark.parametrize("name", FILES)
def test_a_run_saves_goes_back_and_is_resumed(simulated: Answers, name: str) -> None:
    assert [step["step"] for step in simulated[name]["steps"]] == [1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("name", FILES)
def test_a_step_waits_and_communicates_as_often_as_known(simulated: Answers, name: str) -> None:
    step = plain_step(simulated[name])
    assert (sum(step["waits"].values()), sum(step["collectives"].values())) == FILES[name], step


@pytest.mark.parametrize("name", SHORT)
def test_forward_and_backward_pass_wait_no_more_than_the_file(simulated: Answers, name: str) -> None:
    """But for what the libraries of a segmenter and a detector read."""
    waits = plain_step(simulated[name])["waits"]
    allowed = ("deepspeed/", "m3i_scale/scale/agree.py", "transformers/", "torchvision/", "m3i_scale/objective/")
    assert [place for place in waits if not place.partition(" at ")[2].startswith(allowed)] == []


@pytest.mark.parametrize("name", SABOTAGED)
def test_what_is_broken_is_found_at_its_line(simulated: Answers, name: str) -> None:
    answer = simulated[name]
    assert "error" not in answer, answer["error"]
    found = plain_step(answer)["waits"] if answer["kind"] == "wait" else answer["faults"]
    named = [fault for fault in found if answer["place"] in fault]
    assert named, found
    assert answer["kind"] == "wait" or all(fault.startswith(answer["kind"]) for fault in named)
