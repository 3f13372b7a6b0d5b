"""A run that writes down the learning rates of its engine: `python rates.py FILE train RUN …`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from m3i_scale.__main__ import run
from m3i_scale.run.trainer import Trainer

file = Path(sys.argv.pop(1))
take_step = Trainer._optimizer_step


def taken(trainer: Trainer) -> None:
    take_step(trainer)
    if trainer.state.step == 5:
        optimizer = trainer.state.engine.optimizer
        groups = optimizer.param_groups
        sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
        # Stage 3 updates parts of a group one by one, and lends each of them to the group meanwhile.
        for part, group in getattr(optimizer, "sub_group_to_group_id", {}).items():
            sizes[group] += sum(parameter.ds_numel for parameter in optimizer.fp16_groups[part])
        rates = [[group["lr"], group["lr_scale"], group["weight_decay"]] for group in groups]
        file.write_text(json.dumps({"lr": trainer.state.lr, "groups": rates, "sizes": sizes}))


Trainer._optimizer_step = taken
run()
