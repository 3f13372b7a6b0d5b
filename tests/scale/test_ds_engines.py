"""Every built-in DeepSpeed file trains, and the engine obeys it.

Run as a script, this file is the worker of `engines`: one process initializes every built-in file in turn.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
from ds_files import RUN, changed
from launch import environment, free_port

from m3i_scale.engine.deepspeed.effective import check_effective
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig, known_ds_configs, load_ds_config, resolve
from m3i_scale.engine.deepspeed.rules import accumulation, communication, precision, reduces_in_backward
from m3i_scale.engine.gradients import ForeachBF16Optimizer
from m3i_scale.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Reports of the worker by file name."""
    report = tmp_path_factory.mktemp("engines") / "report.json"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = environment(MASTER_PORT=str(free_port()), **place)
    done = subprocess.run(
        [sys.executable, __file__, str(report)], env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("name", sorted(known_ds_configs()))
def test_built_in_file_trains_and_is_obeyed(engines, name):
    """Every file initializes a real engine, which agrees with the file, and the loss falls, the same way twice."""
    report = engines[name]
    assert report["losses"] == report["again"]
    assert report["losses"][-1] < 0.5 * report["losses"][0]
    tolerance = 1e-5 if report["precision"] == "fp32" else 1e-2
    assert report["losses"] == pytest.approx(engines["reference"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16"])
def test_gradients_of_replicated_parameters_are_summed_over_ranks_in_fp32(engines, name):
    """In bf16 every partial sum of a ring would be rounded to 8 bits."""
    assert engines[name]["communication"] == "torch.float32"


@pytest.mark.parametrize("name", sorted(known_ds_configs()))
def test_every_difference_is_found(engines, name):
    assert len(engines[name]["differences"]) >= 12
    for path, (word, message) in engines[name]["differences"].items():
        assert word in message, path


def _model() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))


def _batches(steps: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)
    return [(images[half : half + 4], targets[half : half + 4]) for _ in range(steps) for half in (0, 4)]


def _reference(steps: int) -> list[float]:
    """The same run with torch alone, in fp32."""
    import torch

    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), **{k: RUN[k] for k in ("lr", "betas", "eps", "weight_decay")})
    losses = []
    for index, (inputs, targets) in enumerate(_batches(steps)):
        loss = ((model(inputs) - targets) ** 2).mean()
        (loss / 2).backward()
        losses.append(loss.item())
        if index % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), RUN["clip_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _train(resolved: ResolvedConfig, steps: int) -> tuple[list[float], dict[str, list[str]], str]:
    import deepspeed

    model = _model()
    with mock.patch.object(deepspeed.runtime.engine, "BF16_Optimizer", ForeachBF16Optimizer):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=copy.deepcopy(resolved.config)
        )
    if reduces_in_backward(resolved.config):
        engine.optimizer.reduce_in_backward(engine.zero_reduce_bucket_size())
    check_effective(engine, resolved)
    lies = _lies(resolved.config)
    found = {path: [word, _difference(engine, resolved, path, value)] for path, (value, word) in lies.items()}
    losses = []
    for inputs, targets in _batches(steps):
        dtype = next(model.parameters()).dtype
        loss = ((engine(inputs.to(dtype)).float() - targets) ** 2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    sent = str(engine.communication_data_type)
    engine.destroy()
    return losses, found, sent


def _lies(config: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Values that the engine was not given: path → (value, what the message must name)."""
    zero = config["zero_optimization"]
    other_offload = {"device": "none" if "offload_optimizer" in zero else "cpu"}
    other_sum = "fp32" if accumulation(config) == "bf16" else "bf16"
    lies: dict[str, tuple[Any, str]] = {
        "bf16": ({"enabled": "bf16" not in config}, "precision: "),
        "data_types.grad_accum_dtype": (other_sum, "gradient accumulation type: "),
        "communication_data_type": ("bf16" if communication(config) != "bf16" else "fp32", "communication_data_type: "),
        "zero_optimization.offload_optimizer": (other_offload, "offload_optimizer: "),
    }
    if zero["stage"] == 3:
        other_offload = {"device": "none" if "offload_param" in zero else "cpu"}
        lies["zero_optimization.offload_param"] = (other_offload, "offload_param: ")
    plain = {
        "zero_optimization.stage": 9,
        "zero_optimization.reduce_bucket_size": 1,
        "zero_optimization.sub_group_size": 1,
        "zero_optimization.stage3_param_persistence_threshold": 1,
        "zero_optimization.stage3_max_live_parameters": 1,
        "gradient_clipping": 7.0,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 99,
        "train_micro_batch_size_per_gpu": 5,
        "optimizer.params.lr": 3.0,
        "optimizer.params.betas": [0.1, 0.2],
        "optimizer.params.eps": 1e-3,
        "optimizer.params.weight_decay": 0.9,
        "optimizer.params.fused": not config["optimizer"]["params"].get("fused", False),
    }
    for path, value in plain.items():
        section, _, key = path.rpartition(".")
        if section != "zero_optimization" or key in zero:
            lies[path] = (value, f"{path}: ")
    return lies


def _difference(engine: Any, resolved: ResolvedConfig, path: str, value: Any) -> str:
    """Return the error of `check_effective` for a configuration that differs from the engine in `value`."""
    try:
        check_effective(engine, ResolvedConfig(changed(resolved.config, {path: value}), [], resolved.where))
    except ConfigError as error:
        return str(error)
    return ""


def _worker(report: str) -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # torch computes in fp16 on any CPU, if slowly; DeepSpeed only asks whether it would be fast
    get_accelerator().is_fp16_supported = lambda: True
    steps = 20
    results: dict[str, Any] = {"reference": _reference(steps)}
    for name in known_ds_configs():
        resolved = resolve(load_ds_config(name), **RUN, where=name)
        losses, differences, sent = _train(resolved, steps)
        again, *_ = _train(resolved, steps)
        results[name] = {
            "losses": losses,
            "again": again,
            "differences": differences,
            "communication": sent,
            "precision": precision(resolved.config),
        }
    with open(report, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    _worker(sys.argv[1])
