"""DeepSpeed files: what is refused, what "auto" becomes, and whether the engine obeys.

Run as a script, this file is the worker of `engines`: one process initialises every built-in file in turn.
"""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from m3i_scale.errors import ConfigError
from m3i_scale.scale.ds_config import (
    Resolved,
    check_accelerator,
    check_effective,
    explain_table,
    known_ds_configs,
    load_ds_config,
    resolve,
)

RUN: dict[str, Any] = {
    "world_size": 1,
    "batch_size": 8,
    "micro_batch_size": 4,
    "clip_grad_norm": 0.5,
    "lr": 1e-2,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.05,
    "hidden_size": 16,
}
GONE = object()


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with values set (or removed: GONE) at dotted paths."""
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is GONE:
            del node[key]
        else:
            node[key] = value
    return raw


def text_of(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# (base file, changes, words of the message)
Z = "zero_optimization."
P = "optimizer.params."
MISTAKES: list[tuple[str, dict[str, Any], list[str]]] = [
    # misspelt or misplaced
    ("zero3_bf16", {"gradient_cliping": 1.0}, ["unknown key 'gradient_cliping'", "'gradient_clipping'"]),
    ("zero3_bf16", {"train_micro_batch_size": 4}, ["unknown key", "train_micro_batch_size_per_gpu"]),
    ("zero3_bf16", {Z + "stage3_max_live_params": 1}, ["unknown key", "stage3_max_live_parameters"]),
    ("zero3_bf16", {"data_types.grad_acum_dtype": "fp32"}, ["data_types.grad_acum_dtype", "grad_accum_dtype"]),
    ("zero3_bf16", {"checkpoint.tag_validate": "Fail"}, ["checkpoint.tag_validate", "tag_validation"]),
    ("zero3_bf16", {"flops_profiler": {"enabled": True, "profile_steps": 3}}, ["profile_steps", "profile_step"]),
    ("zero3_bf16", {"bf16.enable": True}, ["bf16.enable", "enabled"]),
    ("zero3_bf16", {"timers.throughput.enabeld": True}, ["timers.throughput.enabeld", "enabled"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_param.pin_memry": True}, ["pin_memry", "pin_memory"]),
    ("zero3_bf16", {"stage3_max_live_parameters": 1}, ["wrong level", Z + "stage3_max_live_parameters"]),
    ("zero3_bf16", {"offload_optimizer": {"device": "cpu"}}, ["wrong level", Z + "offload_optimizer"]),
    ("zero3_bf16", {Z + "gradient_clipping": 1.0}, ["wrong level", "'gradient_clipping'"]),
    ("zero3_bf16", {"grad_accum_dtype": "fp32"}, ["wrong level", "data_types.grad_accum_dtype"]),
    ("zero3_bf16", {"optimizer.lr": 1e-3}, ["'optimizer.lr'", "wrong level", P + "lr"]),
    ("zero3_bf16", {Z + "prefetch_bucket_size": 1000}, ["stage3_prefetch_bucket_size"]),
    ("zero3_bf16", {"zero_optimization": True}, ["must be a section"]),
    ("zero3_bf16", {"bf16": True}, ["must be a section"]),
    # known, but without effect here
    ("zero3_bf16", {"gradient_accumulation_dtype": "fp32"}, ["data_types.grad_accum_dtype"]),
    ("zero3_bf16", {"activation_checkpointing": {}}, ["no effect", "backbone.activation_checkpointing"]),
    ("zero3_bf16", {"scheduler": {"type": "WarmupLR", "params": {}}}, ["no effect", "optim.lr"]),
    ("zero3_bf16", {"zero_allow_untested_optimizer": True}, ["no effect", "optimizer object"]),
    ("zero3_bf16", {"zero_force_ds_cpu_optimizer": False}, ["no effect"]),
    ("zero3_bf16", {"bfloat16": {"enabled": True}}, ["old spelling", "bf16"]),
    ("zero3_bf16", {"compile": {"deepcompile": True}}, ["engine.compile"]),
    ("zero3_bf16", {"dataloader_drop_last": True}, ["shards"]),
    ("zero3_bf16", {"amp": {"enabled": True}}, ["removed from DeepSpeed"]),
    ("zero3_bf16", {"elasticity": {"enabled": True}}, ["removed from DeepSpeed"]),
    ("zero3_bf16", {Z + "cpu_offload": True}, ["deprecated", "offload_optimizer"]),
    ("zero3_bf16", {Z + "mics_shard_size": 2}, ["removed from DeepSpeed"]),
    ("zero3_bf16", {Z + "allgather_partitions": True}, ["never uses"]),
    ("zero3_bf16", {Z + "stage3_gather_16bit_weights_on_model_save": True}, ["save_16bit_model"]),
    ("zero3_bf16", {Z + "zero_hpz_partition_size": 8}, ["momentum", "stale"]),
    ("zero3_bf16", {"checkpoint.load_universal": True}, ["resuming decides"]),
    ("zero3_bf16", {"optimizer.legacy_fusion": True}, ["without ZeRO"]),
    ("zero3_bf16", {"comms_logger.enabled": False}, ["as soon as the section is there"]),
    ("zero3_bf16", {"csv_monitor": {"enabled": False, "job_name": "x"}}, ["csv_monitor.job_name", "false"]),
    # keys of other conventions
    ("zero3_bf16", {"learning_rate": 1e-3}, ["Trainer or accelerate", P + "lr"]),
    ("zero3_bf16", {"max_grad_norm": 1.0}, ["Trainer or accelerate", "gradient_clipping"]),
    ("zero3_bf16", {"zero3_init_flag": True}, ["Trainer or accelerate"]),
    ("zero3_bf16", {"per_device_train_batch_size": 4}, ["train_micro_batch_size_per_gpu"]),
    # stages
    ("zero2_bf16", {Z + "stage3_max_live_parameters": 10}, ["only stage 3", "the stage is 2"]),
    ("zero2_bf16", {Z + "offload_param": {"device": "cpu"}}, ["only stage 3"]),
    ("zero2_bf16", {Z + "sub_group_size": 10}, ["only stage 3"]),
    ("zero3_bf16", {Z + "allgather_bucket_size": 10}, ["only stages 1 and 2"]),
    ("zero3_bf16", {Z + "round_robin_gradients": True}, ["only stages 1 and 2"]),
    ("zero2_bf16", {Z + "allgather_bucket_size": 11}, ["must be even"]),
    ("zero1_bf16", {Z + "reduce_bucket_size": 10}, ["BF16 optimizer"]),
    ("zero3_bf16", {Z + "stage": 4}, ["zero_optimization.stage"]),
    ("zero3_bf16", {Z + "stage": 0}, ["must be 1, 2 or 3"]),
    ("zero3_bf16", {Z + "stage": GONE}, ["must be 1, 2 or 3"]),
    ("zero3_bf16", {"zero_optimization": GONE}, ["must be 1, 2 or 3"]),
    # precision
    ("zero3_bf16", {"bf16.enabled": "auto"}, ["bf16.enabled", "takes it for off"]),
    ("zero3_bf16", {"bf16": {}}, ["bf16.enabled", "true or false"]),
    ("zero3_bf16", {"fp16": {"enabled": True}}, ["both enabled"]),
    ("zero3_bf16", {"bf16.immediate_grad_update": True}, ["BF16 optimizer"]),
    ("zero3_bf16", {"bf16.check_grad_overflow": False}, ["stages 1 and 2"]),
    ("zero3_bf16", {"bf16.bf16_optimizer_states": True}, ["bf16_master_weights_and_grads"]),
    ("zero1_bf16", {"bf16.bf16_master_weights_and_grads": True}, ["fp32 master weights"]),
    ("zero3_fp16", {"fp16.loss_scale": 128}, ["dynamic scaling"]),
    ("zero3_fp16", {"fp16.fp16_master_weights_and_grads": True}, ["CPU optimizer"]),
    ("zero3_fp16", {"fp16.loss_scale_window": 0}, ["loss_scale_window"]),
    ("zero3_bf16", {"data_types.param_dtype": "fp32"}, ["data_types.param_dtype", "bf16"]),
    ("zero3_bf16", {"data_types.grad_accum_dtype": "float"}, ["fp32, fp16 or bf16"]),
    ("zero3_bf16", {"torch_autocast": {"enabled": True}}, ["autocast"]),
    # offload
    ("zero3_bf16_cpu_offload", {Z + "offload_param.device": "nvme"}, ["nvme", "take cpu"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_param.device": "gpu"}, ["offload_param.device"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.nvme_path": "/data/nvme"}, ["only nvme offload"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.device": "none"}, ["the device is none"]),
    ("zero2_bf16", {Z + "offload_optimizer": {"device": "cpu", "ratio": 1.0}}, ["only stage 3"]),
    # optimizer
    ("zero3_bf16", {"optimizer": GONE}, ["'optimizer' is missing"]),
    ("zero3_bf16", {"optimizer.params": GONE}, ["has no 'params'"]),
    ("zero3_bf16", {"optimizer.type": "Lion"}, ["must be AdamW"]),
    ("zero3_bf16", {"optimizer.type": "Adam"}, ["must be AdamW", "AdamW too"]),
    ("zero3_bf16", {P + "lr": GONE}, [P + "lr", "left out"]),
    ("zero3_bf16", {P + "adam_w_mode": False}, ["always decouples"]),
    ("zero3_bf16", {P + "max_grad_norm": 1.0}, ["gradient_clipping"]),
    ("zero3_bf16", {P + "weight_dekay": 0.1}, ["weight_dekay", "weight_decay"]),
    ("zero3_bf16", {P + "fp32_optimizer_states": True}, ["fp32_optimizer_states", "FusedAdam"]),
    ("zero3_bf16", {P + "amsgrad": True}, ["amsgrad"]),
    ("zero3_bf16", {P + "betas": [0.9]}, ["two numbers"]),
    # values that contradict the run file, or are of the wrong type
    ("zero3_bf16", {"gradient_clipping": GONE}, ["left out", "1.0"]),
    ("zero3_bf16", {"gradient_clipping": 1.0}, ["the run file says 0.5"]),
    ("zero3_bf16", {"train_batch_size": 16}, ["the run file says 8"]),
    ("zero3_bf16", {"train_micro_batch_size_per_gpu": 8}, ["the run file says 4"]),
    ("zero3_bf16", {"gradient_accumulation_steps": 1}, ["the run file says 2"]),
    ("zero3_bf16", {P + "lr": 1e-3}, ["the run file says 0.01"]),
    ("zero3_bf16", {P + "betas": [0.9, 0.999]}, ["the run file says [0.9, 0.95]"]),
    ("zero3_bf16", {"train_batch_size": "8"}, ["whole number"]),
    ("zero3_bf16", {"gradient_clipping": True}, ["number, 0 or more"]),
    ("zero3_bf16", {Z + "reduce_bucket_size": -1}, ["reduce_bucket_size", "greater than 0"]),
    ("zero3_bf16", {Z + "overlap_comm": "sometimes"}, ["overlap_comm"]),
    ("zero3_bf16", {"communication_data_type": "half"}, ["fp32, fp16 or bf16"]),
    ("zero3_bf16", {"gradient_allreduce_op": "sum"}, ["mean"]),
    ("zero3_bf16", {"prescale_gradients": True}, ["reduce_scatter"]),
    # "auto" that nothing can fill in
    ("zero3_bf16", {"steps_per_print": "auto"}, ["cannot be", "steps_per_print"]),
    ("zero2_bf16", {Z + "allgather_bucket_size": "auto"}, ["cannot be", "allgather_bucket_size"]),
    ("zero3_bf16", {Z + "stage": "auto"}, ["cannot be", "stage"]),
    ("zero3_bf16", {"optimizer.type": "auto"}, ["cannot be", "optimizer.type"]),
    ("zero3_bf16", {P + "bias_correction": "auto"}, ["cannot be", "bias_correction"]),
]


@pytest.mark.parametrize(("base", "changes", "words"), MISTAKES, ids=[f"{b}+{'+'.join(c)}" for b, c, _ in MISTAKES])
def test_mistake_is_refused_and_explained(base, changes, words):
    raw = changed(load_ds_config(base), changes)
    with pytest.raises(ConfigError) as caught:
        resolve(raw, **RUN, where="mine.json")
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "mine.json" in message


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("zero3_bf16", {"steps_per_print": 10, "wall_clock_breakdown": True, "log_level": "warning"}),
        ("zero3_bf16", {"flops_profiler": {"enabled": True, "profile_step": 2}, "checkpoint.tag_validation": "Fail"}),
        ("zero3_bf16", {Z + "reduce_bucket_size": 5e7, Z + "stage3_max_live_parameters": 30000000}),
        ("zero3_bf16", {"bf16.bf16_master_weights_and_grads": True, "bf16.bf16_optimizer_states": True}),
        ("zero3_bf16", {P + "torch_adam": True, P + "amsgrad": True}),
        ("zero3_bf16", {P + "lr": 1e-2, P + "betas": [0.9, 0.95], "gradient_clipping": 0.5, "train_batch_size": 8}),
        ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.ratio": 0.5, P + "fp32_optimizer_states": True}),
        ("zero2_bf16", {Z + "offload_optimizer": {"device": "cpu"}, "bf16.check_grad_overflow": True}),
        ("zero1_bf16", {"data_types": GONE, Z + "reduce_bucket_size": "auto"}),
        ("zero3_fp16", {"fp16": {"enabled": True, "loss_scale": 128}}),
        ("zero3_bf16", {"comms_logger": {"enabled": True, "verbose": False}}),
    ],
)
def test_effective_settings_are_let_through(base, changes):
    raw = changed(load_ds_config(base), changes)
    before = copy.deepcopy(raw)
    resolved = resolve(raw, **RUN, where="mine.json")
    assert raw == before
    assert '"auto"' not in json.dumps(resolved.config)


def test_auto_becomes_the_documented_formulas():
    resolved = resolve(load_ds_config("zero3_bf16"), **{**RUN, "hidden_size": 1408}, where="zero3_bf16")
    zero = resolved.config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1408**2
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 1408**2)
    assert zero["stage3_param_persistence_threshold"] == 14080
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 16 * 1408**2
    assert zero["sub_group_size"] == 24 * 1408**2
    assert resolved.config["gradient_accumulation_steps"] == 2
    assert resolved.config["gradient_clipping"] == 0.5
    assert resolved.config["optimizer"]["params"]["betas"] == [0.9, 0.95]
    table = text_of(explain_table(resolved))
    for key, _, why in resolved.explained:
        assert key in table
        assert why in table


def test_batch_keys_that_are_left_out_are_filled_in_and_said():
    raw = changed(load_ds_config("zero3_bf16"), {"train_batch_size": GONE, "gradient_accumulation_steps": GONE})
    resolved = resolve(raw, **RUN, where="mine.json")
    assert resolved.config["train_batch_size"] == 8
    said = {key: why for key, _, why in resolved.explained}
    assert "left out" in said["train_batch_size"]
    assert "left out" in said["gradient_accumulation_steps"]


@given(world=st.integers(1, 64), micro=st.integers(1, 64), accumulation=st.integers(1, 64), rest=st.integers(0, 10_000))
def test_batch_arithmetic(world, micro, accumulation, rest):
    unit = world * micro
    batch = unit * accumulation + rest % unit
    run = {**RUN, "world_size": world, "micro_batch_size": micro}
    raw = load_ds_config("zero1_bf16")
    if rest % unit == 0:
        config = resolve(raw, **{**run, "batch_size": batch}, where="x").config
        per_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        assert per_rank * world == config["train_batch_size"] == batch
        return
    with pytest.raises(ConfigError) as caught:
        resolve(raw, **{**run, "batch_size": batch}, where="x")
    advice = str(caught.value.fix)
    batches, _, micros = advice.removeprefix("set optim.batch_size to ").partition(", or optim.micro_batch_size to ")
    for neighbour in batches.split(" or "):
        resolve(raw, **{**run, "batch_size": int(neighbour)}, where="x")
    for neighbour in filter(None, micros.split(" or ")):
        resolve(raw, **{**run, "batch_size": batch, "micro_batch_size": int(neighbour)}, where="x")


def test_batch_smaller_than_one_round_is_refused():
    with pytest.raises(ConfigError, match="not micro_batch_size") as caught:
        resolve(load_ds_config("zero3_bf16"), **{**RUN, "world_size": 4}, where="x")
    assert "batch_size to 16" in str(caught.value.fix)


def _all_paths(tree, prefix=""):
    for key, subtree in tree.items():
        yield prefix + key
        yield from _all_paths(subtree or {}, f"{prefix}{key}.")


def _known_paths():
    from m3i_scale.scale.ds_schema import known_tree

    return st.sampled_from(sorted(_all_paths(known_tree())))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["auto", "cpu", "fp32", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["enabled", "device", "x"]), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(value=JSON, path=st.deferred(_known_paths), base=st.sampled_from(["zero3_bf16", "zero2_bf16", "zero3_fp16"]))
def test_any_value_is_explained_or_good_for_deepspeed(value, path, base):
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = changed(load_ds_config(base), {path: value})
    places = []
    try:
        resolved = resolve(raw, **RUN, where="x")
        places.append(resolved.where)
        assert DeepSpeedConfig(resolved.config).train_batch_size == 8
    except ConfigError as error:
        places.append(error.where)
    assert places == ["x"]


def test_names_and_paths(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"a": 1}')
    assert load_ds_config(str(mine)) == {"a": 1}
    with pytest.raises(ConfigError, match="no DeepSpeed file") as caught:
        load_ds_config("zero3_bf61")
    assert "zero3_bf16" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "occurs twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1,}', "cannot read"),
        ("[1]", "JSON object"),
        ("", "cannot read"),
        ("[" * 100_000, "cannot read"),
    ],
)
def test_unreadable_files(tmp_path, text, words):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_ds_config(str(path))
    assert caught.value.where == str(path)


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_ds_config(str(path))


def test_documentation_is_true():
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert example is not None
    resolve(json.loads(example[1]), **RUN, where="docs/deepspeed.md")
    assert set(re.findall(r"^\| `(zero\w+)` \|", page, re.MULTILINE)) == set(known_ds_configs())
    for key, _, _ in resolve(load_ds_config("zero3_bf16"), **RUN, where="x").explained:
        assert key.removeprefix("optimizer.params") in page


class Recorder(dict):
    """Notes every key that is asked for, also of the copy that DeepSpeed makes."""

    seen: set[str]

    def _note(self, key):
        self.seen.add(key)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        copied = type(self)(self)
        copied.seen = self.seen
        return copied


def recorder(values):
    made = Recorder(values)
    made.seen = set()
    return made


def test_lists_agree_with_what_deepspeed_reads():
    """Every key that the installed version asks for is allowed or has a reason, and no allowed key goes unread."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from m3i_scale.scale.ds_schema import REFUSED, known_tree

    sections = {name: recorder({}) for name in ("data_types", "checkpoint", "flops_profiler")}
    top = recorder({"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {}}, **sections})
    DeepSpeedConfig(top)
    explained = set(REFUSED) | set(known_tree())
    assert top.seen - explained - _removed() == set()
    assert set(known_tree()) - top.seen == set()
    for name, section in sections.items():
        own = {path.removeprefix(name + ".") for path in REFUSED if path.startswith(name + ".")}
        allowed = set(known_tree()[name])
        assert section.seen - own - allowed == set()
        assert allowed - section.seen == set()


def _removed():
    from deepspeed.runtime import config

    return set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_stage_tables_name_real_keys():
    from m3i_scale.scale.ds_rules import DYNAMIC_SCALE_ONLY, NVME_ONLY, STAGE3_ONLY, STAGE12_ONLY
    from m3i_scale.scale.ds_schema import REFUSED, known_tree

    zero = known_tree()["zero_optimization"]
    assert zero.keys() >= STAGE3_ONLY | STAGE12_ONLY
    assert known_tree()["fp16"].keys() >= DYNAMIC_SCALE_ONLY
    assert zero["offload_optimizer"].keys() | zero["offload_param"].keys() >= NVME_ONLY
    for path in REFUSED:
        if path.startswith("zero_optimization."):
            assert path.split(".")[1] in zero


def test_precision_that_the_accelerator_lacks(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    resolved = resolve(load_ds_config("zero3_fp16"), **RUN, where="zero3_fp16")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="has no fp16") as caught:
        check_accelerator(resolved)
    assert "zero3_cpu" in str(caught.value.fix)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    check_accelerator(resolved)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Reports of the worker by file name."""
    report = tmp_path_factory.mktemp("engines") / "report.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # ninja, to build DeepSpeed's Adam
    env = {**os.environ, **ranks, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        [sys.executable, __file__, str(report)], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("name", sorted(known_ds_configs()))
def test_built_in_file_trains_and_is_obeyed(engines, name):
    """Every file initialises a real engine, which agrees with the file, and the loss falls, the same way twice."""
    report = engines[name]
    assert report["losses"] == report["again"]
    assert report["losses"][-1] < 0.5 * report["losses"][0]
    tolerance = 1e-5 if report["precision"] == "fp32" else 1e-2
    assert report["losses"] == pytest.approx(engines["reference"], rel=tolerance, abs=tolerance)


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


def _train(resolved: Resolved, steps: int) -> tuple[list[float], dict[str, list[str]]]:
    import deepspeed

    model = _model()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=copy.deepcopy(resolved.config)
    )
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
    engine.destroy()
    return losses, found


def _lies(config: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Values that the engine was not given: path → (value, what the message must name)."""
    zero = config["zero_optimization"]
    other_offload = {"device": "none" if "offload_optimizer" in zero else "cpu"}
    lies: dict[str, tuple[Any, str]] = {
        "bf16": ({"enabled": "bf16" not in config}, "precision: "),
        "data_types.grad_accum_dtype": ("bf16", "gradient accumulation type: "),
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
    }
    for path, value in plain.items():
        section, _, key = path.rpartition(".")
        if section != "zero_optimization" or key in zero:
            lies[path] = (value, f"{path}: ")
    return lies


def _difference(engine: Any, resolved: Resolved, path: str, value: Any) -> str:
    """What check_effective says when the engine was not given `value`."""
    try:
        check_effective(engine, Resolved(changed(resolved.config, {path: value}), [], resolved.where))
    except ConfigError as error:
        return str(error)
    return ""


def _worker(report: str) -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from m3i_scale.scale.ds_rules import precision

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # torch computes in fp16 on any CPU, if slowly; DeepSpeed only asks whether it would be fast
    get_accelerator().is_fp16_supported = lambda: True
    steps = 20
    results: dict[str, Any] = {"reference": _reference(steps)}
    for name in known_ds_configs():
        resolved = resolve(load_ds_config(name), **RUN, where=name)
        losses, differences = _train(resolved, steps)
        again, _ = _train(resolved, steps)
        results[name] = {
            "losses": losses,
            "again": again,
            "differences": differences,
            "precision": precision(resolved.config),
        }
    with open(report, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    _worker(sys.argv[1])
