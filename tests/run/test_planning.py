"""`m3i-scale plan`: from a run file to memory, traffic and time."""

from __future__ import annotations

import functools
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny import LABEL_SETS, VOCABULARY, tiny_objective, tiny_overrides, tiny_run
from typer.testing import CliRunner

from m3i_scale.checkpoint.stream import buffers_of
from m3i_scale.cli import app
from m3i_scale.config import known_recipes, known_runs, load_run
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.errors import ConfigError
from m3i_scale.plan import planning
from m3i_scale.plan import search as plan_search
from m3i_scale.plan.memory import HOLES
from m3i_scale.plan.plan_command import plan_table
from m3i_scale.plan.planning import Choice, Model, Vocabulary, estimate, machine_of
from m3i_scale.plan.search import RunPlan, check_feasible, nodes_that_fit, plan_run
from m3i_scale.plan.settings import numel_of
from m3i_scale.plan.timing import hardware

pytestmark = pytest.mark.slow

SMALL = ("optim.batch_size=64", "optim.micro_batch_size=4")


def model_of(recipe: str, *overrides: str, world: int = 2) -> Model:
    return Model(tiny_run(recipe, *SMALL, *overrides), Vocabulary(LABEL_SETS, VOCABULARY, ()), world, "fp32")


def machine(memory_gib: float = 4.0, nodes: int = 1, ranks: int = 2, name: str = "h100"):
    return machine_of(name, nodes=nodes, ranks_per_node=ranks, memory_gib=memory_gib, mfu=0.4, workspace_gib=0.01)


@functools.cache
def plan_of_sim() -> RunPlan:
    """Return one plan for several tests: a search for a suggestion takes seconds."""
    return plan_run(tiny_run("sim", *SMALL), machine(), samples=None)


def test_more_ranks_take_less_under_zero_3():
    peaks = []
    for ranks in (2, 4, 8):
        run = tiny_run("supervised", *SMALL)
        model = Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), ranks, "bf16")
        peaks.append(estimate(model, machine(ranks=ranks), Choice("zero3_bf16", "none", 4)).peak_bytes)
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(("file", "hardware", "warned"), [("zero3_cpu", "h100", True), ("zero3_cpu", "cpu", False)])
def test_a_plan_names_its_hardware_and_warns_of_a_file_for_cpus(file: str, hardware: str, *, warned: bool):
    run = tiny_run("m3i", *SMALL, f"deepspeed={file}")
    document = plan_run(run, machine(name=hardware), tokens=VOCABULARY, samples=None).document()
    assert document["hardware"] == hardware
    shown = text_of(plan_table(document))
    assert f"hardware {hardware}" in shown
    assert [hardware in text and file in text for text in document["warnings"]] == [True] * warned
    assert ("meant for CPUs" in shown) == warned


def test_a_document_has_its_keys_and_adds_up():
    document = plan_run(tiny_run("m3i", *SMALL), machine(), tokens=VOCABULARY, samples=640).document()
    assert {"peak_gib_per_rank", "parts", "step_time_s", "comm_gib_per_step", "suggestion"} <= document.keys()
    assert sum(document["parts"].values()) == pytest.approx(document["peak_gib_per_rank"])
    assert document["assumed"] == ["1000 classes"]
    assert document["days"] * 86400 == pytest.approx(10 * document["step_time_s"])
    assert document["suggestion"]["peak_gib_per_rank"] <= 4.0
    assert [each["stage"] for each in document["compared"]] == [1, 2, 3, 3]  # the run's own first
    assert document["suggestion"] in [*document["compared"], document["planned"]]
    shown = text_of(plan_table(document))
    assert all(f"fastest with {each['deepspeed']} (" in shown for each in document["compared"])
    json.dumps(document)


def test_a_plan_says_what_was_planned_and_what_activations_take():
    """Under stage 1 the peak is in the optimizer's step, when activations are gone."""
    run = tiny_run("sim", *SMALL, "deepspeed=zero1_bf16", "backbone.activation_checkpointing=full")
    found = plan_run(run, machine(), samples=None)
    document = found.document()
    assert (
        document["planned"].items()
        >= {
            "deepspeed": "zero1_bf16",
            "stage": 1,
            "precision": "bf16",
            "micro_batch_size": 4,
            "accumulation": 8,
            "activation_checkpointing": "full",
        }.items()
    )
    live = max(found.model.trace("full", 4).live) / 2**30
    assert document["activations_gib"] == pytest.approx(live)
    shown = text_of(plan_table(document | {"parts": document["parts"] | {"activations": 0.0}}))
    assert "activations (maximum)" in shown
    assert "activations (maximum)" not in text_of(plan_table(document | {"activations_gib": 0.0}))


def text_of(table) -> str:
    printed = Console(width=200, record=True, file=io.StringIO())
    printed.print(table)
    return printed.export_text()


def test_hours_of_ranks_on_hosts_are_no_gpu_hours():
    hosts, gpus = (
        text_of(
            plan_table(
                plan_run(
                    tiny_run("supervised", *SMALL, "deepspeed=zero3_cpu"), machine(name=name), samples=None
                ).document()
            )
        )
        for name in ("cpu", "h100")
    )
    assert "GPU hours" in gpus
    assert "GPU" not in hosts


@pytest.mark.parametrize("name", ["h100", "a100"])
def test_the_share_that_is_reached_is_what_the_page_cites(name):
    page = (Path(__file__).parents[2] / "docs" / "benchmarks" / "scaling.md").read_text(encoding="utf-8")
    assert f"an MFU of {hardware('a100').mfu} and {hardware('h100').mfu}" in page
    found = machine_of(name, nodes=1, ranks_per_node=1, memory_gib=1.0)
    assert found.mfu == hardware(name).mfu


def test_the_default_config_is_the_suggested_one():
    """With `deepspeed: auto`, `m3i` needs no change for its speed on 8 GPUs."""
    shown = CliRunner().invoke(app, ["plan", "m3i", "--ranks-per-node", "8", "--memory-gib", "80", "--json"])
    document = json.loads(shown.stdout)
    assert document["suggestion"] == document["planned"]
    assert document["step_time_s"] == document["suggestion"]["step_time_s"]
    assert document["step_time_s"] <= plan_search.EQUAL * min(each["step_time_s"] for each in document["compared"])
    eight = machine_of("h100", nodes=1, ranks_per_node=8, memory_gib=80)
    by_name = [load_run("m3i", [f"deepspeed={name}"]) for name in ("zero1_bf16", "zero3_bf16")]
    stage_1, stage_3 = (plan_run(run, eight, samples=None).planned.step_s for run in by_name)
    assert stage_1 == document["step_time_s"] < stage_3 / 2


def test_a_suggestion_can_be_taken():
    found = plan_of_sim()
    again = plan_run(tiny_run("sim", *SMALL, *found.document()["suggestion"]["overrides"]), machine(), samples=None)
    assert again.planned.peak_bytes == found.suggestion.peak_bytes
    assert again.planned.step_s == found.suggestion.step_s


def test_a_suggestion_is_never_slower_than_a_run_that_fits():
    """Micro-batches are all that divide the batch, not powers of two alone."""
    run = tiny_run("supervised", "optim.batch_size=24", "optim.micro_batch_size=12", "deepspeed=zero3_bf16")
    found = plan_run(run, machine(), samples=None)
    assert found.fits
    assert found.suggestion.choice.micro_batch == 12
    assert found.suggestion.step_s <= found.planned.step_s * plan_search.EQUAL


@pytest.mark.parametrize("file", ["zero1_cpu_fp32", "zero3_cpu", "zero3_cpu_fp32", "zero3_cpu_lean"])
def test_files_for_hosts_are_not_suggested_for_gpus(file):
    run = tiny_run("supervised", *SMALL, f"deepspeed={file}")
    found = plan_run(run, machine(), samples=None)
    assert found.planned.choice.deepspeed == file
    assert "_cpu" not in found.suggestion.choice.deepspeed.replace("_cpu_offload", "")
    assert found.suggestion.settings.precision == "bf16"
    on_hosts = plan_run(run, machine(name="cpu"), samples=None)
    assert "_cpu" in on_hosts.suggestion.choice.deepspeed


def test_offloading_is_suggested_where_nothing_else_fits():
    """What it costs in time is not counted."""
    found = plan_run(tiny_run("sim", *SMALL, "deepspeed=zero3_bf16_cpu_offload"), machine(), samples=None)
    assert found.planned.host_parts["optimizer"] > 0
    assert "optimizer" not in found.suggestion.host_parts


@pytest.mark.parametrize(
    ("key", "value"), [("contiguous_gradients", False), ("offload_optimizer", {"device": "cpu", "ratio": 0.5})]
)
def test_what_is_not_counted_is_refused(tmp_path, key, value):
    raw = load_ds_config("zero3_bf16_cpu_offload")
    raw["zero_optimization"][key] = value
    path = tmp_path / "other.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"does not support 'zero_optimization.{key}"):
        plan_run(tiny_run("sim", *SMALL, f"deepspeed={path}"), machine(), samples=None)


def test_a_save_in_the_background_is_planned_and_one_in_the_foreground_takes_nothing():
    """On hosts at the peak; beside accelerators in host memory, a rank and a node."""
    foreground = tiny_run("sim", *SMALL, "checkpoint.background=false")
    document, gpu = plan_of_sim().document(), plan_of_sim().planned
    none = plan_run(foreground, machine(), samples=None).planned
    assert gpu.host_parts["snapshot"] > 0
    assert "snapshot" not in none.host_parts
    assert gpu.parts == none.parts
    assert sum(document["host_parts"].values()) == pytest.approx(document["host_gib_per_rank"])
    assert document["host_gib_per_node"] == pytest.approx(2 * document["host_gib_per_rank"])
    background = tiny_run("sim", *SMALL)
    host, less = (plan_run(run, machine(name="cpu"), samples=None).planned for run in (background, foreground))
    # Pools are a device's; a host has the bytes themselves: 12 a trained parameter, 4 an averaged or frozen one.
    numel = document["parameters"]
    wanted = (12 * numel["trained"] + 4 * numel["ema"] + 4 * numel["frozen"]) / 2
    assert host.parts["snapshot"] == pytest.approx(wanted, rel=1e-3)
    assert "snapshot" not in less.parts
    assert host.peak_bytes > less.peak_bytes


def test_holes_of_the_heap_are_counted_on_hosts_that_keep_it(monkeypatch):
    model, choice, host = model_of("supervised"), Choice("zero3_cpu", "none", 4), machine(name="cpu")
    kept = estimate(model, host, choice)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    returned = estimate(model, host, choice)
    live = returned.peak_bytes - returned.parts["workspace"]
    assert kept.parts == {**returned.parts, "fragmentation": round(HOLES * live)}
    assert kept.peak_bytes == returned.peak_bytes + round(HOLES * live) > returned.peak_bytes
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert "fragmentation" not in estimate(model, machine(), choice).parts


def test_workers_and_buffers_are_counted():
    document = plan_run(tiny_run("sim", *SMALL, "data.num_workers=2"), machine(), samples=None).document()
    assert document["host_parts"]["batches of workers"] == pytest.approx(2 * 4 * 2 * 3 * 32**2 / 2**30)
    kept = buffers_of(tiny_objective("densecl"))
    assert model_of("densecl").remembered_bytes == sum(buffer.nbytes for buffer in kept.values()) > 0


def test_a_host_without_the_memory_is_refused_with_what_would_do(monkeypatch):
    monkeypatch.setattr(planning, "non_tensor_gib", lambda *, hosts: 0.5)  # this process grows meanwhile
    run = tiny_run("sim", *SMALL)
    needed = plan_run(run, machine(), samples=None)
    node, copies = needed.planned.host_of_node(needed.machine), 2 * needed.planned.host_parts["snapshot"]
    tight = replace(machine(), host_memory_gib=(node - copies / 2) / 2**30)
    found = plan_run(run, tight, samples=None)
    assert not found.fits
    with pytest.raises(ConfigError) as fault:
        check_feasible(found)
    assert fault.value.where.startswith("--host-memory-gib")
    assert "checkpoint.background=false" in fault.value.fix
    assert plan_run(tiny_run("sim", *SMALL, "checkpoint.background=false"), tight, samples=None).fits
    with pytest.raises(ConfigError) as fault:
        check_feasible(plan_run(run, replace(machine(), host_memory_gib=0.1), samples=None))
    assert fault.value.where.startswith("--host-memory-gib")
    assert "checkpoint.background" not in fault.value.fix


@pytest.mark.parametrize("recipe", ["sim", "moco"])
def test_a_checkpoint_has_weights_moments_averages_and_buffers(recipe):
    found = plan_run(tiny_run(recipe, *SMALL, "deepspeed=zero1_bf16"), machine(), samples=None)
    trained, averaged, frozen = (numel_of(found.model.parameters, role) for role in ("trained", "ema", "frozen"))
    size = 12 * trained + 4 * averaged + 2 * frozen + found.model.remembered_bytes  # frozen weights are bf16
    assert found.document()["checkpoint_gib"] == size / 2**30


def test_trust_ratios_are_planned_with_the_files_that_support_them():
    sgd = ("optim.eps=1e6", "optim.momentum_correction=false", "optim.weight_decay=0", "optim.clip_grad_norm=0")
    run = tiny_run("supervised", *SMALL, *sgd, "optim.trust_coefficient=0.001", "deepspeed=zero1_bf16")
    document = plan_run(run, machine(), samples=None).document()
    assert {each["deepspeed"] for each in document["compared"]} == {"zero1_bf16", "zero2_bf16"}


@pytest.mark.parametrize("option", ["--tflops-per-gpu", "--intra-gb-s", "--inter-gb-s"])
def test_a_rate_of_nothing_is_refused(option):
    refused = CliRunner().invoke(app, ["plan", "m3i", option, "0"])
    assert refused.exit_code == 2
    assert "Invalid value" in refused.output


def test_a_run_that_cannot_fit_is_refused_with_what_would():
    needed = (
        plan_run(tiny_run("m3i", *SMALL, "deepspeed=zero1_bf16"), machine(), samples=None).planned.peak_bytes / 2**30
    )
    tight = plan_run(tiny_run("m3i", *SMALL, "deepspeed=zero1_bf16"), machine(memory_gib=needed * 0.75), samples=None)
    assert not tight.fits
    with pytest.raises(ConfigError) as fault:
        check_feasible(tight)
    assert fault.value.where.startswith("deepspeed=zero1_bf16")
    assert fault.value.fix


def test_more_nodes_are_named_with_sizes_that_divide():
    run = tiny_run("m3i", *SMALL, "deepspeed=zero3_cpu")
    needed = plan_run(run, machine(memory_gib=1e-3), samples=None)
    found = nodes_that_fit(
        needed.model, machine(memory_gib=needed.planned.peak_bytes / 2**30 * 0.6), needed.planned.choice
    )
    nodes, batch, micro_batch = found
    sizes = (f"optim.batch_size={batch}", f"optim.micro_batch_size={micro_batch}", "deepspeed=zero3_cpu")
    room = machine(memory_gib=needed.planned.peak_bytes / 2**30 * 0.6, nodes=nodes)
    assert plan_run(tiny_run("m3i", *sizes), room, samples=None).fits


@pytest.mark.parametrize(("limit", "said"), [(4.1, "larger margin"), (8.0, "fits"), (3.9, "does not fit")])
def test_a_plan_near_the_limit_says_so(limit, said):
    document = plan_of_sim().document()
    printed = Console(width=200, record=True, file=io.StringIO())
    printed.print(plan_table(document | {"peak_gib_per_rank": 4.0, "memory_gib": limit, "fits": limit > 4}))
    assert said in printed.export_text().splitlines()[0]


def test_batch_arithmetic_and_heads_are_refused():
    with pytest.raises(ConfigError, match="must be a multiple"):
        plan_run(tiny_run("m3i", "optim.batch_size=10", "optim.micro_batch_size=4"), machine(), samples=None)
    bad = tiny_run(
        "sim",
        *SMALL,
        "recipe.decoders.dense.width=36",
        "recipe.decoders.dense.heads=null",
        "backbone.config.num_attention_heads=3",
    )
    with pytest.raises(ConfigError, match="heads"):
        plan_run(bad, machine(), samples=None)


def test_the_command_prints_a_table_and_refuses_with_its_numbers():
    options = ["--ranks-per-node", "2", "--vocabulary", "50", "--workspace-gib", "0.01", "--host-memory-gib", "64"]
    given = [*tiny_overrides("m3i"), *SMALL]
    shown = CliRunner().invoke(app, ["plan", "m3i", *given, *options, "--memory-gib", "4"])
    assert shown.exit_code == 0, shown.output
    assert "at the peak" in shown.output
    assert "on 2 ranks: " in shown.output
    assert "MFU 0.21 of 989 TFLOP/s (--mfu)" in shown.output
    assert "ZeRO-1 in bf16" in shown.output
    assert "64 samples per step = 4 × 8 × 2 ranks" in " ".join(shown.output.split())  # lines break at 80 columns
    assert "days" not in shown.output  # ten steps of a tiny model
    assert "host memory: snapshot" in shown.output
    assert "of 64" in shown.output
    assert re.search(r"checkpoint +[\d.]+ GiB", shown.output)
    refused = CliRunner().invoke(
        app,
        [
            "plan",
            "m3i",
            *given,
            *options,
            "--memory-gib",
            "0.1",
            "text.max_tokens=16",
            "backbone.config.hidden_size=2048",
            "backbone.config.intermediate_size=8192",
        ],
    )
    assert isinstance(refused.exception, ConfigError)
    assert "does not fit" in refused.output


@pytest.mark.parametrize(("name", "preset"), [("m3i_vit_g14", "vit-g/14"), ("m3i_mini", "vit-mini/16")])
def test_sizes_of_a_recipe_are_found_by_name_and_are_no_recipes(name, preset):
    assert name in known_runs()
    assert name not in known_recipes()
    run = load_run(name)
    assert run.recipe == load_run("m3i").recipe
    assert run.backbone.preset == preset
