"""The DeepSpeed JSON: read it, refuse what would do nothing, and turn every "auto" into a number that is explained.

raw = load_ds_config("zero3_bf16")
resolved = resolve(raw, world_size=8, batch_size=4096, …, where="zero3_bf16")
rich.print(explain_table(resolved))
check_accelerator(resolved)                  # before deepspeed.initialize(config=resolved.config)
check_effective(engine, resolved)            # after it
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from m3i_scale.config import resource_folder
from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.scale.ds_effective import check_effective
from m3i_scale.scale.ds_rules import check_groups, check_rules, precision, quantized
from m3i_scale.scale.ds_schema import check_keys
from m3i_scale.scale.ds_values import AUTO, check_values

__all__ = [
    "Resolved",
    "check_accelerator",
    "check_effective",
    "explain_table",
    "known_ds_configs",
    "load_ds_config",
    "resolve",
]


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed configuration without any "auto", but for accumulation where the number of ranks is not known."""

    config: dict[str, Any]
    """What `deepspeed.initialize(config=…)` is given."""
    explained: list[tuple[str, Any, str]]
    """(key, value, why) of every value that was not in the file."""
    where: str
    """The file, for messages."""


@dataclass(frozen=True)
class _Wanted:
    """A value that the run file implies: what it is and where it comes from."""

    value: Any
    why: str
    binding: bool = True
    """An explicit value in the JSON must be equal; where it is not binding, the JSON may choose another one."""


def known_ds_configs() -> dict[str, Path]:
    """Built-in DeepSpeed files by name."""
    return {path.stem: path for path in sorted(resource_folder("ds_configs").glob("*.json"))}


def load_ds_config(name_or_path: str) -> dict[str, Any]:
    """The JSON of a built-in name (`zero3_bf16`) or of a path, unchanged.

    Raises:
        ConfigError: no such file or name, not JSON, a key that occurs twice, NaN or Infinity, or not an object.
    """
    path = Path(name_or_path)
    if not path.is_file():
        built_in = known_ds_configs()
        if name_or_path not in built_in:
            raise ConfigError(
                f"no DeepSpeed file '{name_or_path}'",
                where=str(path.absolute()),
                fix=f"give a path, or a built-in name: {did_you_mean(name_or_path, built_in)}",
            )
        path = built_in[name_or_path]
    try:
        raw = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=lambda pairs: _without_duplicates(pairs, path),
            parse_constant=lambda name: _refuse_constant(name, path),
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"cannot read the DeepSpeed file: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ConfigError("a DeepSpeed file is a JSON object", where=str(path), fix="see ds_configs/zero3_bf16.json")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key, value in pairs:
        if key in section:
            raise ConfigError(f"'{key}' occurs twice in one section", where=str(path), fix="remove one of the two")
        section[key] = value
    return section


def _refuse_constant(name: str, path: Path) -> None:
    raise ConfigError(f"{name} is not a number", where=str(path))


def resolve(
    raw: dict[str, Any],
    *,
    world_size: int | None,
    batch_size: int,
    micro_batch_size: int,
    clip_grad_norm: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    hidden_size: int,
    where: str,
) -> Resolved:
    """Check `raw` and fill in what the run file knows.

    Args:
        raw: as read by `load_ds_config`; left unchanged.
        world_size: number of ranks; None: not known, and what depends on it is not looked at.
        batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per rank and forward pass.
        hidden_size: width of the widest Transformer of the model; bucket sizes follow from it.
        where: the file, for messages.

    Raises:
        ConfigError: an unknown or ineffective setting, "auto" where nothing can be filled in, a value that contradicts
            the run file, or a batch size that ranks × micro-batch does not divide.
    """
    check_keys(raw, where=where)
    check_values(raw, where=where)
    wanted = _batch(world_size, batch_size, micro_batch_size)
    wanted["gradient_clipping"] = _Wanted(clip_grad_norm, "optim.clip_grad_norm")
    wanted["optimizer.params.lr"] = _Wanted(lr, "optim.lr; the trainer sets the learning rate at every step")
    wanted["optimizer.params.betas"] = _Wanted(list(betas), "optim.betas")
    wanted["optimizer.params.eps"] = _Wanted(eps, "optim.eps")
    wanted["optimizer.params.weight_decay"] = _Wanted(weight_decay, "optim.weight_decay; vectors have none")
    wanted |= _sizes(hidden_size)
    _check_auto(raw, "", wanted, where)
    check_rules(raw, where=where)
    check_groups(raw, world_size=world_size, where=where)
    return _fill(raw, wanted, where)


def check_batch(world_size: int | None, batch_size: int, micro_batch_size: int) -> int:
    """Micro-batches of a rank in an optimizer step; where the number of ranks is not known, of one rank.

    Raises:
        ConfigError: ranks × micro-batch does not divide the batch; with batches that they divide.
    """
    ranks = world_size or 1
    accumulation, rest = divmod(batch_size, micro_batch_size * ranks)
    if rest or not accumulation:
        raise ConfigError(
            f"optim.batch_size {batch_size} is not micro_batch_size {micro_batch_size} × accumulation"
            + (f" × {world_size} ranks" if world_size else ""),
            where=f"optim.batch_size: {batch_size}" + (f", on {world_size} ranks" if world_size else ""),
            why="every rank runs the same number of micro-batches of the same size",
            fix=_batch_advice(ranks, batch_size, micro_batch_size),
        )
    return accumulation


def _batch(world_size: int | None, batch_size: int, micro_batch_size: int) -> dict[str, _Wanted]:
    accumulation = check_batch(world_size, batch_size, micro_batch_size)  # what one cannot, none can
    why = f"optim.batch_size {batch_size} = micro_batch_size {micro_batch_size} × {accumulation} × {world_size} ranks"
    unknown = _Wanted(AUTO, "the number of ranks is not known", binding=False)
    return {
        "train_batch_size": _Wanted(batch_size, "optim.batch_size"),
        "train_micro_batch_size_per_gpu": _Wanted(micro_batch_size, "optim.micro_batch_size"),
        "gradient_accumulation_steps": unknown if world_size is None else _Wanted(accumulation, why),
    }


def _batch_advice(world_size: int, batch_size: int, micro_batch_size: int) -> str:
    unit = micro_batch_size * world_size
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    advice = "set optim.batch_size to " + (f"{below} or {above}" if below else f"{above}")
    if batch_size % world_size:
        return advice
    per_rank = batch_size // world_size
    divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    near = [max((size for size in divisors if size < micro_batch_size), default=0)]
    near.append(min((size for size in divisors if size > micro_batch_size), default=0))
    return advice + ", or optim.micro_batch_size to " + " or ".join(str(size) for size in near if size)


MEBI = 2**20


def _sizes(hidden_size: int) -> dict[str, _Wanted]:
    """Sizes in elements. A Transformer layer has about 12 · hidden² weights.

    The floors are for small models: a bucket of one small matrix costs more calls than transfer, and a few MiB gathered
    cost nothing (docs/performance.md).
    """
    square = hidden_size * hidden_size
    formulas: dict[str, tuple[int, int, str]] = {
        "reduce_bucket_size": (square, 4 * MEBI, "hidden²"),
        "stage3_prefetch_bucket_size": (int(0.9 * square), 4 * MEBI, "0.9 · hidden²"),
        "stage3_param_persistence_threshold": (10 * hidden_size, 0, "10 · hidden"),
        "stage3_max_live_parameters": (16 * square, 8 * MEBI, "16 · hidden²: one layer and a part of the next"),
        "stage3_max_reuse_distance": (16 * square, 8 * MEBI, "16 · hidden²: one layer and a part of the next"),
        "sub_group_size": (24 * square, 16 * MEBI, "24 · hidden²: two layers are updated at a time"),
    }
    values = {
        key: (
            max(value, floor),
            f"{why}, hidden = {hidden_size}" + (f"; at least {floor // MEBI} Mi elements" if floor > value else ""),
        )
        for key, (value, floor, why) in formulas.items()
    }
    return {f"zero_optimization.{key}": _Wanted(value, why, binding=False) for key, (value, why) in values.items()}


def _check_auto(section: dict[str, Any], prefix: str, wanted: dict[str, _Wanted], where: str) -> None:
    for key, value in section.items():
        path = prefix + key
        if isinstance(value, dict):
            _check_auto(value, path + ".", wanted, where)
        elif value == AUTO and path not in wanted:
            dropped = (
                "DeepSpeed takes it for off and goes on" if key == "enabled" else "DeepSpeed drops it or fails later"
            )
            raise ConfigError(
                f"'{path}' cannot be \"auto\"",
                where=where,
                why=f"nothing in the run file says what it should be, and {dropped}",
                fix='give a value. "auto" works for: ' + ", ".join(wanted),
            )


def _fill(raw: dict[str, Any], wanted: dict[str, _Wanted], where: str) -> Resolved:
    config = copy.deepcopy(raw)
    explained: list[tuple[str, Any, str]] = []
    for path, want in wanted.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if section.get(key) == AUTO:
            section[key] = want.value
            explained.append((path, want.value, want.why))
        elif key not in section and want.binding:
            section[key] = want.value
            explained.append((path, want.value, f"left out in the file: {want.why}"))
        elif want.binding and not _same(section[key], want.value):
            raise ConfigError(
                f"'{path}' is {section[key]!r}, but the run file says {want.value!r}",
                where=where,
                why=want.why,
                fix='write "auto", or change the run file',
            )
    return Resolved(config, explained, where)


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    return math.isclose(given, wanted, rel_tol=1e-12)


def explain_table(resolved: Resolved) -> Table:
    """Every value that the file left to us, as a table for the terminal."""
    table = Table(title=f"DeepSpeed: filled in for {resolved.where}", title_justify="left")
    for heading in ("key", "value", "why"):
        table.add_column(heading, overflow="fold")
    for key, value, why in resolved.explained:
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value), why)
    return table


def check_accelerator(resolved: Resolved) -> None:
    """Refuse what the accelerator of this machine does not have; call it before DeepSpeed is initialised.

    Raises:
        ConfigError: fp16 or bf16 is enabled and not supported, or something is quantised without kernels for it.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported: dict[str, Callable[[], Any]] = {
        "bf16": accelerator.is_bf16_supported,
        "fp16": accelerator.is_fp16_supported,
    }
    kind = precision(resolved.config)
    if kind in supported and not supported[kind]():
        others = [name for name, ask in supported.items() if name != kind and ask()]
        raise ConfigError(
            f"'{kind}.enabled' is true, but the accelerator '{accelerator.device_name()}' has no {kind}",
            where=resolved.where,
            fix=f"take {' or '.join([*others, 'fp32'])}; on a CPU: deepspeed=zero3_cpu or deepspeed=zero3_cpu_fp32",
        )
    names = quantized(resolved.config)
    builder = accelerator.get_op_builder("QuantizerBuilder")
    if names and (builder is None or builder.__name__ == "NotImplementedBuilder" or not builder().is_compatible()):
        raise ConfigError(
            f"'zero_optimization.{names[0]}' is set, but the accelerator '{accelerator.device_name()}' cannot quantise",
            where=resolved.where,
            why="DeepSpeed has the kernels for CUDA devices, and this machine cannot build them",
            fix=f"remove '{names[0]}'",
        )
