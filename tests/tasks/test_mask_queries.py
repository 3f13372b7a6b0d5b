"""Queries in a backbone's last layers compute what the stock EoMT does, and are trained, exported and measured."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forked import Forks
from launch import start_ranks
from masked import SCENE_CLASSES, scene, write_shards
from PIL import Image
from pydantic import ValidationError
from shapes import metrics
from tiny import first_weights, in_parts, random_batch
from torch import Tensor
from transformers import EomtForUniversalSegmentation, pipeline

from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import value_of
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.flops import step_flop
from m3i_scale.tasks.segmentation.mask_queries import mask_share
from m3i_scale.tasks.segmentation.pixel_heads import segment

pytestmark = pytest.mark.slow

CLASSES = ["sky", "sea", "sand", "stone", "ship"]
SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"preset": "vit-ti/16", "config": SHAPE | {"intermediate_size": 128}},
    "dinov2": {"preset": "dinov2-s/14", "config": SHAPE | {"mlp_ratio": 2}},
    "clip": {"preset": "clip-b/16", "config": SHAPE | {"intermediate_size": 128}},
}
HEAD = {"kind": "eomt", "queries": 7, "blocks": 2, "points": 200}


def run_of(backbone: dict[str, Any], **head: Any) -> RunConfig:
    task = {"kind": "segmentation", "head": HEAD | head}
    return RunConfig.model_validate({"task": task, "backbone": backbone})


def objective_of(run: RunConfig) -> Objective:
    objective = build_objective(run, {"scenes": CLASSES}, None)
    first_weights(objective, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))
    return objective


def batch_of(size: int, seed: int = 0) -> Batch:
    masks = torch.randint(0, len(CLASSES), (size, 4, 4), generator=torch.Generator().manual_seed(seed))
    masks_BHW = masks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).to(torch.uint8)
    masks_BHW[:, :8] = NO_CLASS
    return replace(random_batch(size, views=1, image=32), masks_BHW=masks_BHW)


def stock(objective: Objective, run: RunConfig) -> EomtForUniversalSegmentation:
    """`transformers`' model with the same weights."""
    source = Source(Path("no checkpoint"), run, parse_recipe(run.recipe), 0, {"label_sets": {"scenes": CLASSES}}, [])
    part = source.recipe.targets[0].export(source)
    weights = objective.state_dict()
    model = EomtForUniversalSegmentation(part.model.config)
    model.load_state_dict({name: value_of(made, weights, torch.float32) for name, made in part.tensors.items()})
    return model


@pytest.mark.parametrize("backbone", ["vit", "dinov2"])
def test_it_is_that_of_transformers_in_predictions_scores_and_loss(backbone: str) -> None:
    run = run_of(BACKBONES[backbone])
    objective = objective_of(run)
    theirs, batch = stock(objective, run).eval(), batch_of(3)
    pixels = objective.pixel_norm(batch.images_VBCHW[0])
    objective.eval()
    with torch.no_grad():
        output = theirs(pixels)
        scores = segment(objective, pixels)
    assert output.masks_queries_logits.std() > 0.1
    masks = torch.nn.functional.interpolate(output.masks_queries_logits, size=(32, 32), mode="bilinear")
    classes = output.class_queries_logits.softmax(dim=-1)[..., :-1]
    torch.testing.assert_close(scores, torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid()))
    truth = batch.masks_BHW.long()
    labels = [one[one != NO_CLASS].unique() for one in truth]
    wanted = [(one == present[:, None, None]).float() for one, present in zip(truth, labels, strict=True)]
    theirs.train().attn_mask_probs.fill_(1.0)
    losses = []
    for compute in (
        lambda: theirs(pixels, mask_labels=wanted, class_labels=labels).loss,
        lambda: objective.train()(batch)[0],
    ):
        torch.manual_seed(3)  # of the points of masks
        losses.append(compute())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(
        objective.heads["segmentation"].query.weight.grad, theirs.query.weight.grad, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns_and_an_evaluation_repeats_itself(backbone: str) -> None:
    objective = objective_of(run_of(BACKBONES[backbone]))
    objective(batch_of(2))[0].backward()
    assert not [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    objective.eval()
    before = torch.random.get_rng_state()
    losses = [objective(batch_of(2))[0].item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert objective.outputs["segmentation"]["overlaps_3K"].shape == (3, len(CLASSES))


def test_images_without_a_class_count_for_nothing() -> None:
    objective = objective_of(run_of(BACKBONES["vit"], mask_weight=0, dice_weight=0)).eval()  # no points are drawn for
    batch = batch_of(2)
    empty = batch.masks_BHW.clone()
    empty[1] = NO_CLASS
    one = replace(batch, images_VBCHW=batch.images_VBCHW[:, :1], masks_BHW=batch.masks_BHW[:1], keys=batch.keys[:1])
    loss, figures = objective(replace(batch, masks_BHW=empty))
    assert figures["segmentation/count"] == 1
    alone = replace(
        one, **{name: getattr(batch, name)[:1] for name in ("labels_B", "label_sets_B", "seeds_B", "has_text_B")}
    )
    assert loss.item() == pytest.approx(objective(alone)[0].item(), rel=1e-5)
    nothing = replace(batch, masks_BHW=torch.full_like(empty, NO_CLASS))
    assert objective(nothing)[0].item() == 0.0


class Halves:
    """One rank of two, both of which have the same."""

    rank, world_size = 0, 2

    def sum(self, x: Tensor) -> Tensor:
        return 2 * x.detach()


def test_means_are_those_of_all_ranks() -> None:
    """Where the other rank has as many masks, a rank's loss is that of its own; where it has more, less of that."""
    run = run_of(BACKBONES["vit"])
    objective, batch = objective_of(run).eval(), batch_of(2)
    alone = objective(batch)[0].item()
    objective.ranks = Halves()  # type: ignore[assignment]
    assert objective(batch)[0].item() == pytest.approx(alone, rel=1e-6)


def test_masks_of_attention_go_block_by_block() -> None:
    steps = [[mask_share(number / 6, block, 4) for block in range(4)] for number in range(7)]
    assert steps[0] == steps[1] == [1.0] * 4
    for number in range(2, 6):
        assert steps[number] == [0.0] * (number - 1) + [1.0] * (5 - number)
    assert steps[6] == [0.0] * 4
    assert mask_share(1.5 / 6, 0, 4) == pytest.approx(0.5**0.9)


def test_its_work_is_counted_without_values() -> None:
    run = run_of(BACKBONES["dinov2"])
    flop = step_flop(run, {"scenes": CLASSES}, None)
    assert flop["backward"] > 1.5 * flop["forward"] > 0


@pytest.mark.parametrize(
    ("head", "backbone", "where"),
    [
        ({"blocks": 5}, BACKBONES["vit"], "task.head.blocks"),
        ({}, {"preset": "internimage-t", "config": {"image_size": 64}}, "task.head.kind: eomt"),
    ],
)
def test_what_it_cannot_be_is_refused(head: dict[str, Any], backbone: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_objective(run_of(backbone, **head), {"scenes": CLASSES}, None)
    assert caught.value.where == where
    with pytest.raises(ValidationError):
        run_of(BACKBONES["vit"], class_weight=0, mask_weight=0, dice_weight=0)
    with pytest.raises(ValidationError):
        run_of(BACKBONES["vit"], dropout=0.1)


def test_what_no_stock_class_computes_is_not_exported() -> None:
    for backbone in (BACKBONES["clip"], {"preset": "vit-ti/16", "config": SHAPE | {"intermediate_size": 96}}):
        run = run_of(backbone)
        with pytest.raises(ExportError):
            stock(objective_of(run), run)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_shards(root / "train", [scene(number) for number in range(48)], SCENE_CLASSES)
    write_shards(root / "val", [scene(1000 + number) for number in range(16)], SCENE_CLASSES)
    return root


@pytest.mark.parametrize("ds_config", ["zero3_cpu_fp32", pytest.param("zero2_bf16", marks=pytest.mark.bench)])
def test_it_trains_on_two_ranks_and_becomes_a_stock_segmenter(
    shards: Path, forks: Forks, tmp_path: Path, ds_config: str
) -> None:
    (tmp_path / "in_parts.json").write_text(json.dumps(in_parts(ds_config)))
    run = {
        "name": "queries",
        "output_dir": str(tmp_path / "out"),
        "task": {"kind": "segmentation", "head": HEAD, "layer_decay": 0.8},
        "backbone": BACKBONES["dinov2"],
        "data": {
            "datasets": {"scenes": {"path": str(shards / "train")}},
            "validation": {"val": {"path": str(shards / "val")}},
            "streams": 4,
            "augment": {"color_jitter_p": 0.0, "grayscale": 0.0, "crop_scale": [0.6, 1.0]},
        },
        "optim": {"batch_size": 8, "micro_batch_size": 4, "steps": 8, "warmup_steps": 2, "lr": 1e-3},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"every_steps": 8, "batches": 2},
        "log": {"every_steps": 1, "progress": False},
        "deepspeed": str(tmp_path / "in_parts.json"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    job = start_ranks(["-m", "m3i_scale", "train", str(path)], 2, tmp_path / "logs")
    assert job.wait() == [0, 0], job.text()[-4000:]
    whole, checkpoints = metrics(path), tmp_path / "out" / "checkpoints"
    assert whole[8]["loss"] < whole[1]["loss"]
    if ds_config == "zero3_cpu_fp32":  # masks of attention and points of the loss are drawn as in the whole run
        weights = dict(saved_weights(checkpoints / "step-00000008", "student"))
        rmtree(checkpoints / "step-00000008")
        job = start_ranks(["-m", "m3i_scale", "train", str(path)], 2, tmp_path / "again")
        assert job.wait() == [0, 0], job.text()[-4000:]
        assert metrics(path) == whole
        again = dict(saved_weights(checkpoints / "step-00000008", "student"))
        assert [name for name, value in weights.items() if not torch.equal(value, again[name])] == []
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if line["kind"] == "evaluation"][-1]
    folder = tmp_path / "segmenter"
    done = forks.run("export", str(tmp_path / "out"), "--output", str(folder), "--task", "segmentation")
    assert done.returncode == 0, done.stderr
    done = forks.run("evaluate", str(folder), "--data", str(shards / "val"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measures"]["segmenter"]
    assert found["mIoU"]["value"] == pytest.approx(evaluated["evaluation/segmentation/miou"], abs=0.02)
    assert "subtask" in (folder / "README.md").read_text()
    picture = Image.open(io.BytesIO(scene(1)["png"])).resize((48, 40))
    segments = pipeline("image-segmentation", str(folder))(picture, subtask="semantic")
    covered = sum(np.asarray(segment["mask"]) > 0 for segment in segments)
    assert covered.shape == (40, 48)
    assert (covered == 1).all()
