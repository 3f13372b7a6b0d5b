"""Load, build and stream what your own training loop needs; `m3i_scale.__all__` is what is public (docs/python.md)."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.config import RunConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.evaluate.features import Pool, load_vision
from m3i_scale.evaluate.loaded import LoadedBackbone
from m3i_scale.objective import build
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import Ranks, SingleProcess
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe
from m3i_scale.objective.start_weights import move_averages, start_weights
from m3i_scale.run import with_data
from m3i_scale.run.schedule import momentum_at
from m3i_scale.scale.collectives import ProcessGroupRanks


def load_run(name_or_path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file: recipe, backbone, data and optimisation.

    Modules of your own classes that its recipe names are imported, which runs their code.

    Args:
        name_or_path: the file, or the name of a built-in one, as `m3i`.
        overrides: `section.key=value`, as on the command line.

    Raises:
        ConfigError: no such file, an unknown key, or values that do not hold together; all of it at once.
    """
    return load_run_and_recipe(str(name_or_path), overrides)[0]


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read the recipe of a run file, inputs × targets (Su et al., arXiv 2211.09807, table 1); as `load_run`.

    Raises:
        ConfigError: as of `load_run`.
    """
    return load_run_and_recipe(str(name_or_path), overrides)[1]


def open_stream(run: RunConfig, *, validation: bool = False) -> TrainStream:
    """Open the stream of micro-batches of a run, that of this rank where `torch.distributed` has a process group.

    An iterator over it yields a `Batch` of `optim.micro_batch_size` samples at a time, on the host, in the order that
    `m3i-scale train` reads them in. `state_dict` is the position after the batch handed out last, and
    `load_state_dict` goes on from there; `merge_states` joins those of all ranks. Samples that cannot be used are
    written down in `output_dir`.

    Args:
        run: of `load_run`.
        validation: read `data.validation`, without augmentation.

    Raises:
        ConfigError: recipe, data and ranks do not fit together.
        DataError: shards that are missing or damaged.
    """
    ranks = _ranks()
    _check_run(run, "open_stream")
    if validation and not run.data.validation:
        raise ConfigError("the run has no validation data", where="data.validation")
    return with_data.open_stream(_checked(run, ranks, "open_stream"), ranks, validation=validation)


def build_objective(run: RunConfig) -> Objective:
    """Build the modules of a run's recipe with their first weights, on the host in fp32.

    `loss, figures = objective(batch)` computes equation 6 of Su et al. (arXiv 2211.09807), over the micro-batches of
    all ranks where `torch.distributed` has a process group; gradients are then to be averaged, as DDP does. After every
    backward pass comes `objective.after_backward()`, after every step of the optimizer `update_momentum`.

    Args:
        run: of `load_run`; its data say how many classes and words there are.

    Raises:
        ConfigError: recipe, backbone and data do not fit together, or weights to start from cannot be read.
        DataError: shards that are missing.
    """
    ranks = _ranks()
    checked = _checked(run, ranks, "build_objective")
    objective = build.build_objective(checked.run, checked.label_sets, checked.vocab_size, ranks)
    start_weights(objective, checked.run)
    return objective


def update_momentum(objective: Objective, step: int, steps: int) -> None:
    """Move the momentum target after a step of the optimizer, by the schedule of its recipe; without one, do nothing.

    Args:
        objective: of `build_objective`.
        step: that has been taken, from 0.
        steps: of the whole training.
    """
    if objective.recipe.momentum is not None:
        move_averages(objective, momentum_at(step, objective.recipe.momentum, steps))


def load_backbone(source: str | Path, pool: Pool = "mean") -> LoadedBackbone:
    """Load a vision model for images: `pooled_BD, tokens_BLD = backbone(images_BCHW)`, in evaluation mode.

    Args:
        source: a folder of `m3i-scale export`, any folder of a vision model of `transformers`, or a Hub id. No code of
            the folder is run.
        pool: what stands for an image: the mean of the patch tokens, the class token, or both side by side.

    Raises:
        ConfigError: no such folder and no such id, or no such pool.
        ExportError: the folder holds no such model, or not all of its weights.
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"no pool '{pool}'", where="load_backbone", fix=did_you_mean(pool, get_args(Pool)))
    folder = pretrained_folder(str(source), "load_backbone")
    return LoadedBackbone(load_vision(folder, pool, torch.device("cpu"))).eval()


def _check_run(run: RunConfig, where: str) -> None:
    if not isinstance(run, RunConfig):
        raise ConfigError(
            f"{where} takes the run of load_run, got {type(run).__name__}", where=where, fix=f"{where}(load_run(…))"
        )


def _ranks() -> Ranks:
    return ProcessGroupRanks() if dist.is_available() and dist.is_initialized() else SingleProcess()


def _checked(run: RunConfig, ranks: Ranks, where: str) -> with_data.RunWithData:
    _check_run(run, where)
    if run.task is not None:
        raise ConfigError(
            "a run of a task has no recipe to train in a loop of your own",
            where="task",
            fix="m3i-scale finetune, or a run file with a recipe",
        )
    return with_data.check_with_data(run, ranks.world_size)
