"""Mistakes of a user: exit code 2, a message that names the fault, nothing trained, no traceback."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import TESTS, Job, environment, free_port
from shapes import metrics, write_run

from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.data.order import shard_order

LONE_RANK = {"RANK": "0"}
FIRST_OF_TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
"""The other rank never comes: whoever waited for it would wait for half an hour."""


@dataclass
class Mistake:
    """One call that must fail."""

    says: str
    """Regular expression of the message."""
    overrides: list[str] = field(default_factory=list)
    recipe: str = "m3i"
    make: Callable[[Path, Path], list[str]] | None = None
    """(folder, shards) → further overrides, after making files."""
    environment: dict[str, str] = field(default_factory=dict)


def deepspeed_file(text: str) -> Callable[[Path, Path], list[str]]:
    def make(folder: Path, shards: Path) -> list[str]:
        (folder / "ds.json").write_text(text)
        return [f"deepspeed={folder / 'ds.json'}"]

    return make


# How a run names its shards; validation is due after eight steps, of which none must be taken.
USED_AS = {
    "train": ["data.datasets.shapes.path=COPY"],
    "val": ["data.validation.val.path=COPY", "evaluation.every_steps=8", "evaluation.batches=1"],
}


def copied_shards(change: Callable[[Path], None], split: str = "train") -> Callable[[Path, Path], list[str]]:
    def make(folder: Path, shards: Path) -> list[str]:
        copy = folder / "copy" / split
        shutil.copytree(shards / split, copy)
        shutil.copytree(shards / "tokenizer", folder / "copy" / "tokenizer")
        change(copy)
        return [override.replace("COPY", str(copy)) for override in USED_AS[split]]

    return make


def other_labels(folder: Path) -> None:
    (folder / "labels.json").write_text(json.dumps(["bar", "disc", "triangle"]))


def labels_out_of_range(folder: Path) -> None:
    (folder / "labels.json").write_text(json.dumps(["bar"]))
    spoil(folder)


def a_stream_out_of_range(folder: Path) -> None:
    shards = sorted(folder.glob("*.tar"))
    first_stream = shard_order(len(shards), 0, "shapes")[:5]  # a quarter of 16, and what it may share with the next one
    spoil(folder, [shards[number] for number in first_stream])


def spoil(folder: Path, shards: list[Path] | None = None) -> None:
    for shard in folder.glob("*.tar") if shards is None else shards:
        members = []
        with tarfile.open(shard) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(shard, "w") as tar:
            for name, data in members:
                content = b"7" if name.endswith(".cls") else data
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shutil.rmtree(folder / "index")


def cut_one_short(folder: Path) -> None:
    shard = min(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def emptied(folder: Path) -> None:
    for shard in folder.glob("*.tar"):
        shard.unlink()


def without_labels(folder: Path) -> None:
    (folder / "labels.json").unlink()


def bare(folder: Path, shards: Path) -> Path:
    """Shards without labels.json beside them."""
    shutil.copytree(shards / "train", folder / "bare")
    without_labels(folder / "bare")
    return folder / "bare"


def file_in_the_way(folder: Path, shards: Path) -> list[str]:
    (folder / "occupied").write_text("")
    return [f"output_dir={folder / 'occupied' / 'out'}"]


def missing_shard(folder: Path, shards: Path) -> list[str]:
    return [f"data.datasets.shapes.path={shards / 'train'}/shapes-{{000000..000040}}.tar"]


DS_FILE = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_cpu.json"
MISTAKES = {
    "unknown key": Mistake(r"unknown key 'optim.lrr'", ["optim.lrr=1"]),
    "unknown section": Mistake(r"unknown key 'optimizer'[\s\S]*did you mean 'optim'", ["optimizer.lr=1"]),
    "wrong type": Mistake(r"'optim.lr'.*got 'fast'", ["optim.lr=fast"]),
    "no override": Mistake(r"'optim.lr' is not an override", ["optim.lr"]),
    "seed below zero": Mistake(r"'seed'", ["seed=-1"]),
    "unknown recipe key": Mistake(r"unknown key 'recipe.mix.fom'", ["recipe.mix.fom=block"]),
    "recipe that does not hold together": Mistake(r"no decoder 'pol'", ["recipe.targets.2.decoder=pol"]),
    "unknown DeepSpeed key": Mistake(
        r"zero_optimisation", make=deepspeed_file(DS_FILE.read_text().replace("zero_optimization", "zero_optimisation"))
    ),
    "idle DeepSpeed key": Mistake(
        r"gradient_clipping", make=deepspeed_file(re.sub(r'.*"gradient_clipping".*\n', "", DS_FILE.read_text()))
    ),
    "torn DeepSpeed file": Mistake(r"cannot read the DeepSpeed config", make=deepspeed_file("{")),
    "no DeepSpeed config": Mistake(r"zero9", ["deepspeed=zero9"]),
    "missing shard": Mistake(r"shapes-0000(16|\d\d).tar", make=missing_shard),
    "no shards": Mistake(r"shard", make=copied_shards(emptied)),
    "no such folder": Mistake(r"/nowhere/shards", ["data.datasets.shapes.path=/nowhere/shards"]),
    "no sources": Mistake(r"the run has no data", ["data.datasets={}"]),
    "changed sources of a new run": Mistake(r"data.changed_datasets has no effect", ["data.changed_datasets=[shapes]"]),
    "best of a figure that is not written": Mistake(
        r"writes 'val/loss'[\s\S]*did you mean 'evaluation/loss'",
        ["checkpoint.keep_best={metric: val/loss}", "evaluation.every_steps=2"],
        make=lambda folder, shards: [f"data.validation.val.path={shards / 'val'}"],
    ),
    "rule that keeps nothing": Mistake(r"checkpoint.keep_every_steps has no effect", ["checkpoint.keep_every_steps=5"]),
    "no weight": Mistake(r"no dataset has a weight > 0 after 0 samples", ["data.datasets.shapes.weight=0"]),
    "schedule that does not begin": Mistake(
        r"'data.datasets.shapes.weight': a schedule is two or more", ["data.datasets.shapes.weight=[[5, 1], [9, 2]]"]
    ),
    "less data than a batch": Mistake(
        r"the datasets end after \d+ samples, fewer than optim.batch_size \(96\)",
        ["data.datasets.shapes.epochs=1", "optim.batch_size=96", "optim.micro_batch_size=8"],
    ),
    "captions without a text target": Mistake(
        r"`captions: none` has no effect: the recipe has no text target", ["data.datasets.shapes.captions=none"], "mae"
    ),
    "no captions for a text target": Mistake(
        r"a text target, but every dataset has `captions: none`", ["data.datasets.shapes.captions=none"]
    ),
    "labels without a category target": Mistake(
        r"`labels: false` has no effect: the recipe has no category target",
        ["data.datasets.shapes.labels=false"],
        "mae",
    ),
    "label set without a category target": Mistake(
        r"`label_set` has no effect: the recipe predicts no classes", ["data.datasets.shapes.label_set=a"], "mae"
    ),
    "label set without labels": Mistake(
        r"`label_set` has no effect: the dataset has no labels.json",
        ["data.datasets.bare.label_set=a"],
        make=lambda folder, shards: [f"data.datasets.bare.path={bare(folder, shards)}"],
    ),
    "validation that would end": Mistake(
        r"epochs has no effect: the same validation batches",
        ["data.validation.val.path=/data", "data.validation.val.epochs=1", "evaluation.every_steps=2"],
    ),
    "fewer samples than streams": Mistake(
        r"data.streams must be at most .* got 512 streams",
        ["data.streams=512", "optim.micro_batch_size=512", "optim.batch_size=512"],
    ),
    "streams and micro-batch": Mistake(r"must be a multiple of .* 3 streams", ["data.streams=3"]),
    "streams and workers": Mistake(r"data.num_workers must divide", ["data.num_workers=3"]),
    "shard cut short": Mistake(r"shapes-000000.tar", make=copied_shards(cut_one_short)),
    "a stream without a good sample in its only pass": Mistake(
        r"a stream ends before the first step[\s\S]*quarantine[\s\S]*\d+ × label out of range",
        ["data.datasets.shapes.epochs=1"],
        make=copied_shards(a_stream_out_of_range),
    ),
    "labels out of range": Mistake(r"label out of range", make=copied_shards(labels_out_of_range)),
    "no labels": Mistake(r"labels", recipe="supervised", make=copied_shards(without_labels)),
    "no tokenizer": Mistake(r"/nowhere/tokenizer", ["text.tokenizer=/nowhere/tokenizer"]),
    "patch size": Mistake(r"must be a multiple of patch size 7, got 32", ["backbone.config.patch_size=7"]),
    "heads": Mistake(r"must be a multiple of .* 3 heads, got 64", ["backbone.config.num_attention_heads=3"]),
    "preset": Mistake(r"unknown backbone 'vit-z/16'", ["backbone.preset=vit-z/16"]),
    "text field": Mistake(r"unknown field 'layers' of bert", ["text.config.layers=2"]),
    "batch": Mistake(r"optim.batch_size \(6\) must be a multiple", ["optim.batch_size=6"]),
    "micro-batch below the mix": Mistake(
        r"optim.micro_batch_size must be at least", ["optim.micro_batch_size=1", "data.streams=1"]
    ),
    "warm-up": Mistake(r"warmup_steps \(9\) must be less than steps \(8\)", ["optim.warmup_steps=9"]),
    "text without text target": Mistake(r"`text` has no effect", ["text.max_tokens=8"], recipe="mae"),
    "attention without mix": Mistake(
        r"`attention: across_images` has no effect", ["backbone.attention=across_images"], recipe="mae"
    ),
    "checkpointing policy": Mistake(
        r"no activation checkpointing policy 'every_1'", ["backbone.activation_checkpointing=every_1"]
    ),
    "pretrained": Mistake(
        r"cannot read a model from '/nowhere'", ["backbone.from_pretrained=/nowhere", "backbone.preset=null"]
    ),
    "preset beside pretrained": Mistake(
        r"preset `vit-s/16` has no effect together with from_pretrained",
        ["backbone.from_pretrained=/nowhere", "backbone.preset=vit-s/16"],
    ),
    "no teacher": Mistake(
        r"cannot read a teacher from '/nowhere/teacher'[\s\S]*recipe\.teachers\.teacher\.from_pretrained",
        ["recipe.teachers.teacher.from_pretrained=/nowhere/teacher"],
        recipe="dense_distillation",
    ),
    "one sample and batch norm": Mistake(
        r"head 'global' has batch norm, which needs at least two samples",
        ["optim.micro_batch_size=1", "optim.batch_size=1", "data.streams=1"],
        recipe="simclr",
    ),
    "collapse": Mistake(
        r"lets a pooled target collapse: give its head a predictor",
        ["recipe.heads.global={depth: 2, hidden: 48, width: 24, norm: batch}"],
        recipe="byol",
    ),
    "validation labels": Mistake(
        r"labels of validation dataset 'val' are not those of a training dataset",
        make=copied_shards(other_labels, "val"),
    ),
    "no validation shards": Mistake(
        r"/nowhere/val", ["data.validation.val.path=/nowhere/val", "evaluation.every_steps=2"]
    ),
    "validation shard cut short": Mistake(r"shapes-000000.tar", make=copied_shards(cut_one_short, "val")),
    "evaluation without data": Mistake(r"evaluation.every_steps needs data.validation", ["evaluation.every_steps=2"]),
    "resume from nowhere": Mistake(r"cannot resume: no such folder", ["checkpoint.resume=/nowhere/step-00000002"]),
    "output in a file": Mistake(r"occupied", make=file_in_the_way),
    "peak of another type": Mistake(r"'h100-fp16' is not the peak for bf16", ["hardware.peak_tflops=h100-fp16"]),
    "variables against a deterministic run": Mistake(
        r"a deterministic run needs NCCL_ALGO=Ring", ["hardware.deterministic=true"], environment={"NCCL_ALGO": "Tree"}
    ),
    "before the ranks meet": Mistake(
        r"/nowhere/shards",
        ["data.datasets.shapes.path=/nowhere/shards"],
        environment=FIRST_OF_TWO | {"MASTER_PORT": str(free_port())},
    ),
    "half a launcher": Mistake(r"LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT", environment=LONE_RANK),
}
RUN_FILES = {
    "no such run file": ("nope.yaml", None, r"no config file '.*nope.yaml'"),
    "not YAML": ("bad.yaml", "recipe: [", r"cannot read the config file"),
    "not a mapping": ("list.yaml", "- a", r"must be a YAML mapping"),
    "extends itself": ("loop.yaml", "extends: loop.yaml", r"extend each other in a circle"),
}


AFTERWARDS = {
    "again from what it wrote": [],
    "never resume": ["checkpoint.resume=never"],
    "another model": ["backbone.config.num_hidden_layers=3"],
    "another recipe": ["recipe.targets.0.normalize_pixels=false"],
    "fewer steps": ["optim.steps=3"],
    "named, and the run has newer ones": ["checkpoint.resume=OUT/checkpoints/step-00000002"],
    "named, in another folder": ["checkpoint.resume=OUT/checkpoints/step-00000002", "output_dir=OUT-branch"],
}


@dataclass
class Attempts:
    results: dict[str, dict[str, Any]]
    root: Path


@pytest.fixture(scope="module")
def attempts(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempts:
    """All mistakes, and a few good runs, as forks of one process."""
    root = tmp_path_factory.mktemp("mistakes")
    calls: dict[str, dict[str, Any]] = {}
    for name, mistake in MISTAKES.items():
        folder = root / name.replace(" ", "-")
        run_file = write_run(folder, shards, mistake.recipe)
        made = mistake.make(folder, shards) if mistake.make else []
        arguments = ["train", str(run_file), *made, *mistake.overrides]
        calls[name] = {"arguments": arguments, "environment": mistake.environment}
    for name, (file, text, _) in RUN_FILES.items():
        if text is not None:
            (root / file).write_text(text)
        calls[name] = {"arguments": ["train", str(root / file)]}
    run_file = write_run(
        root / "diverging", shards, "mae", "optim.lr=1e30", "optim.warmup_steps=0", "deepspeed=zero3_cpu_fp32"
    )
    calls["diverging"] = {"arguments": ["train", str(run_file)]}
    for name, micro in (("whole", 8), ("accumulated", 4)):
        run_file = write_run(
            root / name,
            shards,
            "mae",
            f"optim.micro_batch_size={micro}",
            "optim.steps=4",
            "optim.eps=1e-5",  # or Adam makes whole steps of the rounding of a gradient that is nearly nought
            "deepspeed=zero3_cpu_fp32",
        )
        calls[name] = {"arguments": ["train", str(run_file)]}
    written = str(root / "whole" / "out" / "run.yaml")
    for name, more in AFTERWARDS.items():  # one at a time: they share an output_dir
        overrides = [override.replace("OUT", str(root / "whole" / "out")) for override in more]
        calls[name] = {"arguments": ["train", written, *overrides], "alone": True}
    (root / "calls.json").write_text(json.dumps(list(calls.values())))
    (root / "results").mkdir()
    script = [str(TESTS / "run" / "attempts.py"), str(root / "calls.json"), str(root / "results")]
    job = Job([[sys.executable, *script]], [environment()], root / "logs", free_port())
    assert job.wait() == [0], job.text()[-4000:]
    results = [json.loads((root / "results" / f"{number}.json").read_text()) for number in range(len(calls))]
    return Attempts(dict(zip(calls, results, strict=True)), root)


def check(result: dict[str, Any], says: str) -> None:
    assert result["traceback"] is None, result["traceback"]
    assert result["code"] == 2, result["text"]
    assert "Traceback" not in result["text"]
    assert "error:" in result["text"]
    assert re.search(says, result["text"]), result["text"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_before_step_1(attempts: Attempts, name: str) -> None:
    check(attempts.results[name], MISTAKES[name].says)
    out = attempts.root / name.replace(" ", "-") / "out"
    assert not list(out.glob("checkpoints/step-*"))
    steps = out / "metrics.jsonl"
    assert not steps.exists() or '"loss"' not in steps.read_text()


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(attempts: Attempts) -> None:
    check(attempts.results["diverging"], r"the loss is not finite at step \d")
    assert attempts.results["diverging"]["text"].count("warning: optim.lr is 1e+30") == 1
    assert "warning: " not in attempts.results["whole"]["text"]
    lines = (attempts.root / "diverging" / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["status"] == "failed"


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_bad_run_file_is_explained(attempts: Attempts, name: str) -> None:
    check(attempts.results[name], RUN_FILES[name][2])


def test_a_finished_run_is_left_as_it_is(attempts: Attempts) -> None:
    assert attempts.results["whole"]["code"] == attempts.results["again from what it wrote"]["code"] == 0
    assert "step 0" in attempts.results["whole"]["text"]
    assert "fp32, ZeRO-3" in attempts.results["whole"]["text"]
    assert re.search(r"resumes from step 4, \S*step-00000004", attempts.results["again from what it wrote"]["text"])
    check(attempts.results["never resume"], "checkpoint.resume is 'never'")


@pytest.mark.parametrize(("name", "key"), [("another model", "backbone"), ("another recipe", "recipe")])
def test_another_run_does_not_go_on_from_the_checkpoint(attempts: Attempts, name: str, key: str) -> None:
    check(attempts.results[name], rf"the checkpoint is from a different run: {key} changed")
    if key == "backbone":
        check(attempts.results[name], r"why: backbone\.num_hidden_layers was 2, is 3")


def test_a_refused_run_leaves_what_the_earlier_one_wrote(attempts: Attempts) -> None:
    out = attempts.root / "whole" / "out"
    written = yaml.safe_load((out / "run.yaml").read_text())
    assert written["backbone"]["config"]["num_hidden_layers"] == 2
    assert written["optim"]["steps"] == 4
    assert written["recipe"]["targets"][0]["normalize_pixels"] is True
    assert json.loads((out / "deepspeed.json").read_text())["train_batch_size"] == 8
    assert sorted(metrics(attempts.root / "whole" / "run.yaml")) == [1, 2, 3, 4]


def test_a_checkpoint_of_a_later_step_is_refused(attempts: Attempts) -> None:
    check(attempts.results["fewer steps"], r"optim.steps must be at least 4, .* got 3")


def test_a_named_checkpoint_starts_a_branch_and_takes_nothing_back(attempts: Attempts) -> None:
    check(attempts.results["named, and the run has newer ones"], r"newer valid checkpoints[\s\S]*step-00000004")
    branch = attempts.results["named, in another folder"]
    assert branch["code"] == 0, branch
    assert re.search(r"from step 2, \S*step-00000002", branch["text"])
    lines = (attempts.root / "whole" / "out-branch" / "metrics.jsonl").read_text().splitlines()
    again = {line["step"]: line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"}
    whole = metrics(attempts.root / "whole" / "run.yaml")
    assert again == {step: whole[step]["loss"] for step in (3, 4)}


def test_two_half_micro_batches_are_one_whole(attempts: Attempts) -> None:
    assert attempts.results["accumulated"]["code"] == 0, attempts.results["accumulated"]
    runs = [attempts.root / name for name in ("whole", "accumulated")]
    whole, accumulated = (metrics(run / "run.yaml") for run in runs)
    assert set(whole) == set(accumulated) == {1, 2, 3, 4}
    for step, line in whole.items():
        for key in ("loss", "grad_norm"):
            assert accumulated[step][key] == pytest.approx(line[key], rel=1e-3), (step, key)
    first, second = (dict(saved_weights(run / "out" / "checkpoints" / "step-00000004", "student")) for run in runs)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)
