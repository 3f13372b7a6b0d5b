"""DeepSpeed files: what is refused, and what "auto" becomes."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from ds_files import GONE, RUN, changed
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.config import RunConfig, resource_folder
from m3i_scale.engine.deepspeed.hints import UNSUPPORTED
from m3i_scale.engine.deepspeed.resolve import check_accelerator, load_ds_config, resolve
from m3i_scale.engine.deepspeed.schema import known_paths
from m3i_scale.errors import ConfigError

KNOWN = dict.fromkeys(known_paths())

# (base file, changes, words of the message)
Z = "zero_optimization."
P = "optimizer.params."
MISTAKES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("zero3_cpu", {P + "fused": "yes"}, ["optimizer.params.fused", "boolean"]),
    ("zero3_bf16", {P + "torch_adam": False}, ["'optimizer.params.fused' has no effect", "torch_adam"]),
    # misspelt or misplaced
    ("zero3_bf16", {"gradient_cliping": 1.0}, ["unknown key 'gradient_cliping'", "'gradient_clipping'"]),
    ("zero3_bf16", {"train_micro_batch_size": 4}, ["unknown key", "train_micro_batch_size_per_gpu"]),
    ("zero3_bf16", {Z + "stage3_max_live_params": 1}, ["unknown key", "stage3_max_live_parameters"]),
    ("zero3_bf16", {"data_types.grad_acum_dtype": "fp32"}, ["data_types.grad_acum_dtype", "grad_accum_dtype"]),
    ("zero3_bf16", {"flops_profiler": {"enabled": True, "profile_steps": 3}}, ["profile_steps", "profile_step"]),
    ("zero3_bf16", {"bf16.enable": True}, ["bf16.enable", "enabled"]),
    ("zero3_bf16", {"timers.throughput.enabeld": True}, ["timers.throughput.enabeld", "enabled"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_param.pin_memry": True}, ["pin_memry", "pin_memory"]),
    ("zero3_bf16", {"stage3_max_live_parameters": 1}, ["at the wrong level", Z + "stage3_max_live_parameters"]),
    ("zero3_bf16", {"offload_optimizer": {"device": "cpu"}}, ["at the wrong level", Z + "offload_optimizer"]),
    ("zero3_bf16", {Z + "gradient_clipping": 1.0}, ["at the wrong level", "'gradient_clipping'"]),
    ("zero3_bf16", {"grad_accum_dtype": "fp32"}, ["at the wrong level", "data_types.grad_accum_dtype"]),
    ("zero3_bf16", {"optimizer.lr": 1e-3}, ["'optimizer.lr'", "at the wrong level", P + "lr"]),
    ("zero3_bf16", {Z + "prefetch_bucket_size": 1000}, ["stage3_prefetch_bucket_size"]),
    ("zero3_bf16", {"zero_optimization": True}, ["must be a section"]),
    ("zero3_bf16", {"bf16": True}, ["must be a section"]),
    # other keys of DeepSpeed
    ("zero3_bf16", {"autotuning": {"enabled": True}}, ["unknown key 'autotuning'", "not support"]),
    ("zero3_bf16", {"gradient_allreduce_op": "mean"}, ["unknown key 'gradient_allreduce_op'"]),
    ("zero3_bf16", {P + "amsgrad": True}, ["unknown key 'optimizer.params.amsgrad'"]),
    # known, but without effect here
    ("zero3_bf16", {"gradient_accumulation_dtype": "fp32"}, ["data_types.grad_accum_dtype"]),
    ("zero3_bf16", {"activation_checkpointing": {}}, ["no effect", "backbone.activation_checkpointing"]),
    ("zero3_bf16", {"scheduler": {"type": "WarmupLR", "params": {}}}, ["no effect", "optim.lr"]),
    ("zero3_bf16", {"zero_allow_untested_optimizer": True}, ["no effect", "optimizer object"]),
    ("zero3_bf16", {"zero_force_ds_cpu_optimizer": False}, ["no effect"]),
    ("zero3_bf16", {"bfloat16": {"enabled": True}}, ["old spelling", "bf16"]),
    ("zero3_bf16", {"compile": {"deepcompile": True}}, ["engine.compile"]),
    ("zero3_bf16", {"amp": {"enabled": True}}, ["removed from DeepSpeed"]),
    ("zero3_bf16", {"elasticity": {"enabled": True}}, ["removed from DeepSpeed"]),
    ("zero3_bf16", {Z + "cpu_offload": True}, ["deprecated", "offload_optimizer"]),
    ("zero3_bf16", {Z + "allgather_partitions": True}, ["never uses"]),
    ("zero3_bf16", {Z + "stage3_gather_16bit_weights_on_model_save": True}, ["save_16bit_model"]),
    ("zero3_bf16", {Z + "zero_hpz_partition_size": 8}, ["got 8", "divisor"]),
    ("zero2_bf16", {Z + "zero_hpz_partition_size": 8}, ["only stage 3"]),
    ("zero3_bf16", {Z + "zero_quantized_weights": True}, ["unknown key"]),
    ("zero3_bf16", {"checkpoint": {"load_universal": True}}, ["any number of ranks"]),
    ("zero1_bf16", {Z + "load_from_fp32_weights": False}, ["initialized or loaded by this trainer"]),
    ("zero3_bf16", {"comms_logger.enabled": False}, ["as soon as the section is there"]),
    ("zero3_bf16", {"flops_profiler": {"enabled": False, "profile_step": 2}}, ["flops_profiler.profile_step", "false"]),
    # DeepSpeed's loggers
    ("zero3_bf16", {"csv_monitor": {"enabled": True}}, ["loggers", "metrics file"]),
    ("zero3_bf16", {"comet": {"enabled": True}}, ["loggers"]),
    # stages
    ("zero2_bf16", {Z + "stage3_max_live_parameters": 10}, ["only stage 3", "the stage is 2"]),
    ("zero2_bf16", {Z + "offload_param": {"device": "cpu"}}, ["only stage 3"]),
    ("zero2_bf16", {Z + "sub_group_size": 10}, ["only stage 3"]),
    ("zero3_bf16", {Z + "allgather_bucket_size": 10}, ["only stages 1 and 2"]),
    ("zero3_bf16", {Z + "round_robin_gradients": True}, ["only stages 1 and 2"]),
    ("zero2_bf16", {Z + "allgather_bucket_size": 11}, [Z + "allgather_bucket_size"]),
    ("zero1_bf16", {"communication_data_type": "bf16"}, [Z + "reduce_bucket_size", "set communication"]),
    ("zero1_bf16", {Z + "overlap_comm": True}, ["BF16 optimizer"]),
    ("zero3_bf16", {Z + "stage": 4}, ["zero_optimization.stage"]),
    ("zero3_bf16", {Z + "stage": 0}, ["must be 1, 2 or 3"]),
    ("zero3_bf16", {Z + "stage": True}, ["must be 1, 2 or 3"]),
    ("zero3_bf16", {Z + "stage": GONE}, ["must be 1, 2 or 3"]),
    ("zero3_bf16", {"zero_optimization": GONE}, ["must be 1, 2 or 3"]),
    # precision
    ("zero3_bf16", {"bf16.enabled": "auto"}, ["bf16.enabled", "as if it were off"]),
    ("zero3_bf16", {"bf16": {}}, ["bf16.enabled", "true or false"]),
    ("zero3_bf16", {"fp16": {"enabled": True}}, ["both be enabled"]),
    ("zero3_bf16", {"bf16.bf16_optimizer_states": True}, ["bf16_master_weights_and_grads"]),
    ("zero1_bf16", {"bf16.bf16_master_weights_and_grads": True}, ["fp32 master weights"]),
    ("zero3_fp16", {"fp16.loss_scale": 128}, ["dynamic scaling"]),
    ("zero3_fp16", {"fp16.fp16_master_weights_and_grads": True}, ["CPU optimizer"]),
    ("zero3_fp16", {"fp16.loss_scale_window": 0}, ["loss_scale_window"]),
    ("zero3_bf16", {"data_types.param_dtype": "bf16"}, ["no effect", "sections bf16 and fp16"]),
    ("zero3_bf16", {"data_types.grad_accum_dtype": "float"}, ["data_types.grad_accum_dtype", "fp32"]),
    ("zero3_bf16", {"torch_autocast": {"enabled": True}}, ["autocast"]),
    # offload
    ("zero3_bf16_cpu_offload", {Z + "offload_param.device": "nvme"}, ["nvme", "shards", "use cpu"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.device": "nvme"}, ["nvme", "checkpoints", "use cpu"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_param.device": "gpu"}, ["offload_param.device"]),
    ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.device": "none"}, ["the device is none"]),
    ("zero2_bf16", {Z + "offload_optimizer": {"device": "cpu", "ratio": 1.0}}, ["only stage 3"]),
    # optimizer
    ("zero3_bf16", {"optimizer": GONE}, ["'optimizer' is missing"]),
    ("zero3_bf16", {"optimizer.params": GONE}, ["'optimizer.params' is missing"]),
    ("zero3_bf16", {"optimizer.type": "Lion"}, ["must be AdamW"]),
    ("zero3_bf16", {"optimizer.type": "Adam"}, ["must be AdamW"]),
    ("zero3_bf16", {P + "lr": GONE}, [P + "lr", "is missing"]),
    ("zero3_bf16", {P + "adam_w_mode": False}, [P + "adam_w_mode", "True"]),
    ("zero3_bf16", {P + "max_grad_norm": 1.0}, ["gradient_clipping"]),
    ("zero3_bf16", {P + "weight_dekay": 0.1}, ["weight_dekay", "weight_decay"]),
    ("zero3_bf16", {P + "fp32_optimizer_states": True}, ["fp32_optimizer_states", "AdamW"]),
    ("zero3_bf16", {P + "betas": [0.9]}, [P + "betas"]),
    # values that contradict the run file, or are of the wrong type
    ("zero3_bf16", {"gradient_clipping": GONE}, ["is missing", "1.0"]),
    ("zero3_bf16", {"gradient_clipping": 1.0}, ["the config file says 0.5"]),
    ("zero3_bf16", {"train_batch_size": 16}, ["the config file says 8"]),
    ("zero3_bf16", {"train_micro_batch_size_per_gpu": 8}, ["the config file says 4"]),
    ("zero3_bf16", {"gradient_accumulation_steps": 1}, ["the config file says 2"]),
    ("zero3_bf16", {P + "lr": 1e-3}, ["the config file says 0.01"]),
    ("zero3_bf16", {P + "betas": [0.9, 0.999]}, ["the config file says [0.9, 0.95]"]),
    ("zero3_bf16", {"train_batch_size": "8"}, ["train_batch_size", "integer"]),
    ("zero3_bf16", {"gradient_clipping": True}, ["gradient_clipping", "number"]),
    ("zero3_bf16", {Z + "reduce_bucket_size": -1}, ["reduce_bucket_size", "greater than 0"]),
    ("zero3_bf16", {Z + "overlap_comm": "sometimes"}, ["overlap_comm"]),
    ("zero3_bf16", {"communication_data_type": "half"}, ["communication_data_type", "fp32"]),
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


BF16 = '"bf16": {"enabled": true}'
MEANT: list[tuple[str, dict[str, Any], str]] = [
    ("zero3_bf16", {"bf16": GONE, "bfloat16": {"enabled": True}}, BF16),
    ("zero3_bf16", {"bf16": GONE, "amp": {"enabled": True}}, BF16),
    ("zero3_bf16", {"bf16": GONE, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, BF16),
    ("zero3_bf16", {"bf16": True}, BF16),
    ("zero3_bf16", {"bf16": GONE, "data_types": {"param_dtype": "bf16"}}, BF16),
    ("zero3_bf16", {"gradient_accumulation_dtype": "fp32"}, "data_types.grad_accum_dtype"),
    ("zero3_bf16", {"compile": {"deepcompile": True}}, "backbone.compile"),
    ("zero3_bf16", {Z + "cpu_offload": True}, Z + "offload_optimizer.device"),
    ("zero3_bf16", {Z + "cpu_offload_param": True}, Z + "offload_param.device"),
    ("zero3_bf16", {Z + "cpu_offload_use_pin_memory": True}, Z + "offload_optimizer.pin_memory"),
    ("zero3_bf16", {Z + "offload_optimizer": {"pin_memory": True}}, '"device": "cpu"'),
    ("zero3_bf16", {Z + "offload_param": {}}, '"device": "cpu"'),
    ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.device": "none"}, Z + "offload_optimizer.device"),
    ("zero3_bf16", {Z + "stage3_gather_16bit_weights_on_model_save": True}, "m3i-scale export"),
    ("zero3_bf16", {Z + "allgather_bucket_size": 2**20}, "stage3_prefetch_bucket_size"),
    ("zero3_bf16", {"optimizer.type": "Adam"}, "AdamW"),
    ("zero3_bf16", {"wandb": {"enabled": True}}, "log.wandb"),
    ("zero3_bf16", {"tensorboard": {"enabled": True}}, "log.tensorboard"),
]


@pytest.mark.parametrize(("base", "changes", "fix"), MEANT, ids=[f"{b}+{'+'.join(c)}" for b, c, _ in MEANT])
def test_a_fix_names_what_does_what_was_meant(base, changes, fix):
    """Removing the key would leave the run in another precision, without offloading, and so on."""
    with pytest.raises(ConfigError) as caught:
        resolve(changed(load_ds_config(base), changes), **RUN, where="mine.json")
    assert fix in caught.value.fix


def test_fixes_of_unsupported_keys_name_keys_that_are_there():
    assert not UNSUPPORTED.keys() & KNOWN.keys()
    for _, fix in UNSUPPORTED.values():
        for path in re.findall(r"[a-z0-9_]+(?:\.[a-z0-9_]+)+", fix or ""):
            assert path in KNOWN or _in_run_file(path), fix


def _in_run_file(path):
    node: Any = RunConfig
    for name in path.split("."):
        if name not in node.model_fields:
            return False
        node = node.model_fields[name].annotation
    return True


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("zero3_bf16", {"steps_per_print": 10, "wall_clock_breakdown": True, "log_level": "warning"}),
        ("zero3_bf16", {"flops_profiler": {"enabled": True, "profile_step": 2}}),
        ("zero3_bf16", {Z + "reduce_bucket_size": 5e7, Z + "stage3_max_live_parameters": 30000000}),
        ("zero3_bf16", {"bf16.bf16_master_weights_and_grads": True, "bf16.bf16_optimizer_states": True}),
        ("zero3_bf16", {P + "lr": 1e-2, P + "betas": [0.9, 0.95], "gradient_clipping": 0.5, "train_batch_size": 8}),
        ("zero3_bf16_cpu_offload", {Z + "offload_optimizer.ratio": 0.5, P + "fp32_optimizer_states": True}),
        ("zero2_bf16", {Z + "offload_optimizer": {"device": "cpu"}}),
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
    resolved = resolve(load_ds_config("zero3_cpu"), **{**RUN, "hidden_size": 1408}, where="zero3_cpu")
    zero = resolved.config["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 4 * 2**20  # hidden² is less
    assert zero["stage3_param_persistence_threshold"] == 14080
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 16 * 1408**2
    assert zero["sub_group_size"] == 24 * 1408**2
    assert resolved.config["gradient_accumulation_steps"] == 2
    assert resolved.config["gradient_clipping"] == 0.5
    assert resolved.config["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert {"gradient_clipping", "zero_optimization.sub_group_size"} <= set(resolved.filled_in)


def test_buckets_grow_with_the_model_and_do_not_shrink_with_it():
    wide, narrow = (
        resolve(load_ds_config("zero3_cpu"), **{**RUN, "hidden_size": width}, where="x").config["zero_optimization"]
        for width in (4096, 64)
    )
    assert wide["reduce_bucket_size"] == 4096**2
    assert wide["stage3_prefetch_bucket_size"] == int(0.9 * 4096**2)
    assert narrow["reduce_bucket_size"] == narrow["stage3_prefetch_bucket_size"] == 2**22
    assert narrow["stage3_max_live_parameters"] == narrow["stage3_max_reuse_distance"] == 2**23
    assert narrow["sub_group_size"] == 2**24


def test_files_for_gpus_have_buckets_for_networks():
    """Two layers of ViT-g fill one, and what is gathered ahead may be held."""
    for name in ("zero3_bf16", "zero3_bf16_all_reduce", "zero3_bf16_lean", "zero3_bf16_cpu_offload", "zero3_fp16"):
        zero = resolve(load_ds_config(name), **{**RUN, "hidden_size": 1408}, where=name).config["zero_optimization"]
        assert 12 * 1408**2 < 2 * zero["reduce_bucket_size"] <= 2 * zero["stage3_prefetch_bucket_size"]
        assert zero["stage3_prefetch_bucket_size"] < zero["stage3_max_live_parameters"]
        assert not zero["memory_efficient_linear"]


def test_zero_3_by_all_reduces_is_zero_3_but_for_three_settings():
    plain, reduced = (load_ds_config(name) for name in ("zero3_bf16", "zero3_bf16_all_reduce"))
    changes = {"stage3_use_all_reduce_for_fetch_params": True, "reduce_scatter": False}
    plain["zero_optimization"] |= changes | {"stage3_param_persistence_threshold": 0}
    assert reduced == plain


def test_batch_keys_that_are_left_out_are_filled_in():
    raw = changed(load_ds_config("zero3_bf16"), {"train_batch_size": GONE, "gradient_accumulation_steps": GONE})
    resolved = resolve(raw, **RUN, where="mine.json")
    assert resolved.config["train_batch_size"] == 8
    assert resolved.config["gradient_accumulation_steps"] == 2
    assert not {"train_batch_size", "gradient_accumulation_steps"} & set(resolved.filled_in)  # not "auto"


def test_deepspeed_does_not_wait_for_the_device_for_a_line_of_its_log_unless_the_file_says_so():
    raw = load_ds_config("zero3_bf16")
    resolved = resolve(raw, **RUN, where="mine.json")
    assert resolved.config["timers"] == {"throughput": {"enabled": False}}
    given = {"throughput": {"enabled": True, "synchronized": False}}
    assert resolve({**raw, "timers": given}, **RUN, where="mine.json").config["timers"] == given


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
    for neighbor in batches.split(" or "):
        resolve(raw, **{**run, "batch_size": int(neighbor)}, where="x")
    for neighbor in filter(None, micros.split(" or ")):
        resolve(raw, **{**run, "batch_size": batch, "micro_batch_size": int(neighbor)}, where="x")


def test_batch_smaller_than_one_round_is_refused():
    with pytest.raises(ConfigError) as caught:
        resolve(load_ds_config("zero3_bf16"), **{**RUN, "world_size": 4}, where="x")
    assert caught.value.where == "optim.batch_size: 8, on 4 ranks"
    assert "batch_size to 16" in str(caught.value.fix)


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
@given(
    value=JSON,
    path=st.sampled_from([*KNOWN, *UNSUPPORTED]),
    base=st.sampled_from(["zero3_bf16", "zero2_bf16", "zero3_fp16"]),
)
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
    with pytest.raises(ConfigError) as caught:
        load_ds_config("zero3_bf61")
    assert str(caught.value.where).endswith("/zero3_bf61")
    assert "zero3_bf16" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": 1, "a": 2}', "'a'"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "'enabled'"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1,}', ""),
        ("[1]", ""),
        ("", ""),
        ("[" * 100_000, ""),
    ],
)
def test_unreadable_files(tmp_path, text, named):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ds_config(str(path))
    assert caught.value.where == str(path)
    assert named in caught.value.what


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as caught:
        load_ds_config(str(path))
    assert str(caught.value.where).endswith("/mine.json")


def test_precision_that_the_accelerator_lacks(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    resolved = resolve(load_ds_config("zero3_fp16"), **RUN, where="zero3_fp16")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError) as caught:
        check_accelerator(resolved)
    assert caught.value.where == "zero3_fp16"
    assert "zero3_cpu" in str(caught.value.fix)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    check_accelerator(resolved)


def test_groups_that_hold_second_copies_divide_the_ranks():
    raw = changed(load_ds_config("zero3_bf16"), {Z + "zero_hpz_partition_size": 4})
    run = RUN | {"batch_size": 96}
    assert resolve(raw, **run | {"world_size": 8}, where="x").config[Z[:-1]]["zero_hpz_partition_size"] == 4
    for world_size in (2, 6):
        with pytest.raises(ConfigError) as caught:
            resolve(raw, **run | {"world_size": world_size}, where="x")
        assert "zero_hpz_partition_size" in caught.value.what


@pytest.fixture
def cuda_without_nvcc(monkeypatch, tmp_path):
    from deepspeed.accelerator import get_accelerator

    (tmp_path / "lib64").mkdir()  # the runtime alone, as in most images
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    for name, value in {"device_name": "cuda", "is_fp16_supported": True, "is_bf16_supported": True}.items():
        monkeypatch.setattr(get_accelerator(), name, lambda *_, value=value: value)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.stem for path in resource_folder("ds_configs").glob("*.json")))
def test_no_built_in_file_needs_nvcc(cuda_without_nvcc, name):
    check_accelerator(resolve(load_ds_config(name), **RUN, where=name))


def test_what_needs_nvcc_is_refused_without(cuda_without_nvcc):
    resolved = resolve(
        changed(load_ds_config("zero3_bf16"), {P + "torch_adam": False, P + "fused": GONE}), **RUN, where="own.json"
    )
    with pytest.raises(ConfigError) as caught:
        check_accelerator(resolved)
    assert caught.value.where == "own.json: optimizer.params"
    assert "nvcc" in str(caught.value)
    (cuda_without_nvcc / "bin").mkdir()
    (cuda_without_nvcc / "bin" / "nvcc").touch()
    check_accelerator(resolved)
