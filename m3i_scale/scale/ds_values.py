"""Types and ranges of single values in a DeepSpeed JSON.

Typed sections are validated by DeepSpeed's own models; the untyped keys, which DeepSpeed takes as they come and trips
over later, are listed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from m3i_scale.errors import ConfigError

AUTO = "auto"

_DTYPES = ("fp32", "fp16", "bf16")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_TAG_MODES = ("ignore", "warn", "fail")


def is_number(value: Any) -> bool:
    """A finite number; JSON booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """A whole number above 0, also in the spelling 5e7."""
    return is_number(value) and value > 0 and value == int(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


_Rule = tuple[str, Callable[[Any], bool]]
_BOOL: _Rule = ("true or false", _is_bool)
_DTYPE: _Rule = ("fp32, fp16 or bf16", _is_dtype)
_COUNT: _Rule = ("a whole number above 0", is_count)
_NOT_NEGATIVE: _Rule = ("a number, 0 or more", lambda value: is_number(value) and value >= 0)
_POSITIVE: _Rule = ("a number above 0", lambda value: is_number(value) and value > 0)

PLAIN_VALUES: dict[str, _Rule] = {
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": _NOT_NEGATIVE,
    "gradient_allreduce_op": ("'mean': losses are means over the ranks", lambda value: value == "mean"),
    "gradient_predivide_factor": _POSITIVE,
    "prescale_gradients": _BOOL,
    "communication_data_type": _DTYPE,
    "steps_per_print": ("a whole number above 0, or null", lambda value: value is None or is_count(value)),
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "disable_python_gc": _BOOL,
    "dump_state": _BOOL,
    "log_level": ("one of " + ", ".join(_LEVELS), lambda value: isinstance(value, str) and value in _LEVELS),
    "checkpoint.tag_validation": (
        "Ignore, Warn or Fail",
        lambda value: isinstance(value, str) and value.lower() in _TAG_MODES,
    ),
    "data_types.grad_accum_dtype": _DTYPE,
    "data_types.param_dtype": _DTYPE,
    "data_types.buffer_dtype": _DTYPE,
    "data_types.keep_in_fp32_modules": (
        "a list of name patterns (left out, the model's own list is taken)",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
    "flops_profiler.recompute_fwd_factor": _NOT_NEGATIVE,
    "flops_profiler.profile_step": _COUNT,
    "flops_profiler.module_depth": ("a whole number", lambda value: is_number(value) and value == int(value)),
    "flops_profiler.top_modules": _COUNT,
    "flops_profiler.detailed": _BOOL,
    "flops_profiler.output_file": ("a path, or null", lambda value: value is None or isinstance(value, str)),
    "optimizer.params.lr": _POSITIVE,
    "optimizer.params.betas": (
        "two numbers from 0 to below 1",
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_share, value)),
    ),
    "optimizer.params.eps": _POSITIVE,
    "optimizer.params.weight_decay": _NOT_NEGATIVE,
    "optimizer.params.torch_adam": _BOOL,
    "optimizer.params.fused": _BOOL,
    "optimizer.params.adam_w_mode": _BOOL,
}
"""What DeepSpeed does not check itself: dotted path → (description, test)."""


def check_values(raw: dict[str, Any], *, where: str) -> None:
    """Refuse values of the wrong type or out of range; "auto" passes. Keys must have passed `check_keys`.

    Raises:
        ConfigError: names the key, what it must be, and what it is.
    """
    for path, (wanted, holds) in PLAIN_VALUES.items():
        present, value = _lookup(raw, path)
        if present and value != AUTO and not holds(value):
            raise ConfigError(f"'{path}' must be {wanted} (got {value!r})", where=where)
    for section, model in _models().items():
        present, value = _lookup(raw, section)
        if present:
            _validate(section, _without_auto(value), model, where)


def _lookup(raw: dict[str, Any], path: str) -> tuple[bool, Any]:
    node: Any = raw
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def _models() -> dict[str, type[BaseModel]]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    return monitors | {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }


def _validate(section: str, values: dict[str, Any], model: type[BaseModel], where: str) -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join([section, *map(str, fault["loc"])])
        raise ConfigError(f"'{key}': {fault['msg']} (got {fault['input']!r})", where=where) from None
