"""The runs that are simulated: every DeepSpeed file of a GPU, nine models, and the parts of a run that few runs use."""

from __future__ import annotations

from run_case import Case

CARRIER = "moco"
"""A small recipe with an EMA teacher, for what does not depend on the model."""
FILES = (
    "zero1_bf16",
    "zero2_bf16",
    "zero3_bf16",
    "zero3_bf16_all_reduce",
    "zero3_bf16_cpu_offload",
    "zero3_bf16_lean",
    "zero3_fp16",
)
PHASES = "stages=[{steps: 1}, {steps: 1, image_size: 48, micro_batch_size: 2}]"
OFFLOADED = "backbone.activation_checkpointing=offload"
EVALUATED = ("evaluation.every_steps=2", "evaluation.batches=1")

CASES = {
    **{file: Case(CARRIER, file, long=True) for file in FILES},
    "m3i": Case("m3i", "zero1_bf16"),
    "m3i in parts": Case("m3i", "zero3_bf16"),
    "clip": Case("clip", "zero2_bf16"),
    "siglip": Case("siglip", "zero3_fp16"),
    "dinov2": Case("dinov2", "zero3_bf16_all_reduce"),
    "mae": Case("mae", "zero3_bf16_cpu_offload"),
    "supervised": Case("supervised", "zero3_bf16_lean"),
    "classification": Case("classifier", "zero1_bf16", ("task.ema=0.9", *EVALUATED)),
    "segmentation": Case("EoMT", "zero3_bf16"),
    "detection": Case("Mask R-CNN", "zero2_bf16"),
    "stages": Case("mae", "zero3_bf16", (PHASES,), accumulation=2),
    "activations on the host": Case("sim_global", "zero1_bf16", (OFFLOADED,), accumulation=2),
    "a host far ahead": Case(CARRIER, "zero3_bf16", device_is_ahead=False),
}
"""By name."""
