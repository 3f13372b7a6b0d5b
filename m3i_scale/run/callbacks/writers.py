"""Factory of the callbacks that need an optional package."""

from __future__ import annotations

from m3i_scale.config import LogConfig
from m3i_scale.run.callbacks.base import Callback


def writers_of(log: LogConfig) -> list[Callback]:
    """Return the callbacks of `log.tensorboard` and `log.wandb`."""
    writers: list[Callback] = []
    if log.tensorboard:
        from m3i_scale.run.callbacks.tensorboard import TensorBoardWriter

        writers.append(TensorBoardWriter())
    if log.wandb != "off":
        from m3i_scale.run.callbacks.wandb import WandbWriter

        writers.append(WandbWriter(log.wandb))
    return writers
