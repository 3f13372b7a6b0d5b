"""Build the modules of a run on the `meta` device, and report errors with the config keys that cause them."""

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
    """Build the objective on the `meta` device; for the arguments see `build_objective`."""

    def build(run: RunConfig) -> Objective:
        with torch.device("meta"):
            return build_objective(run, label_sets, vocab_size, ranks, image_counts=image_counts)

    try:
        return build(run)
    except UserError:
        raise
    except Exception as error:  # library models may raise any exception for an invalid config value
        fault = f"the model cannot be built: {type(error).__name__}: {error}"
        keys = list(_keys_at_fault(run, build))
    raise ConfigError(
        fault,
        where=", ".join(keys) or "backbone.config, text.config, recipe",
        fix="leave it out, or take a value that the model of `transformers` knows" if keys else None,
    )


def _keys_at_fault(run: RunConfig, build: Callable[[RunConfig], Objective]) -> Iterator[str]:
    """Yield the config fields without which the model can be built."""
    for name in ("backbone", "text"):
        section = getattr(run, name)
        for key, value in section.config.items():
            rest = {other: section.config[other] for other in section.config if other != key}
            changed = section.model_copy(update={"config": rest})
            try:
                build(run.model_copy(update={name: changed}))
            except Exception:  # fails with and without the field: another one is also wrong
                continue
            yield f"{name}.config.{key}: {value!r}"
