"""Load a checkpoint into an engine, or read its full weights one by one or block by block, independent of the number of
ranks, ZeRO stage and precision that wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from m3i_scale.checkpoint.layout import BUFFERS, DATA_FILES, read_meta, read_object, unreadable
from m3i_scale.checkpoint.saver import buffers_of, ranges_of, shapes_of
from m3i_scale.checkpoint.stream import sum_of_squares
from m3i_scale.checkpoint.tensors import AVERAGE, SavedTensors
from m3i_scale.engine.agree import from_rank_0, together
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.engine_state import MASTER, MOMENTS, make_moments, pieces, publish, restore_counters
from m3i_scale.engine.partition import load_frozen, saved_frozen
from m3i_scale.errors import CheckpointError

NORM_TOLERANCE, ROUNDED_NORM_TOLERANCE = 1e-6, 4e-3
"""Relative tolerances: terms are added in another order; 16-bit master weights are rounded."""
_OF_MOMENTS = tuple(f"{kind}/" for kind in MOMENTS)
Which = Literal["student", "ema"]
HEADS = "heads."
"""Buffers of heads affect their outputs: the running statistics of batch norm."""
BLOCK_ELEMENTS = 1 << 22
"""Elements read at a time: 16 MiB in fp32."""


def load_checkpoint(folder: Path, engine: Any, ema: ShardedEma | None) -> list[dict[str, Any]]:
    """Load engine, EMA target, buffers and random states from a verified checkpoint; return the data states of all
    ranks that wrote it. Collective: every rank reads only its part."""
    # A read error on one rank fails all ranks: the others would wait for it in `publish`.
    saved: SavedTensors = together(lambda: _read_own_part(folder, engine, ema))
    # Every rank needs these files of all ranks: one rank reads them.
    states: list[dict[str, Any]] = from_rank_0(
        lambda: [read_object(folder, file) for file in _files_of_ranks(folder, DATA_FILES)]
    )
    publish(engine)
    if ema is not None:
        ema.publish()
    check_norms(saved, engine, ema)
    return states


def check_norms(saved: SavedTensors, engine: Any, ema: ShardedEma | None) -> None:
    """Raise CheckpointError if the norm of a loaded tensor differs from the saved norm. Collective."""
    squares = dict.fromkeys(saved.norms, 0.0)
    rounded = dict.fromkeys(saved.norms, 0.0)
    for piece in ranges_of(engine, ema):
        if piece.key in squares:  # no moments are saved before the first optimizer step
            squares[piece.key] += sum_of_squares(piece.read().view(-1))
            rounded[piece.key] += piece.dtype != torch.float32
    # The index gives all ranks the same keys in the same order.
    sums = torch.tensor([list(squares.values()), list(rounded.values())], dtype=torch.float64)
    sums = sums.to(get_accelerator().current_device_name())
    dist.all_reduce(sums)
    for (key, saved_norm), square, in_16_bits in zip(saved.norms.items(), *sums.tolist(), strict=True):
        tolerance = ROUNDED_NORM_TOLERANCE if in_16_bits else NORM_TOLERANCE
        if not math.isclose(math.sqrt(square), saved_norm, rel_tol=tolerance, abs_tol=1e-30):
            raise CheckpointError(
                f"what was loaded is not what was saved: the norm of '{key}' was {saved_norm:.9g}, and is "
                f"{math.sqrt(square):.9g}",
                where=str(saved.folder.parent),
                fix="resume from an earlier checkpoint: checkpoint.resume=…",
            )


def _read_own_part(folder: Path, engine: Any, ema: ShardedEma | None) -> SavedTensors:
    """Read this rank's part. No collective."""
    try:
        saved, meta = SavedTensors(folder), read_meta(folder)
        _check_names(saved, engine, ema, folder)
        _read_pieces(saved, meta, engine)
        if ema is not None:
            ema.load(lambda name, start, out: saved.read_into(f"{AVERAGE}/{name}", start, out))
        _load_buffers(folder, engine.module)
        restore_counters(engine, meta["engine"])
        _restore_random_states(folder)
    except (OSError, SafetensorError) as error:
        name = Path(getattr(error, "filename", None) or folder)
        raise unreadable(folder, str(name.relative_to(folder) if name.is_relative_to(folder) else ""), error) from None
    return saved


def _check_names(saved: SavedTensors, engine: Any, ema: ShardedEma | None, folder: Path) -> None:
    shapes = {key: shape for key, shape in shapes_of(engine, ema).items() if not key.startswith(_OF_MOMENTS)}
    keys = [f"{kind}/{name}" for kind in (MASTER, AVERAGE) for name in saved.names(kind)]
    _compare_shapes(shapes, {key: saved.shape(key) for key in keys}, folder)


def _read_pieces(saved: SavedTensors, meta: dict[str, Any], engine: Any) -> None:
    make_moments(engine, int(meta["engine"]["optimizer_steps"]))
    kinds = saved.kinds()
    for piece in pieces(engine):
        for kind, view in piece.tensors.items():
            if kind in kinds:  # no moments are saved before the first optimizer step
                saved.read_into(f"{kind}/{piece.name}", piece.start, view)
    for name, parameter in saved_frozen(engine.module).items():
        load_frozen(parameter, partial(saved.read_into, f"{MASTER}/{name}"))


def _load_buffers(folder: Path, module: nn.Module) -> None:
    buffers, saved = buffers_of(module), load_file(folder / BUFFERS)
    shapes, saved_shapes = ({name: tuple(buffer.shape) for name, buffer in of.items()} for of in (buffers, saved))
    _compare_shapes(shapes, saved_shapes, folder)
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])


def _restore_random_states(folder: Path) -> None:
    """Restore this rank's random states. Additional ranks use the states of an existing rank: only dropped branches
    depend on them."""
    files = _files_of_ranks(folder, "random/rank-*.safetensors")
    states = load_file(folder / files[dist.get_rank() % len(files)])
    torch.set_rng_state(states["host"])
    if "accelerator" in states and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["accelerator"])


def _files_of_ranks(folder: Path, pattern: str) -> list[str]:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.glob(pattern))
    if not names:
        raise unreadable(folder, pattern, "no such file")
    return names


def _compare_shapes(shapes: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]], folder: Path) -> None:
    wrong = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors do not belong together with this model, e.g. {wrong[0]}",
            where=str(folder),
            why="the checkpoint is of another version of this package or of `transformers`",
            fix="resume with the version that wrote it, or start a new run from its export: backbone.from_pretrained=…",
        )


# ------------------------------------------------------------------ full weights


class SavedWeights(Mapping[str, Tensor]):
    """Tensors of a checkpoint by parameter name (`student.model.layers.0.…`), read on access and not cached.

    Args:
        saved: the tensors of the checkpoint.
        keys: keys of the saved tensors by parameter name.
        dtype: dtype of the returned tensors.
        statistics: further tensors by name, which have no optimizer state.
    """

    def __init__(
        self,
        saved: SavedTensors,
        keys: Mapping[str, str],
        dtype: torch.dtype = torch.float32,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._saved, self._keys, self._dtype = saved, dict(keys), dtype
        self._statistics = dict(statistics or {})

    def __getitem__(self, name: str) -> Tensor:
        statistic = self._statistics.get(name)
        return (self._saved.whole(self._keys[name]) if statistic is None else statistic).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._keys
        yield from self._statistics

    def __len__(self) -> int:
        return len(self._keys) + len(self._statistics)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        statistic = self._statistics.get(name)
        return self._saved.shape(self._keys[name]) if statistic is None else tuple(statistic.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the range of a tensor that begins at `start`, cast to the dtype of `out`."""
        statistic = self._statistics.get(name)
        if statistic is None:
            self._saved.read_into(self._keys[name], start, out)
        else:
            out.copy_(statistic.flatten()[start : start + out.numel()])

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a tensor as flat blocks; raise CheckpointError for non-finite elements."""
        numel = math.prod(self.shape(name))
        for start in range(0, numel, BLOCK_ELEMENTS):
            block = torch.empty(min(BLOCK_ELEMENTS, numel - start), dtype=dtype)
            self.read_into(name, start, block)
            if not bool(torch.isfinite(block).all()):
                raise CheckpointError(
                    f"'{name}' has elements that are not finite numbers",
                    where=f"elements {start:,} to {start + block.numel():,}",
                    why="a model with these weights computes NaN",
                    fix="take an earlier checkpoint of the run",
                )
            yield block


def saved_weights(checkpoint: Path, which: Which, dtype: torch.dtype = torch.float32) -> SavedWeights:
    """Return the weights of a committed checkpoint that passes `verify`. `which` selects the values for `student.…`:
    the trained weights, or their EMA."""
    saved = SavedTensors(checkpoint)
    keys = {name: f"{MASTER}/{name}" for name in saved.names(MASTER)}
    # Loss-weighting state serves only a resumed run.
    keys = {name: key for name, key in keys.items() if not name.startswith(("states.", "weights."))}
    if which == "ema":
        averages: dict[str, str] = read_meta(checkpoint).get("averages") or {}
        if not averages:
            raise CheckpointError("the run has no EMA teacher", where=str(checkpoint), fix="--weights student")
        keys |= {online: f"{AVERAGE}/{target}" for target, online in averages.items()}
        return SavedWeights(saved, keys, dtype)  # statistics belong to the trained weights only
    buffers = load_file(checkpoint / BUFFERS)
    statistics = {name: buffer for name, buffer in buffers.items() if name.startswith(HEADS)}
    return SavedWeights(saved, keys, dtype, statistics)
