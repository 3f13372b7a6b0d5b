"""A tiny run with every kind of target, and a committed checkpoint of it as a ZeRO-2 run on two ranks writes it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from m3i_scale.config import RunConfig, parse_section, read_yaml, resource_folder
from m3i_scale.data.make import ShardOptions, make_shards
from m3i_scale.data.records import Record
from m3i_scale.hub import fresh
from m3i_scale.objective.build import build_objective, initialize_module, momentum_pairs
from m3i_scale.run.setup import run_yaml
from m3i_scale.scale.checkpoint.commit import begin, commit
from m3i_scale.scale.checkpoint.state import TAG

LABELS = ["warm-things", "cold-things", "green-things"]
_COLOURS = [(220, 60, 40), (40, 80, 220), (40, 200, 60)]


class Picture:
    """A noisy patch of one colour."""

    def __init__(self, label, seed):
        self.label, self.seed = label, seed

    def encoded(self):
        noise = np.random.default_rng(self.seed).integers(-40, 40, (40, 56, 3))
        pixels = np.clip(np.array(_COLOURS[self.label]) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue(), "png"


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
    make_shards(records, output, labels=LABELS, name="things", options=ShardOptions(multiple_of=2, vocabulary=200))
    return output


def small_run(shards, output_dir, backbone=None):
    values = read_yaml(resource_folder("recipes") / "m3i.yaml")
    values["recipe"]["decoders"]["pool"]["width"] = 32
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
        "data": {"sources": {"things": {"shards": str(shards / "train")}}},
    }
    return parse_section(RunConfig, values, where="test")


@pytest.fixture(scope="session")
def make_run(shards):
    """A run folder with committed checkpoints of the given steps; returns it and the objective of the last one."""

    def make(output_dir: Path, steps=(10,), vocab_size=None, backbone=None):
        run = small_run(shards, output_dir, backbone)
        tokenizer = shards / "tokenizer"
        vocab_size = vocab_size or len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
        for step in steps:
            torch.manual_seed(step)
            objective = build_objective(run, {"things": LABELS}, vocab_size)
            first_weights(objective)
            write_checkpoint(
                output_dir / "checkpoints" / f"step-{step:08d}", run, objective, step, vocab_size, tokenizer
            )
        return output_dir, objective

    return make


def first_weights(objective):
    for root in (objective.student.model, objective.text.model, objective.momentum.backbone.model):
        for module in root.modules():
            initialize_module(root, module)
    for module in objective.modules():
        initialize_module(module, module) if not hasattr(module, "config") else None


def write_checkpoint(final, run, objective, step, vocab_size, tokenizer):
    meta = {
        "step": step,
        "zero_stage": 2,
        "world_size": 2,
        "label_sets": {"things": LABELS},
        "vocab_size": vocab_size,
        "tokenizer": str(tokenizer),
    }
    folder = begin(final)
    for name in (TAG, "momentum"):
        (folder / name).mkdir()
    state = objective.state_dict()
    write_zero2(folder / TAG, {name: tensor for name, tensor in state.items() if not name.startswith("momentum.")})
    averaged = {name: tensor.flatten() for name, tensor in state.items() if name.startswith("momentum.")}
    save_file(averaged, folder / "momentum" / "rank-00000.safetensors")
    shapes = {name: list(state[name].shape) for name in averaged}
    (folder / "momentum" / "shapes.json").write_text(json.dumps(shapes))
    online = {target: name for name, target in momentum_pairs(objective)}
    (folder / "momentum" / "online.json").write_text(json.dumps(online))
    (folder / "run.yaml").write_text(run_yaml(run))
    (folder / "meta.json").write_text(json.dumps(meta))
    commit(final, folder, meta)


def write_zero2(folder, weights):
    """The files of DeepSpeed's ZeRO-2 on two ranks: one flat fp32 group, padded, cut in halves."""
    flat = torch.cat([tensor.float().flatten() for tensor in weights.values()])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: tensor.shape for name, tensor in weights.items()}],
        "shared_params": {},
        "ds_version": "0.18",
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank, half in enumerate(flat.chunk(2)):
        optimizer = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [half.clone()]}
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, file)


@pytest.fixture(scope="session")
def run_dir(make_run, tmp_path_factory):
    """A run with one checkpoint, with metrics, and its objective."""
    folder, objective = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    records = [
        {"kind": "run", "step": 0, "name": "tiny"},
        {"kind": "train", "step": 10, "loss": 1.25, "intra/loss": 0.5},
        {"kind": "train", "step": 20, "loss": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    return folder, objective.eval()


@pytest.fixture(scope="session")
def exported(run_dir, tmp_path_factory):
    """An export of the trained weights, and what `export` returned."""
    from m3i_scale.hub.export import export

    target = tmp_path_factory.mktemp("exports") / "tiny"
    return target, export(run_dir[0], target)


@pytest.fixture
def same_process(monkeypatch):
    """Load in the process of the test: what is found is the same, without seconds of imports for every case."""

    def run(folder, work):
        fresh.main(folder, work)
        return json.loads((work / "report.json").read_text()) | {"needed": []}

    monkeypatch.setattr("m3i_scale.hub.verify._run", run)
