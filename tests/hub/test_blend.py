"""Interpolation of a trained model with another one of its shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_text_models import POSITIONS, WIDTHS, write_model
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel
from written_checkpoint import write_checkpoint

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import load_run
from m3i_scale.errors import ExportError
from m3i_scale.exports.blend import Blend
from m3i_scale.exports.export import export
from m3i_scale.exports.write import ExportContents
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.pretrained import start_weights
from m3i_scale.objective.text_config import text_identity

ZERO_SHOT = ExportContents("zero_shot")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Runs from CLIP and SigLIP whose weights have moved, with the model that each started from."""
    found = {}
    for kind, width in WIDTHS.items():
        root = tmp_path_factory.mktemp(kind)
        start = write_model(kind, root / "start")
        both = [f"{part}.from_pretrained={start}" for part in ("backbone", "text")]
        more = [] if width is None else [f"recipe.targets.0.width={width}"]
        run = load_run(f"continue_{kind}", [*both, f"text.max_tokens={POSITIONS}", *more])
        objective = build_objective(run, {}, 30)
        start_weights(objective, run)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        identity = {"backbone": backbone_config(run.backbone).to_diff_dict(), "text": text_identity(run.text)}
        checkpoint = root / "run" / "checkpoints" / "step-00000001"
        write_checkpoint(checkpoint, run, objective, 1, 30, start, {}, identity)
        found[kind] = (root / "run", start)
    return found


@pytest.mark.parametrize("kind", WIDTHS)
def test_every_weight_is_between_those_of_the_two_models(
    trained: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path, same_process: None
) -> None:
    run, start = trained[kind]
    files = {}
    for alpha in (None, 0.0, 0.25):
        out, blended = tmp_path / str(alpha), None if alpha is None else Blend(start, alpha)
        facts = export(run, out, wanted=ZERO_SHOT, blended=blended)
        assert facts["blend"] == (None if alpha is None else {"model": "start", "alpha": alpha})
        files[alpha] = load_file(out / "model.safetensors")
    other = load_file(start / "model.safetensors")
    for name, value in files[0.25].items():
        assert not torch.equal(files[None][name], other[name])
        torch.testing.assert_close(files[0.0][name], other[name], rtol=0, atol=1e-6)
        wanted = 0.25 * files[None][name] + 0.75 * other[name]
        if name != "logit_scale":  # CLIP's is limited after the blend
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert "0.25 + start × 0.75" in (tmp_path / "0.25" / "README.md").read_text()


def test_features_blend_with_a_vision_model(make_run, tmp_path: Path, same_process: None) -> None:
    run, _ = make_run(tmp_path / "run")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    stock = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6), add_pooling_layer=False)
    stock.save_pretrained(tmp_path / "other")
    with pytest.raises(ExportError, match=r"no weights for .* tensors of the export, e.g. text"):
        export(run, tmp_path / "text", blended=Blend(tmp_path / "other"))
    export(run, tmp_path / "own", wanted=ExportContents("backbone"))
    export(run, tmp_path / "blend", wanted=ExportContents("backbone"), blended=Blend(tmp_path / "other"))
    own, between = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "blend"))
    name = "layernorm.weight"
    torch.testing.assert_close(between[name], (own[name] + stock.layernorm.weight.detach()) / 2)


def test_another_shape_or_share_is_an_error(trained: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, start = trained["clip"]
    cases = {
        "alpha must be from 0 to 1": Blend(start, 1.5),
        "no such folder": Blend(tmp_path / "nowhere"),
        "model_type must be": Blend(trained["siglip"][1]),
    }
    for message, blended in cases.items():
        with pytest.raises(ExportError, match=message):
            export(run, tmp_path / "out", wanted=ZERO_SHOT, blended=blended)
        assert not (tmp_path / "out").exists()
