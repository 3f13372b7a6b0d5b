"""RF-DETR of a run is the stock model: what fills it, which processor shows images to it, and what is none."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor

from m3i_scale.config import RunConfig
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.exports.reference import real_pictures
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import check_complete, value_of
from m3i_scale.exports.write import write_processor
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.tasks.detection.detector import Detector
from m3i_scale.tasks.detection.object_detector import detect

NAMES = ["disc", "square", "rhomb"]
SHAPE = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
BACKBONES = {
    "vit": {"preset": "vit-ti/16", "config": SHAPE | {"intermediate_size": 160}},
    "gated": {"preset": "dinov2-g/14", "config": SHAPE | {"mlp_ratio": 2}},
}
HEAD = {"kind": "rfdetr", "channels": 32, "queries": 8, "groups": 2, "decoder_layers": 2, "decoder_width": 64}


def source_of(backbone, stretch=True, **head):
    values = {
        "task": {"kind": "detection", "head": HEAD | head},
        "backbone": BACKBONES[backbone],
        "data": {"augment": {"stretch": stretch, "mean": [0.5, 0.4, 0.3]}},
    }
    run = RunConfig.model_validate(values)
    return Source(Path("no checkpoint"), run, parse_recipe(run.recipe), 0, {"label_sets": {"set": NAMES}}, [])


def objective_of(source):
    objective = build_objective(source.run, source.label_sets, None)
    initialize_sharded(objective, initialize_module, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return objective.eval()


def export(source):
    return source.recipe.targets[0].export(source)


@pytest.mark.parametrize(("backbone", "masks"), [("vit", False), ("gated", True)])
def test_the_stock_model_and_processor_find_what_was_trained(tmp_path, backbone, masks):
    source = source_of(backbone, masks=masks)
    objective, part = objective_of(source), export(source)
    check_complete(part)
    weights = objective.state_dict()
    kind = type(part.model)
    assert kind.__name__ == ("RfDetrForInstanceSegmentation" if masks else "RfDetrForObjectDetection")
    part.model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert list(config.id2label.values()) == NAMES
    model = kind(config).eval()
    model.load_state_dict({name: value_of(made, weights, torch.float32) for name, made in part.tensors.items()})
    write_processor(tmp_path, source, part.resize)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = real_pictures(64)["large"].crop((0, 0, 128, 96))
    augment = source.run.data.augment
    detector = Detector(partial(detect, objective), augment, 64, NAMES, "vit", torch.device("cpu"))
    (found,) = detector([np.asarray(picture).transpose(2, 0, 1)])
    with torch.no_grad():
        output = model(**processor(picture, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(output, 0, [picture.size[::-1]], top_k=24)
    width, height = picture.size
    clipped = wanted["boxes"].clamp(min=0).minimum(torch.tensor([width, height] * 2))
    there = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
    assert 0 < int(there.sum()) == len(found["scores"])
    torch.testing.assert_close(torch.from_numpy(found["scores"]), wanted["scores"][there], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found["boxes"]) / width, clipped[there] / width, rtol=0, atol=1e-5)
    assert found["labels"].tolist() == wanted["labels"][there].tolist()
    assert (found["masks"] is not None) == masks


def test_images_that_keep_their_shape_are_what_no_stock_processor_shows():
    with pytest.raises(ExportError) as caught:
        export(source_of("vit", stretch=False))
    assert str(caught.value.where).startswith("data.augment.stretch")


def test_layers_that_the_backbone_does_not_have_are_told_of():
    with pytest.raises(ConfigError) as caught:
        export(source_of("vit", out_layers=[3, 6, 9, 12]))
    assert caught.value.where == "task.head.out_layers"


def test_what_an_export_of_features_says_holds_how_images_are_shown():
    from m3i_scale.exports.write import portable_run

    told = json.loads(json.dumps(portable_run(source_of("vit").run)))
    assert told["data"]["augment"]["stretch"] is True
