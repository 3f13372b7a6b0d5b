"""`deepspeed: auto`: the DeepSpeed config of a run by its model, its ranks and their devices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny import LABEL_SETS, VOCABULARY, tiny_overrides

from m3i_scale.config import RunConfig, load_run
from m3i_scale.engine.deepspeed.choice import BUILT_IN, Device, choose_ds_config, device_here, rank_state_bytes
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.objective.build import build_on_meta
from m3i_scale.objective.information import Objective, role_of
from m3i_scale.plan.memory import fresh_engine
from m3i_scale.plan.planning import Model, Vocabulary
from m3i_scale.plan.settings import settings_of
from m3i_scale.run.setup import choose_engine, resolve_engine
from m3i_scale.text import GIB

B, L, H, G14 = "vit-b/16", "vit-l/16", "vit-h/14", "vit-g/14"
SGD = {"eps": 1e6, "momentum_correction": False, "weight_decay": 0.0, "trust_coefficient": 0.001, "clip_grad_norm": 0.0}


def of_size(preset: str, recipe: str = "m3i") -> tuple[RunConfig, Objective]:
    run = load_run(recipe, [f"backbone.preset={preset}"])
    return run, build_on_meta(run, {"classes": ["a"] * 1000}, 30_522)


def gpu(gib: float) -> Device:
    return Device("bf16", int(gib * GIB))


@pytest.mark.parametrize(
    ("preset", "ranks", "gib", "chosen"),
    [
        (B, 8, 80, "zero1_bf16"),
        (B, 1, 80, "zero1_bf16"),
        (B, 8, 24, "zero1_bf16"),
        (L, 8, 80, "zero1_bf16"),
        (L, 8, 16, "zero2_bf16"),
        (H, 8, 40, "zero1_bf16"),
        (G14, 8, 80, "zero1_bf16"),
        (G14, 8, 24, "zero3_bf16"),
        (G14, 64, 40, "zero2_bf16"),
    ],
)
def test_the_lowest_stage_that_leaves_room_is_chosen(preset: str, ranks: int, gib: float, chosen: str) -> None:
    run, objective = of_size(preset)
    resolved, reason = choose_engine(run, objective, ranks, gpu(gib))
    assert resolved.deepspeed == chosen
    assert chosen in reason
    assert f"{gib:.2f} GiB" in reason
    assert f"{ranks} rank" in reason
    assert resolved == run.model_copy(update={"deepspeed": chosen})  # the batch is the same


def test_more_memory_or_ranks_never_raise_the_stage() -> None:
    _, objective = of_size(H)
    for device in (gpu, lambda gib: Device("cpu", int(gib * GIB))):
        stages = {
            (ranks, gib): load_ds_config(choose_ds_config(objective, ranks, device(gib))[0])["zero_optimization"][
                "stage"
            ]
            for ranks in (2, 8, 64)
            for gib in (2, 8, 16, 24, 40, 80, 640)
        }
        for (ranks, gib), stage in stages.items():
            assert all(stage >= stages[more, room] for more, room in stages if more >= ranks and room >= gib)


def test_one_rank_never_partitions_parameters() -> None:
    """Nothing is saved by it, however little memory there is."""
    _, objective = of_size(B)
    assert choose_ds_config(objective, 1, gpu(1))[0] in ("zero1_bf16", "zero2_bf16")
    assert choose_ds_config(objective, 1, Device("cpu", GIB))[0] == "zero1_cpu_fp32"


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (Device("cpu", 64 * GIB), "zero1_cpu_fp32"),
        (Device("cpu", 4 * GIB), "zero3_cpu_fp32"),
        (Device("fp16", 16 * GIB), "zero3_fp16"),
    ],
)
def test_the_precision_follows_the_device(device: Device, chosen: str) -> None:
    assert choose_ds_config(of_size(B)[1], 4, device)[0] == chosen


def test_a_config_of_the_user_stays(tmp_path: Path) -> None:
    run, objective = of_size(B)
    for name in ("zero3_bf16", str(tmp_path / "mine.json")):
        chosen = run.model_copy(update={"deepspeed": name})
        assert choose_engine(chosen, objective, 8, gpu(80)) == (chosen, None)


def test_what_the_run_does_not_support_is_not_chosen() -> None:
    run, objective = of_size(H)
    sgd = RunConfig.model_validate(run.model_dump() | {"optim": SGD})
    task = {"kind": "detection", "head": {"kind": "mask_rcnn"}}
    detector = RunConfig.model_validate({"task": task, "optim": {"batch_size": 8}})
    assert choose_engine(run, objective, 8, gpu(4))[0].deepspeed == "zero3_bf16"
    for other in (sgd, detector):
        assert choose_engine(other, objective, 8, gpu(4))[0].deepspeed == "zero2_bf16"


def test_a_resume_keeps_the_config_of_its_checkpoint(tmp_path: Path) -> None:
    run = load_run("m3i", [*tiny_overrides("m3i"), f"output_dir={tmp_path / 'out'}"])
    objective = build_on_meta(run, LABEL_SETS, VOCABULARY)
    assert choose_engine(run, objective, 2)[0].deepspeed == "zero1_cpu_fp32"
    other = tmp_path / "other" / "checkpoints" / "step-00000002"
    branch = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": str(other)})})
    for folder, name in ((other, "zero3_cpu"), (run.output_dir / "checkpoints" / "step-00000002", "zero3_cpu_fp32")):
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(f"deepspeed: {name}\n")
        for ranks in (1, 2, 64):
            assert choose_engine(branch, objective, ranks)[0].deepspeed == name
    explicit = run.model_copy(update={"deepspeed": "zero1_cpu_fp32"})
    assert choose_engine(explicit, objective, 2)[0].deepspeed == "zero1_cpu_fp32"


@pytest.mark.parametrize("file", [*BUILT_IN["bf16"], *BUILT_IN["fp16"], *BUILT_IN["cpu"]])
@pytest.mark.parametrize("ranks", [1, 8])
def test_states_are_those_of_the_plan(file: str, ranks: int) -> None:
    """`plan` follows DeepSpeed buffer by buffer; in stages 1 and 2 it pads the EMA to all trained parameters."""
    run = load_run("m3i", [f"deepspeed={file}", "optim.batch_size=4096", "optim.micro_batch_size=64"])
    model = Model(run, Vocabulary({"classes": ["a"] * 1000}, 30_522, ()), ranks, "bf16")
    numel: Counter[str] = Counter()
    for name, parameter in model.objective.named_parameters():
        numel[role_of(name, parameter)] += parameter.numel()
    config = resolve_engine(run, ranks, 768).config
    settings = settings_of(config, world=ranks, on_host=file in BUILT_IN["cpu"])
    device, _ = fresh_engine(model.parameters, settings)
    planned = device - Counter({"reduce buckets": device["reduce buckets"]})
    moments = 2 * settings.state_bytes * numel["trained"] / ranks
    gradients = numel["trained"] * settings.parameter_bytes * settings.bf16_optimizer
    if settings.stage < 3 and not settings.bf16_optimizer:  # made in the backward pass
        gradients += numel["trained"] * settings.accumulation_bytes / (ranks if settings.stage == 2 else 1)
    assert rank_state_bytes(numel, config, ranks) == pytest.approx(planned.total() + moments + gradients, rel=0.25)


def test_ema_weights_take_a_copy_and_a_partitioned_remainder() -> None:
    config = load_ds_config("zero1_bf16")
    sizes = [rank_state_bytes(Counter(trained=8_000, ema=ema), config, 8) for ema in (0, 8_000)]
    assert sizes[1] - sizes[0] == 2 * 8_000 + 2 * 8_000 // 8


def test_ranks_before_a_start_share_the_memory_of_this_machine(monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device_here(8).memory_bytes == device_here(1).memory_bytes // 8
