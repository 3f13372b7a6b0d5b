"""Run m3i-scale on one device for gpu.py, each run in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import say

from m3i_scale.files import read_json_lines

LOOK_AT = """
import json, sys, torch
from transformers import AutoModel
assert "m3i_scale" not in sys.modules
torch.manual_seed(0)
pixels = torch.rand(4, 3, 32, 32)
device = sys.argv[2]
with torch.no_grad():
    features = AutoModel.from_pretrained(sys.argv[1]).eval().to(device)(pixels.to(device)).last_hidden_state
print(json.dumps(features.float().mean(dim=1).tolist()))
"""


class Runs:
    """Starts the runs of one folder."""

    def __init__(self, folder: Path, shards: Path, run_file: str) -> None:
        self.folder = folder
        self._shards = shards
        (folder / "run.yaml").write_text(run_file)

    def finish(self, name: str, steps: int, deepspeed: str, *overrides: str, **environment: str) -> float:
        """Train to the end; return the seconds from the start of the process to its end."""
        started = time.perf_counter()
        self.call(*self._train(name, steps, deepspeed, *overrides), **environment)
        return time.perf_counter() - started

    def kill(self, name: str, step: int, steps: int, deepspeed: str) -> int:
        """Train, and end the process by SIGKILL after a step; return the last step written."""
        with (self.folder / "killed.log").open("wb") as log:
            process = subprocess.Popen(_command(*self._train(name, steps, deepspeed)), stdout=log, stderr=log)
            while max(self.losses(name), default=0) < step:
                if process.poll() is not None:
                    raise RuntimeError((self.folder / "killed.log").read_text()[-4000:])
                time.sleep(0.01)
            process.kill()
            if process.wait() != -signal.SIGKILL:
                raise RuntimeError("the run was over before it was killed")
        return max(self.losses(name))

    def losses(self, name: str) -> dict[int, float]:
        """Return them by step; a step that was taken twice has the later one's."""
        return {step: float(record["loss"]) for step, record in self.records(name).items()}

    def records(self, name: str) -> dict[int, dict[str, Any]]:
        """Return what was logged, by step."""
        path = self.folder / name / "metrics.jsonl"
        records = read_json_lines(path) if path.exists() else iter(())
        return {int(record["step"]): record for record in records if record["kind"] == "train"}

    def features(self, device: str) -> list[list[float]]:
        """Return those of four images, by stock classes in a fresh process."""
        command = [sys.executable, "-c", LOOK_AT, str(self.folder / "export"), device]
        found: list[list[float]] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        return found

    def call(self, *arguments: str, **environment: str) -> None:
        """Call a command of m3i-scale, and end this section where it fails."""
        done = subprocess.run(
            _command(*arguments), env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            say(done.stdout[-2000:] + done.stderr[-4000:])
            raise RuntimeError(f"m3i-scale {arguments[0]} ended with exit code {done.returncode}")

    def _train(self, name: str, steps: int, deepspeed: str, *overrides: str) -> list[str]:
        shards = f"data.datasets.shapes.path={self._shards}"
        output = f"output_dir={self.folder / name}"
        run_file = str(self.folder / "run.yaml")
        return ["train", run_file, shards, output, f"optim.steps={steps}", f"deepspeed={deepspeed}", *overrides]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "m3i_scale", *arguments]
