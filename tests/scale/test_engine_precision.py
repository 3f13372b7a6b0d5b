"""What products may round to, and what a deterministic run sets and refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
import torch.utils.deterministic

from m3i_scale.engine.device import allow_tf32, check_deterministic, compute_deterministically, nondeterminism_explained
from m3i_scale.errors import ConfigError

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_NVLS_ENABLE")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    allow_tf32(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._inductor.config.deterministic = False


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_products_of_gpus_round_to_tf32_where_values_have_fewer_digits(dtype: torch.dtype, allowed: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 64, 64, generator=drawn)
    allow_tf32(torch.float32)
    before = torch.mm(*factors), torch.backends.mkldnn.matmul.fp32_precision
    allow_tf32(dtype)
    assert torch.backends.cuda.matmul.allow_tf32 == allowed
    assert torch.backends.cudnn.allow_tf32 == allowed
    # The compiler reads these, and torch raises an error if settings of its two interfaces contradict each other.
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
    assert (torch.get_float32_matmul_precision() == "high") == allowed
    assert torch.equal(torch.mm(*factors), before[0])
    assert torch.backends.mkldnn.matmul.fp32_precision == before[1]  # of CPUs


def test_a_deterministic_run_sets_what_libraries_read_when_they_start() -> None:
    check_deterministic()
    compute_deterministically()
    check_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert all(os.environ[name] for name in VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_an_environment_that_undoes_it_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as caught:
        check_deterministic()
    assert caught.value.where == "hardware.deterministic"
    assert name in str(caught.value.fix)


def test_an_operation_without_a_deterministic_form_names_the_setting() -> None:
    places, values = torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
    compute_deterministically()
    with pytest.raises(ConfigError) as caught, nondeterminism_explained():
        torch.zeros(2).put_(places, values)
    assert caught.value.where == "hardware.deterministic"
    with pytest.raises(RuntimeError, match="another"), nondeterminism_explained():
        raise RuntimeError("another")
