"""A run in segments, each in another shape. Started as a script, this is one rank of a segment:

RANK=0 WORLD_SIZE=2 … python _reshard.py STOP_AFTER RUN.yaml [KEY=VALUE …]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from _shards import TINY
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.checkpoint.layout import checkpoints, read_meta
from m3i_scale.config import load_run, resource_folder
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.run.callbacks import Callback, StepRecord

GLOBAL = 24
"""Samples of a batch, compared all at once: the ranks share them out, and 4, 3, 2 and 1 divide them."""
PREEMPTED = 75
RUN = f"""
extends: m3i
name: reshard
{TINY}
data: {{streams: 12}}
optim: {{batch_size: 24, steps: 1000, warmup_steps: 2, lr: 1.0e-3}}
checkpoint: {{every_steps: 1000, keep_latest: 2}}
log: {{every_steps: 1, progress: false}}
"""


@dataclass(frozen=True)
class Shape:
    """In which a segment runs."""

    ranks: int
    engine: str
    """A DeepSpeed file, by name."""
    stage: int | None = None
    """Instead of the file's own."""


class StopAfter(Callback):
    """Asks the run to stop, as a scheduler does, when it has logged a step: it ends after the next one, saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: StepRecord) -> None:
        """Of rank 0; all ranks agree."""
        if record.step >= self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def run_chain(folder: Path, shards: Path, name: str, shapes: list[Shape], steps: int) -> dict[int, float]:
    """Losses by step of a run that takes `steps` steps in every shape, one after the other.

    Raises:
        RuntimeError: a segment did not end as it should; with what it said.
    """
    output = folder / name
    (folder / "run.yaml").write_text(RUN)
    for number, shape in enumerate(shapes):
        stop = steps * (number + 1)
        arguments = [
            f"output_dir={output}",
            f"data.datasets.shapes.path={shards}",
            f"deepspeed={_engine_file(folder, shape)}",
            f"optim.micro_batch_size={GLOBAL // shape.ranks}",
        ]
        _segment(folder, shape.ranks, [str(stop - 1), str(folder / "run.yaml"), *arguments])
        meta = read_meta(checkpoints(output / "checkpoints")[0])
        if (meta["step"], meta["world_size"]) != (stop, shape.ranks):
            raise RuntimeError(f"the checkpoint is of step {meta['step']} and {meta['world_size']} ranks, not {stop}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def largest_difference(losses: dict[int, float], wanted: dict[int, float]) -> float:
    """Of two curves over the same steps, relative.

    Raises:
        RuntimeError: other steps.
    """
    if losses.keys() != wanted.keys():
        raise RuntimeError(f"steps {sorted(losses)} and {sorted(wanted)}")
    return max(abs(losses[step] - wanted[step]) / abs(wanted[step]) for step in wanted)


def _engine_file(folder: Path, shape: Shape) -> Path:
    config = json.loads((resource_folder("ds_configs") / f"{shape.engine}.json").read_text(encoding="utf-8"))
    config["zero_optimization"]["stage"] = shape.stage or config["zero_optimization"]["stage"]
    path = folder / f"{shape.engine}-{shape.stage}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def _segment(folder: Path, ranks: int, arguments: list[str]) -> None:
    port = str(get_free_port())
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(Path(__file__).resolve()), *arguments]
            own = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=out))
    codes = [process.wait() for process in processes]
    if codes != [PREEMPTED] * ranks:
        raise RuntimeError(f"exit codes {codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs))


def main() -> None:
    """One rank."""
    import torch

    from m3i_scale.run.train import make_callbacks, train

    stop, path, *overrides = sys.argv[1:]
    run = load_run(path, overrides)
    torch.manual_seed(run.seed)
    ranks = start_ranks()
    status = train(run, ranks, [*make_callbacks(run), StopAfter(int(stop))])
    stop_ranks(wait=True)
    sys.exit(PREEMPTED if status == "preempted" else 0)


if __name__ == "__main__":
    main()
