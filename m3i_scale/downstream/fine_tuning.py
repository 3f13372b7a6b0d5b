"""Prepare the modules of a task: what is frozen, how fast each parameter learns, what is dropped and mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3i_scale.config import Classification, Task
from m3i_scale.downstream.drop_path import apply_drop_path
from m3i_scale.downstream.layer_decay import lr_scales
from m3i_scale.errors import ConfigError
from m3i_scale.objective.information import Objective
from m3i_scale.scale.partition import keep_in_checkpoints

if TYPE_CHECKING:
    from m3i_scale.downstream.mixing import LabelMixing

STUDENT = "student.model."


def prepare(objective: Objective, task: Task, classes: int) -> None:
    """Have the modules train as the task says.

    Args:
        objective: of the task's recipe, just built.
        task: of the run.
        classes: of its label set.
    """
    if task.drop_path:
        apply_drop_path(objective.student, task.drop_path)
    if task.freeze:
        keep_in_checkpoints(objective.student)
        objective.train()  # all but the backbone
    if isinstance(task, Classification) and (task.mixup or task.cutmix):
        objective.mix_labelled = _mixing(task, classes)


def _mixing(task: Classification, classes: int) -> LabelMixing:
    try:
        from m3i_scale.downstream.mixing import LabelMixing
    except ModuleNotFoundError:
        raise ConfigError(
            "mixup and cutmix are timm's, which is not installed",
            where="task",
            fix="pip install 'm3i-scale[timm]'",
        ) from None
    return LabelMixing(task, classes)


def scales_of(module: Any, task: Task | None) -> dict[str, float]:
    """Return what the learning rate is multiplied by, by name of a parameter; 1 where nothing is said."""
    if task is None or task.freeze or (task.layer_decay == 1 and task.dcn_lr == 1):
        return {}
    scales = lr_scales(module.student.model, task.layer_decay, dense=task.dense, dcn=task.dcn_lr)
    return {STUDENT + name: scale for name, scale in scales.items()}
