"""Build the modules of a run without memory for them; whatever keeps them from being built is reported with its key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import Ranks


def build_on_meta(
    run: RunConfig,
    label_sets: dict[str, list[str]],
    vocab_size: int | None,
    ranks: Ranks | None = None,
    *,
    image_counts: list[int] | None = None,
) -> Objective:
    """Build as `build_objective`, on `meta`."""

    def build(run: RunConfig) -> Objective:
        with torch.device("meta"):
            return build_objective(run, label_sets, vocab_size, ranks, image_counts=image_counts)

    try:
        return build(run)
    except UserError:
        raise
    except Exception as error:  # a model of a library may raise anything for a value of its configuration
        fault = f"the model cannot be built: {type(error).__name__}: {error}"
        keys = list(_keys_at_fault(run, build))
    raise ConfigError(
        fault,
        where=", ".join(keys) or "backbone.config, text.config, recipe",
        fix="leave it out, or take a value that the model of `transformers` knows" if keys else None,
    )


def _keys_at_fault(run: RunConfig, build: Callable[[RunConfig], Objective]) -> Iterator[str]:
    """Find the fields of configurations without which the model can be built."""
    for name in ("backbone", "text"):
        section = getattr(run, name)
        for key, value in section.config.items():
            rest = {other: section.config[other] for other in section.config if other != key}
            changed = section.model_copy(update={"config": rest})
            try:
                build(run.model_copy(update={name: changed}))
            except Exception:  # with it or without: another one is at fault, too
                continue
            yield f"{name}.config.{key}: {value!r}"
