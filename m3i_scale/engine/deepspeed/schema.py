"""Keys of a DeepSpeed JSON that have an effect in this trainer, with their types and ranges.

DeepSpeed ignores most unknown keys, and reads many that have no effect here. Only the fields below are accepted; a test
checks that the installed version reads them. Rules between sections are in `rules.py`, hints about other keys in
`hints.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AUTO = "auto"


def _to_int(value: Any) -> Any:
    """Read 5e7 as the integer that it equals; beyond 2**53 a float is not exact."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _stage_is_number(section: Any) -> Any:
    """Reject a stage of `true`, which equals 1."""
    if isinstance(section, dict) and isinstance(section.get("stage"), bool):
        raise ValueError("a stage is a number")
    return section


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(_to_int)]
Count = Annotated[int, BeforeValidator(_to_int), Field(gt=0)]
Size = Annotated[int, BeforeValidator(_to_int), Field(ge=0)]
"""Size in elements."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
DType = Literal["fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A strict section of the file: values must have exactly the declared type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Switched(Section):
    """A section with an `enabled` switch."""

    enabled: bool


class Bf16(Switched):
    """Settings of bf16 parameters."""

    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16(Switched):
    """Settings of fp16 parameters and the loss scale."""

    auto_cast: bool = False
    loss_scale: NotNegative = 0
    """Static loss scale; 0 for dynamic scaling, which uses the next five fields."""
    initial_scale_power: Integer = 16
    loss_scale_window: Count = 1000
    hysteresis: Integer = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Count = 1
    fp16_master_weights_and_grads: bool = False


class DataTypes(Section):
    """Dtype of gradient accumulation."""

    grad_accum_dtype: DType | None = None


class Offload(Section):
    """Offload target of a part of the states; `none`, DeepSpeed's default, offloads nothing."""

    device: Literal["cpu", "none"]
    pin_memory: bool = True


class PartialOffload(Offload):
    """Offload target and fraction of the optimizer states under stage 3."""

    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class Zero(Section):
    """Keys that all stages read."""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Count = 500_000_000
    overlap_comm: bool | None = None
    offload_optimizer: Offload = Offload(device="none")


class Zero12(Zero):
    """Keys that the optimizer of stages 1 and 2 reads."""

    stage: Literal[1, 2]
    allgather_bucket_size: Annotated[Size, Field(multiple_of=2)] = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False


class Zero3(Zero):
    """Keys that the optimizer of stage 3 reads."""

    stage: Literal[3]
    offload_optimizer: PartialOffload = PartialOffload(device="none")
    offload_param: Offload = Offload(device="none")
    sub_group_size: Size = 1_000_000_000
    stage3_prefetch_bucket_size: Size = 50_000_000
    stage3_param_persistence_threshold: Size = 100_000
    stage3_model_persistence_threshold: Size = 2**63 - 1
    stage3_max_live_parameters: Size = 1_000_000_000
    stage3_max_reuse_distance: Size = 1_000_000_000
    stage3_module_granularity_threshold: Integer = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    zero_hpz_partition_size: Count = 1
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class AdamW(Section):
    """Hyperparameters of the optimizer. The class that DeepSpeed builds determines which other keys are read."""

    lr: Positive
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NotNegative
    adam_w_mode: Literal[True] = True
    """DeepSpeed ignores it for the type AdamW, which always decouples the weight decay."""
    torch_adam: bool = False
    """Use PyTorch's AdamW."""
    fused: bool = False
    bias_correction: bool = True
    fp32_optimizer_states: bool = True


class Optimizer(Section):
    """The optimizer, which is built from this file."""

    type: Annotated[Literal["adamw"], BeforeValidator(_lower)]
    params: AdamW


class FlopsProfiler(Switched):
    """Settings of DeepSpeed's profiler."""

    recompute_fwd_factor: NotNegative = 0.0
    profile_step: Count = 1
    module_depth: Integer = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLogger(Section):
    """Timing of collectives; active as soon as the section exists."""

    enabled: bool = True
    prof_all: bool = True
    prof_ops: list[Any] = []
    verbose: bool = False
    debug: bool = False


class ThroughputTimer(Section):
    """Logging of samples per second in DeepSpeed's log."""

    enabled: bool = True
    synchronized: bool = True


class Timers(Section):
    """Settings of DeepSpeed's timers."""

    throughput: ThroughputTimer = ThroughputTimer()


class DeepSpeedFile(Section):
    """The complete file, without any "auto"."""

    train_batch_size: Count = 1
    train_micro_batch_size_per_gpu: Count = 1
    gradient_accumulation_steps: Count = 1
    gradient_clipping: NotNegative
    communication_data_type: DType | None = None
    bf16: Bf16 = Bf16(enabled=False)
    fp16: Fp16 = Fp16(enabled=False)
    data_types: DataTypes = DataTypes()
    zero_optimization: Annotated[Zero12 | Zero3, Field(discriminator="stage"), BeforeValidator(_stage_is_number)]
    optimizer: Optimizer
    steps_per_print: Count | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    disable_python_gc: bool = False
    dump_state: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "warning"
    timers: Timers = Timers()
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler(enabled=False)


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections that a value of this type may be: one per kind of stage, [] for a plain value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for item in get_args(annotation) for section in sections_of(item)]


def fields_at(path: tuple[str, ...]) -> set[str]:
    """Return the keys allowed in the section at a path, under any stage; empty if it is not a section."""
    here: list[type[Section]] = [DeepSpeedFile]
    for name in path:
        fields = [section.model_fields[name] for section in here if name in section.model_fields]
        here = [section for field in fields for section in sections_of(field.annotation)]
    return {name for section in here for name in section.model_fields}


def known_paths(above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield every key of the file, sections included, as `zero_optimization.stage`."""
    for name in sorted(fields_at(above)):
        yield ".".join((*above, name))
        yield from known_paths((*above, name))
