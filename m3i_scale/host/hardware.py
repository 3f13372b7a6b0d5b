"""Published rates of GPUs and their links."""

from __future__ import annotations

from dataclasses import dataclass

from m3i_scale.errors import ConfigError, did_you_mean

TFLOPS = {
    "a100": {"bf16": 312.0, "fp16": 312.0},
    "h100": {"bf16": 989.0, "fp16": 989.0},
    "h200": {"bf16": 989.0, "fp16": 989.0},
    "v100": {"fp16": 125.0},
}
"""Dense matrix products by device and precision, from the vendor's data sheets (SXM modules)."""
_REACHED = "MFU of CLIP g/14 with NVIDIA's NeMo on 8 of them (docs/plan.md)"


@dataclass(frozen=True)
class Hardware:
    """A rank's device. Peak rates are without sparsity, bandwidths in one direction."""

    tflops: dict[str, float]
    """Peak rate by precision, in 10¹² FLOP/s."""
    intra_gb_s: float
    inter_gb_s: float
    mfu: float
    """Assumed fraction of the peak rate."""
    source: str
    latency_us: float | None = None
    """Latency of a ring step between nodes, in µs. None uses NCCL's tuner values, by protocol and size (`PROTOCOLS` in
    plan/timing.py)."""
    intra_latency_us: float | None = None
    """The same within a node."""


PRESETS = {
    "h100": Hardware(
        {**TFLOPS["h100"], "fp32": 67.0},
        intra_gb_s=450.0,
        inter_gb_s=50.0,
        mfu=0.21,
        source="NVIDIA's data sheet of the H100 SXM (dense rates, NVLink 900 GB/s both ways) and of the DGX H100 (one "
        f"400 Gb/s port a GPU); {_REACHED}",
    ),
    "a100": Hardware(
        {**TFLOPS["a100"], "fp32": 19.5},
        intra_gb_s=300.0,
        inter_gb_s=25.0,
        mfu=0.39,
        source="NVIDIA's data sheet of the A100 SXM (dense rates, NVLink 600 GB/s both ways) and of the DGX A100 (one "
        f"200 Gb/s port a GPU); {_REACHED}",
    ),
    "cpu": Hardware(
        {"bf16": 0.2, "fp16": 0.09, "fp32": 0.09},
        intra_gb_s=2.0,
        inter_gb_s=1.0,
        mfu=0.4,
        latency_us=100.0,
        intra_latency_us=100.0,
        source="matrix products on one core of an AMD EPYC; bandwidths, latencies and the MFU are assumptions",
    ),
}


def hardware(name: str) -> Hardware:
    """Return a preset."""
    if name not in PRESETS:
        raise ConfigError(f"no hardware '{name}'", where="--hardware", fix=did_you_mean(name, PRESETS))
    return PRESETS[name]
