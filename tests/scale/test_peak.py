"""The peak that MFU is a share of."""

import pytest
import torch

from m3i_scale.errors import ConfigError
from m3i_scale.scale.peak import PEAK_TFLOPS, Peak, compute_dtype, measured_peak, named_peak


def test_named_and_given():
    assert named_peak("h100-bf16", torch.bfloat16) == Peak(989.0, "h100-bf16")
    assert named_peak(12.5, torch.float32) == Peak(12.5, "given")
    assert all(name.rpartition("-")[2] in ("bf16", "fp16") for name in PEAK_TFLOPS)


@pytest.mark.parametrize(
    ("given", "dtype", "words"),
    [
        ("h100-bf61", torch.bfloat16, "no accelerator 'h100-bf61'"),
        ("h100-bf16", torch.float32, "not the peak of fp32"),
        ("a100-bf16", torch.float16, "not the peak of fp16"),
        (0, torch.float32, "positive"),
        (float("nan"), torch.float32, "positive"),
    ],
)
def test_what_is_no_peak_of_this_run_is_refused(given, dtype, words):
    with pytest.raises(ConfigError, match=words):
        named_peak(given, dtype)


def test_measured():
    peak = measured_peak(torch.float32)
    assert peak.source == "measured"
    assert 1e-4 < peak.tflops < 1e4


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
