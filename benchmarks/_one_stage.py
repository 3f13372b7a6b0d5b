"""The runs that `one_stage.py` compares: what is trained, for how many steps, and what the result is worth."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _cost import count_flop, recipe_step, synthetic_batch
from _trainings import Training, tool, write
from transformers import AutoTokenizer

from m3i_scale.config import RunConfig, load_run, parse_section
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.shards.folder import FACTS

WIDTH, LAYERS, HEADS, IMAGE, PATCH, TOKENS, BATCH = 96, 4, 3, 48, 8, 24, 64
FEWEST_STEPS = 20
SAMPLED_CAPTIONS = 2048


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
"""First weights, by two steps of no size: what the architecture knows by itself."""
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
)
"""What the paper leaves open, and what might mend where `m3i` loses: `m3i` with the other choice."""


@dataclass(frozen=True)
class DataSet:
    """Shards of `shards make`, and how they are measured on."""

    folder: Path
    classes: list[str]
    streams: int
    samples: int
    tokens: int
    """Tokens of a caption, as batches are padded."""
    sha256: str
    """Of all splits, labels and the tokenizer."""
    options: list[str] = field(default_factory=list)
    """Of the probes."""

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
    if (folder / "manifest.json").is_file():
        raise DataError("this is one split", where=str(folder), fix=f"give its parent: --data {folder.parent}")
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
    # what a flag shows says nothing about its group
    options = ["--exclude-group", "flags"] if manifest.get("source") == "emoji" else []
    tokens = padded_tokens(folder)
    return DataSet(folder, classes, streams, total["samples"], tokens, _fingerprint(folder), options)


def padded_tokens(folder: Path) -> int:
    """Mean length that a batch of captions is padded to: what the text tower really computes."""
    captions: list[str] = []
    for shard in sorted((folder / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                text = tar.extractfile(member) if member.isfile() and member.name.endswith(".txt") else None
                captions += [text.read().decode("utf-8")] if text is not None else []
        if len(captions) >= SAMPLED_CAPTIONS:
            break
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    lengths = [min(len(ids), TOKENS) for ids in tokenizer(captions)["input_ids"]]
    longest = [max(lengths[start : start + BATCH]) for start in range(0, len(lengths), BATCH)]
    return round(statistics.fmean(longest))


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for pattern in ("*/manifest.json", "*/labels.json", "tokenizer/tokenizer.json"):
        for path in sorted(folder.glob(pattern)):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def run_values(entry: Entry, data: DataSet, seed: int, folder: Path) -> dict[str, Any]:
    """The run file of an entry, without its number of steps: the same backbone, data and optimizer for all."""
    base = load_run(entry.base, list(entry.overrides))
    recipe, augment = base.recipe, base.data.augment
    for decoder in recipe["decoders"].values():
        if decoder["kind"] == "transformer":
            decoder |= {"width": 64, "heads": 1, "depth": LAYERS // 3}
        elif decoder["kind"] == "attention_pool":
            decoder["width"] = WIDTH
    if "ema" in recipe:
        chosen = any(override.startswith("recipe.ema.") for override in entry.overrides)
        start = recipe["ema"]["start"] if chosen else 0.99
        recipe["ema"] = {"start": start, "end": 1.0, "projector_depth": LAYERS // 3}
    text = {"config": _shape(2), "max_tokens": TOKENS}
    for target in recipe["targets"]:
        if target["kind"] == "text":
            target["width"] = WIDTH
    return {
        "name": "run",
        "output_dir": str(folder / "run"),
        "seed": seed,
        "recipe": recipe,
        "backbone": {
            "config": _shape(LAYERS) | {"image_size": IMAGE, "patch_size": PATCH},
            "attention": base.backbone.attention,
            "attention_kernel": "eager",  # short sequences; and every product is counted
        },
        **({"text": text} if any(target["kind"] == "text" for target in recipe["targets"]) else {}),
        "data": {
            "datasets": {"main": {"path": str(data.folder / "train")}},
            "streams": data.streams,
            "augment": {
                "crop_scale": [0.3, 1.0],
                "color_jitter": [0.3, 0.3, 0.2, 0.05],
                "grayscale": 0.1,
                "blur": augment.blur,  # by what a view is for, which the recipe knows
                "solarize": augment.solarize,
            },
        },
        "deepspeed": "zero1_bf16",
        "log": {"every_steps": 20, "progress": False},
    }


def _shape(layers: int) -> dict[str, Any]:
    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    return shape | {"num_hidden_layers": layers, "initializer_range": 0.06}


def flop_per_sample(values: dict[str, Any], data: DataSet) -> float:
    """Counted FLOPs of student, decoders, heads and targets for one training sample."""
    run = parse_section(RunConfig, values | {"optim": optim_values(1000)}, where="one_stage")
    views, vocabulary = parse_recipe(run.recipe).drawn_views, 4096
    batch = synthetic_batch(
        BATCH, views, image=IMAGE, tokens=data.tokens, classes=len(data.classes), vocabulary=vocabulary
    )
    return count_flop(recipe_step(run, {"main": data.classes}, vocabulary, batch)) / BATCH


def optim_values(steps: int) -> dict[str, Any]:
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
class Job(Training):
    """One training of one entry with one seed, and its evaluation."""

    code = (*Training.code, "benchmarks/_one_stage.py", "benchmarks/_cost.py")
    entry: Entry
    data: DataSet
    flop: float
    """Of one sample."""
    price: float
    """What a sample takes of the budget: its FLOPs, or those of `m3i` where all see as many samples."""
    budget: float
    points: int
    """How often it is measured along its training; 1: at the end."""

    @property
    def steps(self) -> int:
        """As many as the budget pays for.

        Raises:
            ConfigError: too few to keep compute equal and to train at all.
        """
        if not self.entry.trained:
            return 2
        steps = round(self.budget / (self.price * BATCH))
        if steps < FEWEST_STEPS:
            least = math.ceil(FEWEST_STEPS * self.price * BATCH / 1e10) / 100
            raise ConfigError(
                f"{self.budget / 1e12:g} TFLOP are {steps} steps of '{self.entry.name}'",
                why=f"with fewer than {FEWEST_STEPS} nothing is equal and nothing trained",
                fix=f"--budget {least:g} or more",
            )
        return steps

    def values(self, folder: Path) -> dict[str, Any]:
        """The whole run file."""
        values = run_values(self.entry, self.data, self.seed, folder)
        checkpoint = {"every_steps": math.ceil(self.steps / self.points), "keep_latest": self.points}
        optim = optim_values(self.steps) | ({} if self.entry.trained else {"lr": 1e-12})
        return values | {"optim": optim, "checkpoint": checkpoint}

    def depends(self) -> tuple[dict[str, Any], list[Any]]:
        """See `Training`."""
        values = self.values(Path())
        values["data"]["datasets"]["main"]["path"] = self.data.sha256
        return values, [self.data.options]

    def measured(self, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Return what its checkpoints are worth: at the end, and along the training."""
        checkpoints = sorted((folder / "run" / "checkpoints").glob("step-*"))
        points = [self._point(folder, checkpoint, environment) for checkpoint in checkpoints]
        self.say(_short(points[-1]["measures"]))
        return {"steps": self.steps, "gflop_per_sample": self.flop / 1e9, **points[-1], "curve": points}

    def _point(self, folder: Path, checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
        """What a checkpoint is worth; measured once. The export of the last one stays."""
        path = folder / f"{checkpoint.name}.json"
        if not path.is_file():
            self.say(f"measuring {checkpoint.name}")
            write(path, self._worth(folder, checkpoint, environment))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _worth(self, folder: Path, checkpoint: Path, environment: dict[str, str]) -> dict[str, Any]:
        model, log, data = folder / "export", folder / f"{checkpoint.name}.log", self.data.folder
        tool(["export", str(checkpoint), "--output", str(model), "--overwrite"], log, environment)
        probes = tool(
            ["evaluate", str(model), "--data", str(data / "val"), "--train-data", str(data / "train")]
            + self.data.options
            + ([] if self.entry.trained or self.seed else ["--baseline", "pixels"])
            + [part for name in ("linear", "knn", "dense", "zero_shot") for part in ("--measure", name)],
            log,
            environment,
        )
        measures, absent = probes["measures"], probes["not_measured"]
        if "zero_shot" in measures:
            style = ["evaluate", str(model), "--data", str(self.data.retrieval), "--measure", "retrieval"]
            measures |= tool(style, log, environment)["measures"]
        else:
            absent["retrieval"] = absent["text_to_image"] = absent["zero_shot"]
        return {
            "step": int(checkpoint.name.rpartition("-")[2]),
            "measures": headline(measures),
            "pixels": headline(probes.get("baseline", {}).get("measures", {})),
            "guessing": guessing(measures),
            "not_measured": absent,
        }


def headline(measures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One figure a measure, with the interval that other test concepts would give."""
    places = {
        "linear": "accuracy",
        "knn": "k=20",
        "dense": "mean_iou",
        "zero_shot": "accuracy",
    }
    figures = {name: measures[name][key] for name, key in places.items() if name in measures}
    figures |= {name: _deepest(recalls) for name, recalls in _directions(measures).items()}
    return {name: {part: figure[part] for part in ("value", "low", "high")} for name, figure in figures.items()}


def _directions(measures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = measures.get("retrieval")
    return {"retrieval": found["image_to_text"], "text_to_image": found["text_to_image"]} if found else {}


def _deepest(recalls: dict[str, Any]) -> dict[str, Any]:
    """Recall at 10, or at the largest depth below the number of candidates."""
    deepest: dict[str, Any] = recalls[max(recalls, key=lambda name: int(name.partition("@")[2]))]
    return deepest


def guessing(measures: dict[str, Any]) -> dict[str, float]:
    """What blind guessing reaches, by measure."""
    found = {name: measures[name]["majority"] for name in ("linear", "knn", "zero_shot") if name in measures}
    if "dense" in measures:
        found["dense"] = measures["dense"]["mean_iou"]["majority"]
    return found | {name: _deepest(recalls)["chance"] for name, recalls in _directions(measures).items()}


def _short(measures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {figure['value']:.3f}" for name, figure in measures.items())
