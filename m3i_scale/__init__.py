"""M3I pre-training at any size: one formula, one engine, one command.

`__all__` is the public Python interface (docs/guides/python.md). Each name is imported on first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3i_scale.api import (
        LoadedBackbone,
        build_objective,
        list_recipes,
        load_backbone,
        load_recipe,
        load_run,
        open_stream,
        update_ema,
    )
    from m3i_scale.config import RunConfig
    from m3i_scale.config.optim import learning_rate
    from m3i_scale.data.batch import Batch
    from m3i_scale.data.loader import TrainStream
    from m3i_scale.data.state import merge_states
    from m3i_scale.engine.parameter_groups import parameter_groups
    from m3i_scale.errors import AggregateError, ConfigError, DataError, ExportError, UserError
    from m3i_scale.jobs import train
    from m3i_scale.objective.information import Objective
    from m3i_scale.objective.recipe import Recipe
    from m3i_scale.results import embed, evaluate, export

__version__ = "0.1.0"

__all__ = [
    "AggregateError",
    "Batch",
    "ConfigError",
    "DataError",
    "ExportError",
    "LoadedBackbone",
    "Objective",
    "Recipe",
    "RunConfig",
    "TrainStream",
    "UserError",
    "build_objective",
    "embed",
    "evaluate",
    "export",
    "learning_rate",
    "list_recipes",
    "load_backbone",
    "load_recipe",
    "load_run",
    "merge_states",
    "open_stream",
    "parameter_groups",
    "train",
    "update_ema",
]

_ELSEWHERE = {
    "Batch": "data.batch",
    "ConfigError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "AggregateError": "errors",
    "Objective": "objective.information",
    "Recipe": "objective.recipe",
    "RunConfig": "config",
    "TrainStream": "data.loader",
    "UserError": "errors",
    "embed": "results",
    "evaluate": "results",
    "export": "results",
    "learning_rate": "config.optim",
    "merge_states": "data.state",
    "parameter_groups": "engine.parameter_groups",
    "train": "jobs",
}
"""Module of each public name that is not in `api`."""


if not TYPE_CHECKING:  # otherwise a type checker would treat every name as public

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'api')}"), name)
