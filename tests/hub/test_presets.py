"""Every preset of the stock families has every form of export, in its own widths and with one layer; nothing is run."""

import pytest
import torch

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import PRESETS
from m3i_scale.config import RunConfig, parse_section
from m3i_scale.errors import ExportError
from m3i_scale.exports.dual_encoder import zero_shot_part
from m3i_scale.exports.joint import backbone_part, classifier_part
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import check_complete
from m3i_scale.exports.write import ExportContents, plan_parts
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.recipe import parse_recipe

LABEL_SETS = {"things": ["a", "b", "c"]}
REGISTERS = [name for name in PRESETS if name.startswith(("dinov2-reg-", "dinov3"))]
SIGLIP = [name for name in PRESETS if name.startswith("siglip")]
STOCK = [name for name in PRESETS if name.startswith(("vit", "eva", "dinov2")) and name not in REGISTERS]


def source_of(preset, pool, tmp_path):
    recipe = {
        "name": "both",
        "family": "both",
        "inputs": [{"name": "x", "view": 1}],
        "decoders": {"pool": {"kind": pool}},
        "targets": [
            {"name": "text", "kind": "text", "width": 64},
            {"name": "category", "kind": "category"},
        ],
    }
    for target in recipe["targets"]:
        target |= {"inputs": ["x"], "decoder": "pool"}
    values = {
        "name": "preset",
        "output_dir": str(tmp_path),
        "recipe": recipe,
        "backbone": {"preset": preset, "config": {"num_hidden_layers": 1}},
        "text": {"config": {"num_hidden_layers": 1}},
        "data": {"datasets": {"things": {"path": str(tmp_path)}}},
    }
    run = parse_section(RunConfig, values, where="test")
    meta = {"label_sets": LABEL_SETS, "vocab_size": 100}
    return Source(tmp_path, run, parse_recipe(run.recipe), 1, meta, [])


@pytest.mark.parametrize("preset", REGISTERS)
def test_forms_that_have_registers_and_those_that_have_not(preset, tmp_path):
    source = source_of(preset, "class_token", tmp_path)
    for part in (*plan_parts(source, ExportContents(), None), zero_shot_part(source, 100)):
        check_complete(part)
    for form in (
        lambda: plan_parts(source, ExportContents(format="timm"), None),
        lambda: classifier_part(source, "things"),
        lambda: backbone_part(source),
    ):
        with pytest.raises(ExportError):
            form()


@pytest.mark.parametrize("preset", SIGLIP)
def test_forms_without_a_class_token(preset, tmp_path):
    """No other class pools by the mean of the patches and normalizes it."""
    source = source_of(preset, "mean_pool", tmp_path)
    for part in plan_parts(source, ExportContents(), None):
        check_complete(part)
    for form in (
        lambda: plan_parts(source, ExportContents(format="timm"), None),
        lambda: classifier_part(source, "things"),
        lambda: backbone_part(source),
        lambda: zero_shot_part(source, 100),
    ):
        with pytest.raises(ExportError):
            form()


@pytest.mark.parametrize("pool", ["class_token", "mean_pool"])
@pytest.mark.parametrize("preset", STOCK)
def test_every_form_of_a_preset(preset, pool, tmp_path):
    source = source_of(preset, pool, tmp_path)
    with torch.device("meta"):
        weights = build_objective(source.run, LABEL_SETS, 100).state_dict()
    parts = [
        *plan_parts(source, ExportContents(), None),
        *plan_parts(source, ExportContents(format="timm"), None),
        classifier_part(source, "things"),
        backbone_part(source),
        zero_shot_part(source, 100),
    ]
    assert [part.name for part in parts] == ["vision", "tokens", "classifier", "backbone", "zero_shot"]
    for part in parts:
        check_complete(part)
        state = part.model.state_dict()
        with torch.device("meta"):
            for name, made in part.tensors.items():
                sources = [weights[source] for source in made.sources]
                value = sources[0] if made.make is None else made.make(*sources)
                assert value.shape == state[name].shape, (part.name, name)
    assert backbone_config(source.run.backbone).hidden_size == parts[0].model.config.hidden_size
