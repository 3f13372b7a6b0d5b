"""`m3i-scale train` with faults in the loss of the last rank: `python spiking.py FAULTS.json ARGUMENTS…`.

FAULTS.json is [[first, last, factor], …]: the loss of global batches first … last, counted from 1 along the data and
not along the steps, is multiplied by the factor on the last rank. "nan" is one too; at "kill" the rank kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_scale.__main__ import run
from m3i_scale.objective.information import Objective
from m3i_scale.run.trainer import Trainer


def install(faults: list[tuple[int, int, float | str]]) -> None:
    at = {"batch": 0}
    next_batch, forward = Trainer._next_batch, Objective.forward

    def counted(trainer: Trainer) -> Any:
        found = next_batch(trainer)
        served = sum(counts["served"] for counts in trainer.state.stream.source_counts().values())
        at["batch"] = round(served / trainer.run.optim.micro_batch_size)
        return found

    def scaled(objective: Objective, batch: Any, step: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = forward(objective, batch, step)
        for first, last, factor in faults:
            if first <= at["batch"] <= last and factor == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if first <= at["batch"] <= last:
                loss = loss * float(factor)
        return loss, figures

    Trainer._next_batch, Objective.forward = counted, scaled


if __name__ == "__main__":
    if int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        install(json.loads(Path(sys.argv[1]).read_text()))
    sys.argv[1:] = sys.argv[2:]
    run()
