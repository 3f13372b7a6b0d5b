"""Read the DeepSpeed JSON, resolve every "auto" to an explained number, and reject ineffective settings.

`load_ds_config`, `resolve`, `check_accelerator`, then `deepspeed.initialize` and `check_effective`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m3i_scale.config import resource_folder
from m3i_scale.engine.deepspeed.hints import schema_error
from m3i_scale.engine.deepspeed.rules import check_rules, optimizer_class, precision
from m3i_scale.engine.deepspeed.schema import AUTO, DeepSpeedFile
from m3i_scale.engine.extensions import is_usable
from m3i_scale.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class ResolvedConfig:
    """A DeepSpeed configuration without "auto", except for accumulation if the number of ranks is unknown."""

    config: dict[str, Any]
    """Argument for `deepspeed.initialize(config=…)`."""
    filled_in: list[str]
    """Keys that were "auto" in the file."""
    where: str


_Settings = dict[str, tuple[Any, str]]
"""By key: the value that the config file implies, and its origin."""


def known_ds_configs() -> dict[str, Path]:
    """Return the built-in DeepSpeed files by name."""
    return {path.stem: path for path in sorted(resource_folder("ds_configs").glob("*.json"))}


def load_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read the JSON of a built-in name (`zero3_bf16`) or of a path, unchanged."""
    built_in = known_ds_configs()
    path = built_in.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise ConfigError(
            f"no DeepSpeed config '{name_or_path}'",
            where=str(path.absolute()),
            fix=did_you_mean(name_or_path, built_in, f"use a path, or one of: {', '.join(sorted(built_in))}"),
        )
    try:
        raw = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=lambda pairs: _without_duplicates(pairs, path),
            parse_constant=lambda name: _check_constant(name, path),
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the DeepSpeed config: {error}",
            where=str(path),
            fix="correct the JSON, or make the file readable",
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            "a DeepSpeed config must be a JSON object",
            where=str(path),
            fix="write {…}, as in ds_configs/zero3_bf16.json",
        )
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key, value in pairs:
        if key in section:
            raise ConfigError(f"'{key}' occurs twice in one section", where=str(path), fix="remove one of the two")
        section[key] = value
    return section


def _check_constant(name: str, path: Path) -> None:
    raise ConfigError(
        f"the file must have finite numbers only, got {name}", where=str(path), fix=f"replace {name} with a number"
    )


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
) -> ResolvedConfig:
    """Validate `raw` and fill in the values that follow from the config file.

    Args:
        raw: the result of `load_ds_config`; left unchanged.
        world_size: number of ranks; None if unknown: values that depend on it are not checked.
        batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per rank and forward pass.
        hidden_size: width of the widest Transformer of the model; bucket sizes follow from it.
        where: name of the file in messages.
    """
    batch, sizes = _batch(world_size, batch_size, micro_batch_size), _sizes(hidden_size)
    optim: _Settings = {
        "gradient_clipping": (clip_grad_norm, "optim.clip_grad_norm"),
        "optimizer.params.lr": (lr, "optim.lr; the trainer sets the learning rate at every step"),
        "optimizer.params.betas": (list(betas), "optim.betas"),
        "optimizer.params.eps": (eps, "optim.eps"),
        "optimizer.params.weight_decay": (weight_decay, "optim.weight_decay; vectors have none"),
    }
    config = copy.deepcopy(raw)
    values = {path: value for path, (value, _) in (batch | optim).items()} | sizes
    filled = [path for path, value in values.items() if _fill(config, path, value)]
    # For a line in its log, DeepSpeed waits for the device twice per micro-batch.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    _check(config, world_size, where)
    _complete(config, batch | optim, where)
    return ResolvedConfig(config, filled, where)


def _check(config: dict[str, Any], world_size: int | None, where: str) -> None:
    """Raise ConfigError for keys, values and combinations that have no effect or an unexpected one here."""
    known = dict(config)
    if world_size is None and known.get("gradient_accumulation_steps") == AUTO:
        del known["gradient_accumulation_steps"]
    try:
        DeepSpeedFile.model_validate(known)
    except ValidationError as error:
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise schema_error(details[0], config, where) from None
    check_rules(known, world_size=world_size, where=where)


def check_batch(world_size: int | None, batch_size: int, micro_batch_size: int) -> int:
    """Return the gradient accumulation steps per optimizer step; for one rank if the number of ranks is unknown."""
    ranks = world_size or 1
    accumulation, rest = divmod(batch_size, micro_batch_size * ranks)
    if rest or not accumulation:
        raise ConfigError(
            f"optim.batch_size ({batch_size}) must be a multiple of optim.micro_batch_size ({micro_batch_size})"
            + (f" × the number of ranks ({world_size})" if world_size else ""),
            where=f"optim.batch_size: {batch_size}" + (f", on {world_size} ranks" if world_size else ""),
            why="every rank runs the same number of micro-batches of the same size",
            fix=_batch_advice(ranks, batch_size, micro_batch_size),
        )
    return accumulation


def _batch(world_size: int | None, batch_size: int, micro_batch_size: int) -> _Settings:
    accumulation = check_batch(world_size, batch_size, micro_batch_size)  # if one rank cannot, no number of ranks can
    why = f"optim.batch_size {batch_size} = micro_batch_size {micro_batch_size} × {accumulation} × {world_size} ranks"
    unknown = (AUTO, "the number of ranks is not known")
    return {
        "train_batch_size": (batch_size, "optim.batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch_size, "optim.micro_batch_size"),
        "gradient_accumulation_steps": unknown if world_size is None else (accumulation, why),
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


def _sizes(hidden_size: int) -> dict[str, int]:
    """Return sizes in elements. The JSON may set other sizes. A Transformer layer has about 12 · hidden² weights. The
    floors are for small models: calls for one small matrix cost more than the transfer, and gathering a few MiB costs
    nothing (docs/benchmarks/performance.md)."""
    square = hidden_size * hidden_size
    sizes = {
        "reduce_bucket_size": max(square, 4 * MEBI),
        "stage3_prefetch_bucket_size": max(int(0.9 * square), 4 * MEBI),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_max_live_parameters": max(16 * square, 8 * MEBI),  # one layer and a part of the next
        "stage3_max_reuse_distance": max(16 * square, 8 * MEBI),
        "sub_group_size": max(24 * square, 16 * MEBI),  # two layers are updated at a time
    }
    return {f"zero_optimization.{key}": value for key, value in sizes.items()}


def _fill(config: dict[str, Any], path: str, value: Any) -> bool:
    *parents, key = path.split(".")
    section: Any = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not isinstance(section, dict) or section.get(key) != AUTO:
        return False
    section[key] = value
    return True


def _complete(config: dict[str, Any], settings: _Settings, where: str) -> None:
    """Add settings that the file lacks. Raise ConfigError if the file contradicts one."""
    for path, (value, why) in settings.items():
        if value == AUTO:
            continue
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if not _same(section.setdefault(key, value), value):
            raise ConfigError(
                f"'{path}' is {section[key]!r}, but the config file says {value!r}",
                where=where,
                why=why,
                fix='write "auto", or change the config file',
            )


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    return math.isclose(given, wanted, rel_tol=1e-12)


def check_accelerator(resolved: ResolvedConfig) -> None:
    """Raise ConfigError for features that this machine's accelerator lacks; call it before DeepSpeed is initialized."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name, kind = accelerator.device_name(), precision(resolved.config)
    supported = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported(), "fp32": True}
    if not supported[kind]:
        others = " or ".join(other for other, there in supported.items() if there)
        raise ConfigError(
            f"'{kind}.enabled' is true, but the accelerator '{name}' has no {kind}",
            where=resolved.where,
            fix=f"use {others}; on a CPU: deepspeed=zero3_cpu or deepspeed=zero3_cpu_fp32",
        )
    if name == "cuda" and optimizer_class(resolved.config) == "FusedAdam" and not is_usable("fused_adam"):
        raise ConfigError(
            "DeepSpeed's Adam needs nvcc, which is not installed on this machine",
            where=f"{resolved.where}: optimizer.params",
            fix='set "torch_adam": true and "fused": true; or install the CUDA toolkit and set CUDA_HOME',
        )
