"""GPUs that a run cannot use are refused in one line; the device is presented, as its driver would."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from m3i_scale.errors import ConfigError, UserError
from m3i_scale.run import preflight
from m3i_scale.run.preflight import (
    ALLOCATOR,
    check_before_joining,
    check_card,
    check_memory,
    extend_segments,
)

GIB = 1 << 30
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One free H100; what is set in it is what the next look shows."""
    shown = SimpleNamespace(count=1, capability=(9, 0), free=79 * GIB, total=80 * GIB)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cuda")
    monkeypatch.setattr(get_accelerator(), "device_count", lambda: shown.count)
    monkeypatch.setattr(get_accelerator(), "total_memory", lambda *_: shown.total)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: shown.capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (shown.free, shown.total))
    monkeypatch.setattr(preflight, "RELEASED_S", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", *ALLOCATOR):
        monkeypatch.setenv(name, "")  # what the code sets goes too when the test ends
        monkeypatch.delenv(name)
    return shown


def test_a_good_gpu_is_taken(gpu: SimpleNamespace) -> None:
    check_before_joining()
    check_card(BF16)
    check_memory(79 * GIB)


def test_a_gpu_without_bf16(gpu: SimpleNamespace) -> None:
    gpu.capability = (7, 5)
    with pytest.raises(ConfigError) as caught:
        check_card(BF16)
    assert "bf16" in str(caught.value.where)
    check_card(FP16)


def test_a_gpu_that_others_have(gpu: SimpleNamespace) -> None:
    gpu.free = 40 * GIB
    with pytest.raises(UserError, match=r"40\.00 GiB of the 80\.00 GiB"):
        check_memory(41 * GIB)
    check_memory(39 * GIB)


def test_memory_that_a_killed_process_still_holds_is_waited_for(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([20 * GIB, 79 * GIB])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), gpu.total))
    monkeypatch.setattr(preflight, "RELEASED_S", 60.0)
    check_memory(39 * GIB)


def test_a_gpu_that_is_too_small(gpu: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"81\.00 GiB"):
        check_memory(81 * GIB)


@pytest.mark.parametrize("given", [None, *ALLOCATOR])
def test_segments_grow_unless_somebody_configures_the_allocator(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    extend_segments()
    chosen = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    if given is not None:
        assert chosen == {given: "max_split_size_mb:512"}
    else:
        assert list(chosen.values()) == ["expandable_segments:True"]


def test_a_cpu_has_no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    extend_segments()
    assert not any(name in os.environ for name in ALLOCATOR)


def test_more_ranks_than_gpus(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError) as caught:
        check_before_joining()
    assert "LOCAL_RANK=1" in str(caught.value.where)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interfaces in the order of the system; one has no address."""
    there = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth1": ["10.0.0.2"], "eth0": ["10.0.0.1"], "ib0": []}
    monkeypatch.setattr(preflight, "interfaces", lambda: there)


@pytest.mark.parametrize(
    ("choice", "of_gloo"),
    [
        ("eth", "eth1"),
        ("=eth0", "eth0"),
        ("no-such,lo", "lo"),
        ("^docker", None),
        ("^=lo", None),
        ("", None),
        ("ib0", None),
    ],
)
def test_gloo_takes_the_network_that_nccl_is_given(
    gpu: SimpleNamespace, networks: None, monkeypatch: pytest.MonkeyPatch, choice: str, of_gloo: str | None
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", choice)
    check_before_joining()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == of_gloo
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "docker0")
    check_before_joining()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "docker0"


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch for CUDA on a host with a GPU, whose driver it cannot use."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_driver_that_is_older_than_torch(old_driver: Path) -> None:
    with pytest.raises(UserError, match="too old") as caught:
        check_before_joining(old_driver)
    assert "Please update" not in str(caught.value)


@pytest.mark.parametrize("visible", ["0", "1,0", "GPU-8932f937", "MIG-c6d4f1ef"])
def test_a_gpu_that_is_chosen_needs_a_driver(old_driver: Path, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError):
        check_before_joining(old_driver)


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "none"])
def test_who_has_chosen_the_cpu_needs_no_driver(
    old_driver: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_before_joining(old_driver)


def test_a_host_without_gpus_that_can_be_opened_needs_no_driver(
    old_driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)  # as a control group answers, to root too
        check_before_joining(old_driver)
    (old_driver / "nvidia0").unlink()
    check_before_joining(old_driver)
