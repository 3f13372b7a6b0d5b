"""Kill a two-rank ZeRO-3 run with SIGKILL at random steps, resume, and compare with the run that was left alone.

The whole all-in-one recipe on shards that the benchmark makes itself. Compared are the losses of every step and a
hash over all final weights, EMA teacher included.

    python benchmarks/resume.py --json
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer
from _common import emit, machine, say
from _shards import TINY, make_shards
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.checkpoint.layout import step_name
from m3i_scale.checkpoint.manifest import newest_good
from m3i_scale.checkpoint_tools.consolidate import saved_weights

STEPS = 24
RUN = f"""
extends: m3i
name: resume
{TINY}data: {{streams: 4}}
optim: {{batch_size: 16, micro_batch_size: 8, steps: {STEPS}, warmup_steps: 2, lr: 1.0e-3}}
deepspeed: zero3_cpu
checkpoint: {{every_steps: 4}}
log: {{every_steps: 1, progress: false}}
"""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    kills: int = 5,
    seed: int = typer.Option(-1, help="Of the kill steps; −1 draws a new one."),
) -> None:
    """Print {kills: [{step, resumed_from, identical, …}], identical, machine}."""
    seed = seed if seed >= 0 else random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder)
        (folder / "run.yaml").write_text(RUN)
        say("the run that is left alone …")
        _finish(folder, shards, folder / "whole")
        wanted, wanted_losses = _weights(folder / "whole"), _losses(folder / "whole")
        results = [_kill_once(folder, shards, draw, number, wanted, wanted_losses) for number in range(kills)]
    identical = all(result["identical"] for result in results)
    emit({"kills": results, "identical": identical, "ranks": 2, "seed": seed, "machine": machine()})
    raise typer.Exit(0 if identical else 1)


def _kill_once(
    folder: Path, shards: Path, draw: random.Random, number: int, wanted: str, wanted_losses: dict[int, float]
) -> dict[str, object]:
    tried = 0
    while True:
        output = folder / f"killed-{number}-{tried}"
        good = _train_until_killed(folder, shards, output, draw)
        if good is None or good.name != step_name(STEPS):
            break
        tried += 1  # the last checkpoint was there already: nothing would be tested
    reached = _last_step(output)
    _finish(folder, shards, output)
    found, losses = _weights(output), _losses(output)
    identical = found == wanted and losses == wanted_losses
    say(f"killed after step {reached}, resumed from {good.name if good else 'the start'}: identical {identical}")
    return {
        "step": reached,
        "resumed_from": good.name if good else None,
        "identical": identical,
        "weights_sha256": found,
        "losses_identical": losses == wanted_losses,
    }


def _train_until_killed(folder: Path, shards: Path, output: Path, draw: random.Random) -> Path | None:
    """SIGKILL at any moment of the run, saves included; the checkpoint that it will resume from."""
    step = draw.randrange(1, STEPS)
    process = _start(folder, shards, output)
    while _last_step(output) < step:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before step {step}: exit code {process.returncode}")
        time.sleep(0.01)
    time.sleep(draw.random() * 0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return newest_good(output / "checkpoints")[0]


def _start(folder: Path, shards: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "deepspeed"), "--no_local_rank", "--num_accelerators", "2"]
    command += ["--master_port", str(get_free_port()), "--module", "m3i_scale", "train", str(folder / "run.yaml")]
    command += [f"data.datasets.shapes.path={shards}", f"output_dir={output}"]
    log = output.with_suffix(".log").open("ab")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return process


def _finish(folder: Path, shards: Path, output: Path) -> None:
    process = _start(folder, shards, output)
    code = process.wait()
    if code:
        say(output.with_suffix(".log").read_text()[-4000:])
        raise RuntimeError(f"the run ended with exit code {code}")


def _records(output: Path) -> list[dict[str, object]]:
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().split("\n")[:-1] if line]  # the last line may still be in writing
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def _last_step(output: Path) -> int:
    return max((int(str(record["step"])) for record in _records(output)), default=0)


def _losses(output: Path) -> dict[int, float]:
    return {int(str(record["step"])): float(str(record["loss"])) for record in _records(output)}


def _weights(output: Path) -> str:
    checkpoint, passed_over = newest_good(output / "checkpoints")
    if checkpoint is None or passed_over or not checkpoint.name.endswith(str(STEPS)):
        raise RuntimeError(f"no good last checkpoint in {output}")
    digest = hashlib.sha256()
    for which in ("student", "ema"):
        for name, tensor in sorted(saved_weights(checkpoint, which).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    typer.run(main)
