"""Runs of two ranks by `faulty.py`, what became of them, and their checkpoints changed and vouched for again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from launch import TESTS, environment
from shapes import write_run

from m3i_scale.checkpoint.layout import INDEX, TENSORS
from m3i_scale.checkpoint.manifest import digest_files, list_files, read_manifest, verify, write_manifest
from m3i_scale.checkpoint.stream import Range, make_index, write_ranges
from m3i_scale.checkpoint.tensors import SavedTensors

STEPS = 6


@dataclass
class Done:
    """What became of a call."""

    folder: Path
    codes: list[int]
    texts: list[str]

    @property
    def root(self) -> Path:
        return self.folder / "out" / "checkpoints"

    def steps(self) -> list[int]:
        """Of all folders under a step's name, each of which must be good."""
        found = sorted(self.root.glob("step-*"))
        assert [verify(path) for path in found] == [[]] * len(found)
        return [int(path.name.removeprefix("step-")) for path in found]


def call(folder: Path, *overrides: str, faults: list[dict[str, Any]]) -> dict[str, Any]:
    return {"arguments": ["train", str(folder / "run.yaml"), *overrides], "faults": faults}


def make_calls(calls: dict[str, dict[str, Any]], folders: dict[str, Path], results: Path) -> dict[str, Done]:
    results.mkdir()
    (results / "calls.json").write_text(json.dumps(list(calls.values())))
    command = [sys.executable, str(TESTS / "run" / "faulty.py"), str(results / "calls.json"), str(results)]
    log = results / "log"
    with log.open("w") as out:
        code = subprocess.run(command, env=environment(), stdout=out, stderr=out, timeout=1800, check=False).returncode
    assert code == 0, log.read_text()[-4000:]
    done = {}
    for number, name in enumerate(calls):
        files = [results / f"{number}-{rank}.json" for rank in range(2)]
        told = [json.loads(file.read_text()) for file in files]
        done[name] = Done(folders[name], [one["code"] for one in told], [one["text"] for one in told])
    return done


def make_run(folder: Path, shards: Path) -> Path:
    write_run(folder, shards, "m3i", f"optim.steps={STEPS}", "checkpoint.keep_latest=8", "hardware.peak_tflops=1.0")
    return folder


def vouch_for(checkpoint: Path) -> None:
    """Make the manifest say that all files are as they should be."""
    extra = read_manifest(checkpoint).extra
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, digest_files(checkpoint, list_files(checkpoint)), extra)
    assert verify(checkpoint) == []


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None], *, norms_too: bool) -> None:
    saved = SavedTensors(checkpoint)
    keys = [f"{kind}/{name}" for kind in saved.kinds() for name in saved.names(kind)]
    tensors = {key: saved.whole(key) for key in keys}
    change(tensors)
    shutil.rmtree(checkpoint / TENSORS)
    ranges = [Range(key, 0, (tensor.flatten(),)) for key, tensor in tensors.items()]
    written = write_ranges(checkpoint, ranges, 0)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    squares = [(written.squares[key] if norms_too else saved.norms[key] ** 2) for key in shapes]
    make_index(shapes, squares, 1, [], []).write(checkpoint / TENSORS / INDEX)
    vouch_for(checkpoint)
