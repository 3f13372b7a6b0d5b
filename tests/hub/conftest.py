"""A tiny run with every kind of target, and a committed checkpoint of it as a run on two ranks writes it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from written_checkpoint import write_checkpoint

from m3i_scale.config import RunConfig, parse_section, read_yaml, resource_folder
from m3i_scale.exports import fresh, verify
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

LABELS = ["warm-things", "cold-things", "green-things"]
_COLOURS = [(220, 60, 40), (40, 80, 220), (40, 200, 60)]


class Picture:
    """A noisy patch of one color."""

    def __init__(self, label, seed):
        self.label, self.seed = label, seed

    def __call__(self):
        noise = np.random.default_rng(self.seed).integers(-40, 40, (40, 56, 3))
        pixels = np.clip(np.array(_COLOURS[self.label]) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """72 samples of 24 concepts in 12 families, split by family; three pictures under each caption."""
    records = []
    for number in range(24):
        label, family = number % 3, number // 2
        for style in range(3):
            records.append(
                Record(
                    key=f"s{style}-c{number}",
                    image=Picture(label, 100 * number + style),
                    caption=f"thing number {number} of kind {LABELS[label]}",
                    label=label,
                    meta={"concept": f"c{number}", "family": f"f{family}", "group": LABELS[label]},
                    split="val" if family % 4 == 0 else "train",
                )
            )
    output = tmp_path_factory.mktemp("data") / "shards"
    make_shards(
        ListedInput(records, LABELS), output, name="things", options=ShardOptions(multiple_of=2, vocabulary=200)
    )
    return output


SEGMENTERS = {"upernet": {"kind": "upernet", "channels": 16}, "eomt": {"kind": "eomt", "queries": 5, "blocks": 2}}


def small_segmenter(shards, output_dir, head):
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    values = {
        "output_dir": str(output_dir),
        "task": {"kind": "segmentation", "head": SEGMENTERS[head]},
        "backbone": {"config": shape | {"image_size": 32, "patch_size": 8}},
        "data": {"datasets": {"things": {"path": str(shards / "train")}}},
    }
    return parse_section(RunConfig, values, where="test")


def small_run(shards, output_dir, backbone=None, pool="mean_pool", regularizer="unigrad"):
    values = read_yaml(resource_folder("recipes") / "m3i.yaml")
    values["recipe"]["decoders"]["pool"]["kind"] = pool
    values["recipe"]["targets"][0]["regularizer"] = regularizer
    values["recipe"]["targets"][2]["width"] = 16
    values |= {
        "output_dir": str(output_dir),
        "backbone": backbone
        or {
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "image_size": 32,
                "patch_size": 8,
            }
        },
        "text": {
            "max_tokens": 12,
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 16,
            },
        },
        "data": {"datasets": {"things": {"path": str(shards / "train")}}},
    }
    return parse_section(RunConfig, values, where="test")


@pytest.fixture(scope="session")
def make_run(shards):
    """A run folder with committed checkpoints of the given steps; returns it and the objective of the last one.

    It has first weights, and where it is trained those that come of it.
    """

    def make(
        output_dir: Path,
        steps=(10,),
        vocab_size=None,
        label_sets=None,
        *,
        segments=None,
        run=None,
        train=None,
        **fields,
    ):
        if run is None:
            run = small_segmenter(shards, output_dir, segments) if segments else small_run(shards, output_dir, **fields)
        label_sets = label_sets or {"things": LABELS}
        tokenizer = shards / "tokenizer"
        vocab_size = vocab_size or len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
        for step in steps:
            torch.manual_seed(step)
            objective = build_objective(run, label_sets, vocab_size)
            first_weights(objective)
            if train is not None:
                train(objective)
            write_checkpoint(
                output_dir / "checkpoints" / f"step-{step:08d}",
                run,
                objective,
                step,
                vocab_size,
                tokenizer,
                label_sets,
            )
        return output_dir, objective

    return make


def first_weights(objective):
    others = (objective.text, None if objective.momentum is None else objective.momentum.backbone)
    for root in (objective.student.model, *(other.model for other in others if other is not None)):
        for module in root.modules():
            initialize_module(root, module)
    for module in objective.modules():
        initialize_module(module, module) if not hasattr(module, "config") else None


@pytest.fixture(scope="session")
def run_dir(make_run, tmp_path_factory):
    """A run with one checkpoint, with metrics, and its objective."""
    folder, objective = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    records = [
        {"kind": "run", "step": 0, "name": "tiny", "micro_batch_size": 32},
        {"kind": "train", "step": 1, "loss": 1.5, "loss/text": 3.0, "loss_samples/text": 64.0},
        {
            "kind": "train",
            "step": 10,
            "loss": 1.25,
            "loss/text": 2.5,
            "loss_samples/text": 32.0,
            "memory_gib": 7.25,
        },
        {"kind": "train", "step": 20, "loss": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    return folder, objective.eval()


@pytest.fixture(scope="session")
def exported(run_dir, tmp_path_factory):
    """An export of the trained weights, and what `export` returned."""
    from m3i_scale.exports.export import export

    target = tmp_path_factory.mktemp("exports") / "tiny"
    return target, export(run_dir[0], target)


@pytest.fixture
def same_process(monkeypatch):
    """Load in the process of the test: what is found is the same, without seconds of imports for every case."""

    def run(folder, work):
        fresh.main(folder, work)
        return json.loads((work / "report.json").read_text()) | {"needed": []}

    monkeypatch.setattr(verify, "_run", run)
