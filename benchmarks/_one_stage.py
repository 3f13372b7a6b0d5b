"""The runs that `one_stage.py` compares: what is trained, for how many steps, and what the result is worth."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from _common import say
from _cost import count_flop, recipe_step, synthetic_batch

from m3i_scale.config import RunConfig, load_run, parse_section
from m3i_scale.data.make import FACTS
from m3i_scale.errors import DataError, UserError
from m3i_scale.objective.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LAYERS, HEADS, IMAGE, PATCH, TOKENS, BATCH = 96, 4, 3, 48, 8, 24, 64
CODE = ("m3i_scale", "benchmarks/_one_stage.py", "benchmarks/_cost.py")
CURVE_POINTS = 3


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    base: str
    """A built-in recipe, or a run file."""
    overrides: tuple[str, ...] = ()
    default: str = ""
    """Of an ablation: what the field's default is."""
    trained: bool = True


ONE_STAGE = Path(__file__).parent / "one_stage"
RECIPES = (
    Entry("supervised", "supervised"),
    Entry("clip", "clip"),
    Entry("mae", "mae"),
    Entry("sim", "sim"),
    Entry("supervised_sim", str(ONE_STAGE / "supervised_sim.yaml")),
    Entry("clip_sim", str(ONE_STAGE / "clip_sim.yaml")),
    Entry("m3i", "m3i"),
)
UNTRAINED = Entry("untrained", "supervised", trained=False)
"""First weights, by two steps of no size: what the architecture knows by itself."""
ABLATIONS = (
    Entry("attention mixed", "m3i", ("backbone.attention=mixed",), "own"),
    Entry("balance gradient_norm", "m3i", ("recipe.balance={kind: gradient_norm}",), "fixed"),
    Entry("balance learned", "m3i", ("recipe.balance={kind: learned}",), "fixed"),
    Entry("mask block", "m3i", ("recipe.mix.form=block",), "random"),
    Entry("pooling mean_pool", "m3i", ("recipe.decoders.pool={kind: mean_pool}",), "attention_pool"),
    Entry("text loss forward", "m3i", ("recipe.targets.2.direction=forward",), "both"),
)
"""What the paper leaves open: `m3i` with the other choice."""


@dataclass(frozen=True)
class DataSet:
    """Shards of `shards make`, and how they are measured on."""

    folder: Path
    classes: list[str]
    streams: int
    samples: int
    options: list[str] = field(default_factory=list)
    """Of every evaluation."""

    @property
    def retrieval(self) -> Path:
        """Where texts are looked up: a held-out style of seen concepts where there is one."""
        style = self.folder / "style"
        return style if style.is_dir() else self.folder / "val"


def open_data(folder: Path) -> DataSet:
    """A folder with `train` and `val`, as `m3i-scale shards make` writes it.

    Raises:
        DataError: no such folder, or one without labels or captions.
    """
    for split in ("train", "val"):
        if not (folder / split / "manifest.json").is_file():
            raise DataError(
                f"no {split} shards with a manifest.json",
                where=str(folder / split),
                fix=f"m3i-scale shards make … --output {folder} --split train=0.85,val=0.15",
            )
    manifest = json.loads((folder / "train" / "manifest.json").read_text(encoding="utf-8"))
    shards = list(manifest["shards"].values())
    total = {fact: sum(shard.get(fact, 0) for shard in shards) for fact in FACTS}
    for fact in ("with_label", "with_caption"):
        if not total[fact]:
            raise DataError(
                f"no training sample is {fact.replace('_', ' ')}",
                where=str(folder / "train"),
                why="the comparison is between recipes that learn from labels, from captions and from neither",
            )
    streams = next(count for count in (8, 4, 2, 1) if count <= len(shards))
    classes = json.loads((folder / "train" / "labels.json").read_text(encoding="utf-8"))
    # flags are told apart by their caption alone, and are a seventh of all emoji
    options = ["--exclude-group", "flags"] if manifest.get("source") == "emoji" else []
    return DataSet(folder, classes, streams, total["samples"], options)


def run_values(entry: Entry, data: DataSet, seed: int, folder: Path) -> dict[str, Any]:
    """The run file of an entry, without its number of steps: the same backbone, data and optimizer for all."""
    recipe = load_run(entry.base, list(entry.overrides)).recipe
    for decoder in recipe["decoders"].values():
        if decoder["kind"] == "transformer":
            decoder |= {"width": 64, "heads": 1, "depth": 2}
        elif decoder["kind"] == "attention_pool":
            decoder["width"] = WIDTH
    if "momentum" in recipe:
        recipe["momentum"] = {"start": 0.99, "end": 1.0, "projector_depth": 1}
    text = {"config": _shape(2), "max_tokens": TOKENS}
    for target in recipe["targets"]:
        if target["modality"] == "text":
            target["width"] = WIDTH
    attention = load_run(entry.base, list(entry.overrides)).backbone.attention
    return {
        "name": "run",
        "output_dir": str(folder / "run"),
        "seed": seed,
        "recipe": recipe,
        "backbone": {
            "config": _shape(LAYERS) | {"image_size": IMAGE, "patch_size": PATCH},
            "attention": attention,
            "attention_kernel": "eager",  # short sequences; and every product is counted
        },
        **({"text": text} if any(target["modality"] == "text" for target in recipe["targets"]) else {}),
        "data": {
            "sources": {"main": {"shards": str(data.folder / "train")}},
            "streams": data.streams,
            "augment": {
                "crop_scale": [0.3, 1.0],
                "color_jitter": [0.3, 0.3, 0.2, 0.05],
                "blur": [0.2, 0.0],
                "solarize": [0.0],
                "grayscale": 0.1,
            },
        },
        "deepspeed": "zero1_bf16" if torch.cuda.is_available() else "zero1_cpu_fp32",
        "log": {"every_steps": 20, "progress": False},
    }


def _shape(layers: int) -> dict[str, Any]:
    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    return shape | {"num_hidden_layers": layers, "initializer_range": 0.06}


def flop_per_sample(values: dict[str, Any], classes: list[str]) -> float:
    """Counted FLOPs of student, decoders, heads and targets for one training sample."""
    run = parse_section(RunConfig, values | {"optim": _optim(1000)}, where="one_stage")
    views, vocabulary = parse_recipe(run.recipe).views, 4096
    batch = synthetic_batch(BATCH, views, image=IMAGE, tokens=TOKENS, classes=len(classes), vocabulary=vocabulary)
    return count_flop(recipe_step(run, {"main": classes}, vocabulary, batch)) / BATCH


def _optim(steps: int) -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "steps": steps,
        "lr": 1e-3,
        "warmup_steps": max(1, steps // 10),
        "weight_decay": 0.05,
        "clip_grad_norm": 3.0,
    }


@dataclass(frozen=True)
class Job:
    """One training of one entry with one seed, and its evaluation."""

    entry: Entry
    seed: int
    data: DataSet
    folder: Path
    flop: float
    budget: float
    curve: bool

    @property
    def steps(self) -> int:
        """As many as the budget pays for."""
        return max(2, round(self.budget / (self.flop * BATCH))) if self.entry.trained else 2

    def values(self) -> dict[str, Any]:
        """The whole run file."""
        every = math.ceil(self.steps / CURVE_POINTS) if self.curve else self.steps
        values = run_values(self.entry, self.data, self.seed, self.folder)
        checkpoint = {"every_steps": every, "keep_latest": CURVE_POINTS}
        optim = _optim(self.steps) | ({} if self.entry.trained else {"lr": 1e-12})
        return values | {"optim": optim, "checkpoint": checkpoint}

    def key(self) -> str:
        """What the result depends on."""
        values = self.values() | {"output_dir": ""}
        manifest = (self.data.folder / "train" / "manifest.json").read_bytes()
        digest = hashlib.sha256(json.dumps([values, self.data.options], sort_keys=True).encode() + manifest)
        for name in CODE:
            path = ROOT / name
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def result(self, environment: dict[str, str]) -> dict[str, Any]:
        """Train, export and evaluate; or what an earlier call with the same settings and code found."""
        path, key = self.folder / "result.json", self.key()
        if path.is_file():
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                return known
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        run_file = self.folder / "run.yaml"
        run_file.write_text(yaml.safe_dump(self.values(), sort_keys=False), encoding="utf-8")
        tool(["train", str(run_file)], self.folder / "train.log", environment)
        checkpoints = sorted((self.folder / "run" / "checkpoints").glob("step-*"))
        points = [self._measured(checkpoint, environment) for checkpoint in checkpoints]
        found = {"key": key, "steps": self.steps, "gflop_per_sample": self.flop / 1e9, **points[-1], "curve": points}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        say(f"{self.entry.name}, seed {self.seed}: {self.steps} steps, {_short(found['measures'])}")
        return found

    def _measured(self, checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
        model, log = self.folder / checkpoint.name, self.folder / f"{checkpoint.name}.log"
        tool(["export", str(checkpoint), "--to", str(model)], log, environment)
        folder = self.data.folder
        probes = tool(
            ["evaluate", str(model), "--data", str(folder / "val"), "--train-data", str(folder / "train")]
            + ["--pool", "both", *self.data.options]
            + ([] if self.entry.trained or self.seed else ["--baseline", "pixels"])
            + [part for name in ("linear", "knn", "dense", "zero_shot") for part in ("--measure", name)],
            log,
            environment,
        )
        measures, absent = probes["measures"], probes["not_measured"]
        if "text" in {target["modality"] for target in self.values()["recipe"]["targets"]}:
            found = tool(
                ["evaluate", str(model), "--data", str(self.data.retrieval), "--measure", "retrieval"], log, environment
            )
            measures |= found["measures"]
        else:
            absent["retrieval"] = absent.get("zero_shot", "no text target")
        step = int(checkpoint.name.rpartition("-")[2])
        shutil.rmtree(model)
        return {
            "step": step,
            "measures": headline(measures),
            "pixels": headline(probes.get("baseline", {}).get("measures", {})),
            "guessing": guessing(measures),
            "not_measured": absent,
        }


def headline(measures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One figure a measure, with the interval that other test concepts would give."""
    places = {
        "linear": ("linear", "accuracy"),
        "knn": ("knn", "k=20"),
        "dense": ("dense", "mean_iou"),
        "zero_shot": ("zero_shot", "accuracy"),
        "retrieval": ("retrieval", "image_to_text", "R@10"),
    }
    found = {}
    for name, path in places.items():
        figure: Any = measures
        for part in path:
            figure = figure.get(part, {}) if isinstance(figure, dict) else {}
        if figure:
            found[name] = {part: figure[part] for part in ("value", "low", "high")}
    return found


def guessing(measures: dict[str, Any]) -> dict[str, float]:
    """What blind guessing reaches, by measure."""
    found = {name: measures[name]["majority"] for name in ("linear", "knn", "zero_shot") if name in measures}
    if "dense" in measures:
        found["dense"] = measures["dense"]["mean_iou"]["majority"]
    if "retrieval" in measures:
        found["retrieval"] = measures["retrieval"]["image_to_text"]["R@10"]["chance"]
    return found


def _short(measures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {figure['value']:.3f}" for name, figure in measures.items())


def tool(arguments: list[str], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One `m3i-scale` command in a process of its own; its document, where it prints one.

    Raises:
        UserError: it failed.
    """
    as_json = [] if arguments[0] == "train" else ["--json"]
    with log.open("a", encoding="utf-8") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "m3i_scale", *arguments, *as_json],
            stdout=subprocess.PIPE if as_json else stream,
            stderr=stream,
            env=os.environ | environment,
            text=True,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise UserError(f"`m3i-scale {arguments[0]}` ended with exit code {done.returncode}", where=str(log), why=tail)
    document: dict[str, Any] = json.loads(done.stdout) if as_json else {}
    return document
