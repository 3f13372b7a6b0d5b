"""Whether streams can be shared out over ranks, workers and micro-batches."""

from __future__ import annotations

from m3i_scale.config import DataConfig
from m3i_scale.errors import ConfigError


def check_shares(data: DataConfig, *, micro_batch_size: int, world_size: int) -> None:
    """Check that ranks, streams, workers and micro-batch fit, before anything is read.

    Raises:
        ConfigError: they do not; the message names values that do.
    """
    if data.streams % world_size:
        raise ConfigError(
            f"{data.streams} streams cannot be shared out evenly over {world_size} ranks",
            where="data.streams",
            why="the order of samples is the same for every number of ranks only if each owns whole streams",
            fix=f"take a multiple of {world_size}, e.g. {_next_multiple(data.streams, world_size)}; "
            f"with {data.streams} streams, {_divisors(data.streams)} ranks fit",
        )
    own = data.streams // world_size
    if micro_batch_size % own:
        raise ConfigError(
            f"a micro-batch of {micro_batch_size} cannot be taken evenly from {own} streams per rank",
            where="optim.micro_batch_size",
            fix=f"take a multiple of {own}, e.g. {_next_multiple(micro_batch_size, own)}, or change data.streams",
        )
    if data.workers and own % data.workers:
        raise ConfigError(
            f"{own} streams per rank cannot be shared out evenly over {data.workers} workers",
            where="data.workers",
            fix=f"take one of {_divisors(own)}, or 0 to load in the training process",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(value) for value in range(1, number + 1) if number % value == 0)


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
