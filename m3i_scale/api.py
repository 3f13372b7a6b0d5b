"""Public functions for configs, custom training loops and trained backbones. See docs/guides/python.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.config import RunConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.evaluation.features import Pool, VisionModel, load_vision
from m3i_scale.objective import build
from m3i_scale.objective.build import update_ema_teacher
from m3i_scale.objective.information import Objective
from m3i_scale.objective.pretrained import start_weights
from m3i_scale.objective.ranks import ProcessGroupRanks, Ranks, SingleProcess
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe
from m3i_scale.report.recipe_table import built_in_rows
from m3i_scale.run import data_checks


def load_run(name_or_path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Load a config file: recipe, backbone, data and optimization.

    If the recipe names modules with custom classes, they are imported, which runs their code.

    Examples:
        >>> run = m3i_scale.load_run("m3i_mini", ["data.datasets.photos.path=/data/shards/train", "optim.steps=1000"])

    Args:
        name_or_path: path, or name of a built-in config such as `m3i`.
        overrides: `section.key=value`, as on the command line.

    Raises:
        ConfigError: the file is missing, a key is unknown, or values are inconsistent. All errors are reported at once.
    """
    return load_run_and_recipe(str(name_or_path), overrides)[0]


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Load the recipe of a config file, inputs × targets (Su et al., arXiv 2211.09807, table 1). See `load_run`.

    Examples:
        >>> [target.name for target in m3i_scale.load_recipe("m3i").targets]

    Raises:
        ConfigError: as for `load_run`.
    """
    return load_run_and_recipe(str(name_or_path), overrides)[1]


def list_recipes() -> list[dict[str, Any]]:
    """Return the built-in recipes: `name` (an argument of `load_run` and `train`), `description`, what the recipe
    `needs` besides images (labels, captions, …), and `family`.

    Examples:
        >>> [recipe["name"] for recipe in m3i_scale.list_recipes()]
    """
    fields = ("name", "description", "needs", "family")
    return [{field: row[field] for field in fields} for row in built_in_rows()]


def open_stream(run: RunConfig, *, validation: bool = False) -> TrainStream:
    """Open the stream of micro-batches of a run. If `torch.distributed` has a process group, it is the stream of this
    rank.

    Iterate over it to get a `Batch` of `optim.micro_batch_size` samples at a time, on the CPU, in the same order as
    `m3i-scale train`. `state_dict` is the position after the last batch returned, and `load_state_dict` resumes from
    there. `merge_states` joins the states of all ranks. Unusable samples are logged in `output_dir`.

    Examples:
        >>> stream = m3i_scale.open_stream(run)
        >>> batch = next(iter(stream))

    Args:
        run: result of `load_run`.
        validation: read `data.validation`, without augmentation.

    Raises:
        ConfigError: recipe, data and number of ranks are inconsistent.
        DataError: shards are missing or damaged.
    """
    ranks = _ranks()
    checked = _checked(run, ranks, "open_stream")
    if validation and not run.data.validation:
        raise ConfigError(
            "the run has no validation data", where="data.validation", fix="data.validation.NAME.path=/data/shards/val"
        )
    return data_checks.open_stream(checked, ranks, validation=validation)


def build_objective(run: RunConfig) -> Objective:
    """Build the modules of a run's recipe with their initial weights, on the CPU in fp32.

    `loss, metrics = objective(batch)` computes equation 6 of Su et al. (arXiv 2211.09807). If `torch.distributed` has a
    process group, it covers the micro-batches of all ranks, and gradients must be averaged, as DDP does. Call
    `objective.after_backward()` after every backward pass and `update_ema` after every optimizer step.

    Examples:
        >>> objective = m3i_scale.build_objective(run)
        >>> loss, metrics = objective(batch)
        >>> loss.backward()
        >>> objective.after_backward()

    Args:
        run: result of `load_run`. Its data determine the number of classes and the vocabulary size.

    Raises:
        ConfigError: recipe, backbone and data are inconsistent, or pretrained weights cannot be read.
        DataError: shards are missing.
    """
    ranks = _ranks()
    checked = _checked(run, ranks, "build_objective")
    objective = build.build_objective(checked.run, checked.label_sets, checked.vocab_size, ranks)
    start_weights(objective, checked.run)
    return objective


def update_ema(objective: Objective, step: int, steps: int) -> None:
    """Update the EMA weights after an optimizer step, by the schedule of the recipe. Without EMA, do nothing.

    Examples:
        >>> optimizer.step()
        >>> m3i_scale.update_ema(objective, step, steps=1000)

    Args:
        objective: result of `build_objective`.
        step: the step just completed, from 0.
        steps: total number of training steps.
    """
    if objective.recipe.ema is not None:
        update_ema_teacher(objective, objective.recipe.ema.decay_at(step, steps))


class LoadedBackbone(nn.Module):
    """Image encoder with the weights of a model folder, in fp32. Its parameters receive gradients.

    Args:
        vision: the model, as in `evaluate`.
    """

    def __init__(self, vision: VisionModel) -> None:
        super().__init__()
        self.model: nn.Module = vision.model
        """The standard model of `transformers`."""
        self._vision = vision

    @property
    def image_size(self) -> int:
        """Return the image size in pixels."""
        return self._vision.size

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of every image (B, D), and its patch tokens, row by row (B, L, D).

        Args:
            images_BCHW: uint8 (B, 3, H, W), H = W = `image_size`; normalized here.

        Raises:
            DataError: images have another dtype or size.
            ExportError: the model has no class token, but `pool` needs one.
        """
        size = self.image_size
        if images_BCHW.dtype != torch.uint8 or images_BCHW.shape[1:] != (3, size, size):
            raise DataError(
                f"the images are {images_BCHW.dtype} {tuple(images_BCHW.shape)}",
                where="images_BCHW",
                why="pixels from 0 to 255 are normalized here; others would be wrong without notice",
                fix=f"give torch.uint8 (B, 3, {size}, {size})",
            )
        return self._vision.encode(images_BCHW)


def load_backbone(source: str | Path, pool: Pool = "mean") -> LoadedBackbone:
    """Load a vision model for images: `pooled_BD, tokens_BLD = backbone(images_BCHW)`, in evaluation mode.

    Examples:
        >>> backbone = m3i_scale.load_backbone("/data/export")
        >>> size = backbone.image_size
        >>> pooled_BD, tokens_BLD = backbone(torch.zeros(2, 3, size, size, dtype=torch.uint8))

    Args:
        source: a folder from `m3i-scale export`, any folder with a vision model of `transformers`, or a Hub id. No code
            from the folder is executed.
        pool: image representation: the mean of the patch tokens, the class token, or both concatenated.

    Raises:
        ConfigError: the folder, Hub id or pool does not exist.
        ExportError: the folder has no such model, some of its weights are missing, or its image processor does more
            than resize, crop the center square and normalize.
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"no pool '{pool}'", where="load_backbone", fix=did_you_mean(pool, get_args(Pool)))
    folder = pretrained_folder(str(source), "load_backbone")
    return LoadedBackbone(load_vision(folder, pool, torch.device("cpu"))).eval()


def _ranks() -> Ranks:
    return ProcessGroupRanks() if dist.is_available() and dist.is_initialized() else SingleProcess()


def _checked(run: RunConfig, ranks: Ranks, where: str) -> data_checks.RunWithData:
    if not isinstance(run, RunConfig):
        raise ConfigError(
            f"{where} takes the run of load_run, got {type(run).__name__}", where=where, fix=f"{where}(load_run(…))"
        )
    if run.task is not None:
        raise ConfigError(
            "a run of a task has no recipe to train in a custom loop",
            where="task",
            fix="m3i-scale finetune, or a run file with a recipe",
        )
    return data_checks.check_with_data(run, ranks.world_size)
