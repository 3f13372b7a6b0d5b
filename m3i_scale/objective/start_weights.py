"""Initialize the modules of a recipe and update its EMA teacher, with unpartitioned parameters. Under ZeRO, `engine`
does both on the partition, with the same values."""

from __future__ import annotations

from typing import cast

import torch

from m3i_scale.backbones.build import backbone_config, backbone_source
from m3i_scale.backbones.first_values import draw_first_values
from m3i_scale.backbones.load_plan import LoadPlan, plan_load
from m3i_scale.config import RunConfig
from m3i_scale.objective.build import ema_pairs, initialize_module
from m3i_scale.objective.information import EMA_PREFIX, TEACHERS_PREFIX, Objective
from m3i_scale.objective.teacher import Teacher


def start_weights(objective: Objective, run: RunConfig) -> None:
    """Load the initial weights of a run: random values from `run.seed`, then pretrained weights of backbone and
    teachers. The EMA teacher starts as a copy of the student."""
    draw_first_values(objective, initialize_module, seed=run.seed, skip=(EMA_PREFIX, TEACHERS_PREFIX))
    if run.backbone.from_pretrained is not None:
        _read(objective, "student.model.", plan_load(backbone_source(run.backbone), backbone_config(run.backbone)))
    for name, teacher in objective.teachers.items():
        frozen = cast(Teacher, teacher)
        _read(objective, f"{TEACHERS_PREFIX}{name}.{frozen.prefix}", frozen.plan())
    named = dict(objective.named_parameters())
    with torch.no_grad():
        for online, ema in ema_pairs(objective):
            named[ema].copy_(named[online])


@torch.no_grad()
def update_ema_teacher(objective: Objective, decay: float) -> None:
    """Update every parameter of the EMA teacher: ema ← decay · ema + (1 − decay) · online."""
    named = dict(objective.named_parameters())
    for online, ema in ema_pairs(objective):
        named[ema].lerp_(named[online], 1.0 - decay)


@torch.no_grad()
def _read(objective: Objective, prefix: str, plan: LoadPlan) -> None:
    named = dict(objective.named_parameters())
    for name, value in zip(plan.names, plan.tensors(), strict=True):
        named[prefix + name].copy_(value)
