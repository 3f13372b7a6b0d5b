"""Trainings that `one_stage.py` compares, and the evaluation of their exports."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cost import count_flop, recipe_step, synthetic_batch
from _one_stage_data import TOKENS, DataSet, Setting
from _trainings import Training, tool, write

from m3i_scale.config import RunConfig, load_run, parse_section
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import parse_recipe

FEWEST_STEPS = 20
EVALUATE = str(Path(__file__).parent / "_evaluate.py")


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
    # One pooling, a mean, and no label smoothing for all, so that rows differ in inputs and targets alone.
    Entry("supervised", "supervised", ("recipe.targets.0.distribution.label_smoothing=0.0",)),
    Entry("clip", "clip"),
    Entry("mae", "mae"),
    Entry("sim", "sim"),
    Entry("supervised_sim", str(ONE_STAGE / "supervised_sim.yaml")),
    Entry("clip_sim", str(ONE_STAGE / "clip_sim.yaml")),
    Entry("m3i", "m3i"),
)
UNTRAINED = Entry("untrained", "supervised", trained=False)
"""Initial weights, after two steps at a learning rate of 1e-12."""
ABLATIONS = (
    Entry("attention mixed", "m3i", ("backbone.attention=across_images",), "within_image"),
    Entry("balance gradient_norm", "m3i", ("recipe.balance={kind: gradient_norm}",), "fixed"),
    Entry("balance learned", "m3i", ("recipe.balance={kind: learned}",), "fixed"),
    Entry("mask block", "m3i", ("recipe.mix.form=block",), "random"),
    Entry("pooling attention_pool", "m3i", ("recipe.decoders.pool={kind: attention_pool}",), "mean_pool"),
    Entry("text loss forward", "m3i", ("recipe.targets.2.distribution.direction=forward",), "both"),
    Entry("momentum from 0.9", "m3i", ("recipe.ema.start=0.9",), "0.99"),
    Entry("dense weights 10", "m3i", ("recipe.targets.0.weight=10", "recipe.targets.1.weight=10"), "1"),
    Entry("text weight 3", "m3i", ("recipe.targets.2.weight=3",), "1"),
    Entry("views one", "m3i_intra", (), "two"),
    Entry("images not mixed", "m3i_no_mix", (), "mixed"),
    Entry("sim_published", str(ONE_STAGE / "m3i_sim_published.yaml"), (), "Transformer decoder, MLP projector"),
)
"""Variants of `m3i`: choices that the paper leaves open, and others."""


def run_values(entry: Entry, data: DataSet, seed: int, folder: Path) -> dict[str, Any]:
    """The run file of an entry, without its number of steps: the same backbone, data and optimizer for all."""
    base, setting = load_run(entry.base, list(entry.overrides)), data.setting
    recipe, augment = base.recipe, base.data.augment
    as_published = entry.name == "sim_published"
    for decoder in recipe["decoders"].values():
        if as_published and decoder["kind"] == "siamese":  # as wide as the backbone
            decoder |= {"heads": setting.heads, "depth": setting.layers // 3}
        elif decoder["kind"] in ("transformer", "siamese"):  # one decoder and one projector for all
            decoder |= {"kind": "transformer", "width": 64, "heads": 1, "depth": setting.layers // 3}
        elif decoder["kind"] == "attention_pool":
            decoder["width"] = setting.width
    if "ema" in recipe:
        chosen = any(override.startswith("recipe.ema.") for override in entry.overrides)
        start = recipe["ema"]["start"] if chosen else 0.99
        recipe["ema"] = {"start": start, "end": 1.0, "projector_depth": setting.layers // 3}
        if as_published:
            recipe["ema"] |= {"projector": "transformer", "projector_heads": setting.heads}
    text = {"config": _shape(setting, 2), "max_tokens": TOKENS}
    for target in recipe["targets"]:
        if target["kind"] == "text":
            target["width"] = setting.width
    kinds = {target["kind"] for target in recipe["targets"]}
    reads_text = "text" in kinds
    # errors in a recipe that does not read them
    unused = [key for key, kind in (("captions", "text"), ("labels", "category")) if kind not in kinds]
    return {
        "name": "run",
        "output_dir": str(folder / "run"),
        "seed": seed,
        "recipe": recipe,
        "backbone": {
            "config": _shape(setting, setting.layers) | {"image_size": setting.image, "patch_size": setting.patch},
            "attention": base.backbone.attention,
            "attention_kernel": "eager",  # short sequences; and every product is counted
            **({"weight_init": base.backbone.weight_init, "freeze": base.backbone.freeze} if as_published else {}),
        },
        **({"text": text} if reads_text else {}),
        **({"optim": {"decay_tokens": base.optim.decay_tokens}} if as_published else {}),
        "data": {
            "datasets": {
                name: {key: value for key, value in one.items() if key not in unused}
                for name, one in data.datasets.items()
            },
            "streams": data.streams,
            "augment": {
                "crop_scale": [0.3, 1.0],
                "color_jitter": [0.3, 0.3, 0.2, 0.05],
                "grayscale": 0.1,
                "blur": augment.blur,  # by what a view is for, which the recipe knows
                "solarize": augment.solarize,
            },
        },
        "deepspeed": setting.deepspeed,
        "log": {"every_steps": 20, "progress": False},
    }


def _shape(setting: Setting, layers: int) -> dict[str, Any]:
    width = setting.width
    shape = {"hidden_size": width, "num_attention_heads": setting.heads, "intermediate_size": 4 * width}
    return shape | {"num_hidden_layers": layers, "initializer_range": 0.06}


def flop_per_sample(values: dict[str, Any], data: DataSet) -> float:
    """Counted FLOPs of student, decoders, heads and targets for one training sample."""
    batch = data.setting.batch
    optim = values.get("optim", {}) | optim_values(1000, batch)
    run = parse_section(RunConfig, values | {"optim": optim}, where="one_stage")
    views, vocabulary, classes = parse_recipe(run.recipe).drawn_views, 4096, max(map(len, data.classes.values()))
    samples = synthetic_batch(
        batch, views, image=data.setting.image, tokens=data.tokens, classes=classes, vocabulary=vocabulary
    )
    return count_flop(recipe_step(run, data.classes, vocabulary, samples)) / batch


def optim_values(steps: int, batch: int) -> dict[str, Any]:
    return {
        "batch_size": batch,
        "micro_batch_size": batch,
        "steps": steps,
        "lr": 1e-3,
        "warmup_steps": max(1, steps // 10),
        "weight_decay": 0.05,
        "clip_grad_norm": 3.0,
    }


@dataclass(frozen=True)
class Job(Training):
    """One training of one entry with one seed, and its evaluation."""

    code = (
        *(*Training.code, "benchmarks/_one_stage.py", "benchmarks/_one_stage_data.py"),
        *("benchmarks/_cost.py", "benchmarks/_evaluate.py"),
    )
    entry: Entry
    data: DataSet
    flop: float
    """Of one sample."""
    price: float
    """FLOPs that a sample takes from the budget: its own, or the FLOPs of `m3i` if samples are equal."""
    budget: float
    points: int
    """Number of evaluations along its training; 1: at the end."""

    @property
    def steps(self) -> int:
        """Number of steps that the budget pays for.

        Raises:
            ConfigError: they are fewer than `FEWEST_STEPS`.
        """
        if not self.entry.trained:
            return 2
        batch = self.data.setting.batch
        steps = round(self.budget / (self.price * batch))
        if steps < FEWEST_STEPS:
            least = math.ceil(FEWEST_STEPS * self.price * batch / 1e10) / 100
            raise ConfigError(
                f"{self.budget / 1e12:g} TFLOP are {steps} steps of '{self.entry.name}'",
                why=f"with fewer than {FEWEST_STEPS} steps, rounding changes the compute and nothing is learned",
                fix=f"--budget {least:g} or more",
            )
        return steps

    def values(self, folder: Path) -> dict[str, Any]:
        """The whole run file."""
        values = run_values(self.entry, self.data, self.seed, folder)
        checkpoint = {"every_steps": math.ceil(self.steps / self.points), "keep_latest": self.points}
        optim = optim_values(self.steps, self.data.setting.batch) | ({} if self.entry.trained else {"lr": 1e-12})
        return values | {"optim": values.get("optim", {}) | optim, "checkpoint": checkpoint}

    def depends(self) -> tuple[dict[str, Any], list[Any]]:
        """See `Training`."""
        values = self.values(Path())
        datasets = values["data"]["datasets"]
        values["data"]["datasets"] = {name: one | {"path": ""} for name, one in datasets.items()}
        measured = [[probe.prefix, probe.measures, probe.exclude_groups] for probe in self.data.probes]
        return values, [self.data.sha256, measured]

    def measured(self, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Return the results at the end of the training, and along it."""
        checkpoints = sorted((folder / "run" / "checkpoints").glob("step-*"))
        points = [self._point(folder, checkpoint, environment) for checkpoint in checkpoints]
        self.say(_short(points[-1]["measures"]))
        return {"steps": self.steps, "gflop_per_sample": self.flop / 1e9, **points[-1], "curve": points}

    def _point(self, folder: Path, checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Return the results of a checkpoint; evaluated once. The export of the last one stays."""
        path = folder / f"{checkpoint.name}.json"
        if not path.is_file():
            self.say(f"evaluating {checkpoint.name}")
            write(path, self._evaluate(folder, checkpoint, environment))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _evaluate(self, folder: Path, checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Export a checkpoint, and return its results and the results of raw pixels and chance."""
        model, log = folder / "export", folder / f"{checkpoint.name}.log"
        tool(["export", str(checkpoint), "--output", str(model), "--overwrite"], log, environment)
        pixels = {} if self.entry.trained or self.seed else {"baseline": "pixels"}
        probes = [probe.options() | (pixels if probe.train_data else {}) for probe in self.data.probes]
        documents = tool([str(model), json.dumps(probes)], log, environment, (EVALUATE,))
        results: dict[str, Any] = {"measures": {}, "pixels": {}, "chance": {}, "not_measured": {}}
        for probe, document in zip(self.data.probes, documents, strict=True):
            for name, (estimate, chance) in single_values(document["measures"], probe.prefix).items():
                results["measures"][name] = {part: estimate[part] for part in ("value", "low", "high")}
                results["chance"][name] = chance
            baseline = document.get("baseline", {}).get("measures", {})
            results["pixels"] |= {name: one for name, (one, _) in single_values(baseline, probe.prefix).items()}
            results["not_measured"] |= {probe.prefix + name: why for name, why in document["not_measured"].items()}
        return {"step": int(checkpoint.name.rpartition("-")[2]), **results}


def single_values(measures: dict[str, Any], prefix: str = "") -> dict[str, tuple[dict[str, Any], float]]:
    """Return one or two estimates of every metric, with their intervals over test images, and with chance level."""
    found = {}
    for name, of_name in measures.items():
        if name in ("linear", "zero_shot"):
            found[name] = of_name["accuracy"], of_name["majority"]
        elif name == "knn":
            found[name] = of_name["k=20"], of_name["majority"]
        elif name == "few_shot":
            shots = [k for k in (5, 20) if f"k={k}" in of_name]
            found |= {f"few_shot_{k}": (of_name[f"k={k}"], of_name["majority"]) for k in shots}
        elif name == "dense":
            found[name] = of_name["mean_iou"], of_name["mean_iou"]["majority"]
        elif name == "retrieval":
            for direction, title in (("image_to_text", "retrieval"), ("text_to_image", "text_to_image")):
                recall = _deepest(of_name[direction])
                found[title] = recall, recall["chance"]
    return {prefix + name: figure for name, figure in found.items()}


def _deepest(recalls: dict[str, Any]) -> dict[str, Any]:
    """Recall at 10, or at the largest depth below the number of candidates."""
    deepest: dict[str, Any] = recalls[max(recalls, key=lambda name: int(name.partition("@")[2]))]
    return deepest


def _short(measures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {figure['value']:.3f}" for name, figure in measures.items())
