"""The peak that MFU is a share of."""

import pytest
import torch

from m3i_scale.engine.device import compute_dtype
from m3i_scale.engine.peak import PEAK_TFLOPS, Peak, data_sheet_tflops, measured_peak, named_peak
from m3i_scale.errors import ConfigError


def test_named_and_given():
    assert named_peak("h100-bf16", torch.bfloat16) == Peak(989.0, "h100-bf16")
    assert named_peak(12.5, torch.float32) == Peak(12.5, "given")
    assert all(name.rpartition("-")[2] in ("bf16", "fp16") for name in PEAK_TFLOPS)


@pytest.mark.parametrize(
    ("given", "dtype", "words"),
    [
        ("h100-bf61", torch.bfloat16, "unknown accelerator 'h100-bf61'"),
        ("h100-bf16", torch.float32, "not the peak for fp32"),
        ("a100-bf16", torch.float16, "not the peak for fp16"),
        (0, torch.float32, "positive"),
        (float("nan"), torch.float32, "positive"),
    ],
)
def test_what_is_no_peak_of_this_run_is_refused(given, dtype, words):
    with pytest.raises(ConfigError) as caught:
        named_peak(given, dtype)
    assert caught.value.where == f"hardware.peak_tflops: {given}"
    assert words in caught.value.what


def test_measured():
    before = torch.get_rng_state()
    peak = measured_peak(torch.float32)
    assert peak.source == "measured"
    assert peak.data_sheet_tflops is None
    assert 1e-4 < peak.tflops < 1e4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("device", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.0),
        ("NVIDIA H200", torch.float16, 989.0),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("Tesla V100-SXM2-32GB", torch.float16, 125.0),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("NVIDIA H100 PCIe", torch.bfloat16, None),
        ("NVIDIA H200 NVL", torch.bfloat16, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_data_sheets_are_found_by_the_name_of_a_device(device, dtype, tflops):
    assert data_sheet_tflops(device, dtype) == tflops


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, torch.float16),
    ],
)
def test_the_type_that_a_configuration_computes_in(config, dtype):
    assert compute_dtype(config) == dtype
