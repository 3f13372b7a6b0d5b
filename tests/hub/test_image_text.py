"""CLIP and SigLIP: a run starts from the complete model, trains its loss, and exports the stock model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import Forks
from image_text_models import CAPTIONS, POSITIONS, WIDTHS, stock_logits, tokens, write_model
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import load_file
from tiny import random_batch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel
from written_checkpoint import write_checkpoint

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.evaluation.features import load_vision
from m3i_scale.evaluation.towers import load_objective, towers_of
from m3i_scale.exports.dual_encoder import zero_shot_part, zero_shot_warnings
from m3i_scale.exports.export import export
from m3i_scale.exports.source import find_source
from m3i_scale.exports.write import ExportContents
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.pretrained import MAP_HEAD, start_weights
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.text_config import read_text_config, text_identity, with_token_ids

KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("image-text")
    return {kind: write_model(kind, root / kind) for kind in KINDS}


def run_of(kind: str, folder: Path, *overrides: str) -> RunConfig:
    both = [f"{part}.from_pretrained={folder}" for part in ("backbone", "text")]
    width = [] if WIDTHS[kind] is None else [f"recipe.targets.0.width={WIDTHS[kind]}"]
    return load_run(f"continue_{kind}", [*both, f"text.max_tokens={POSITIONS}", *width, *overrides])


def started(run: RunConfig) -> Objective:
    objective = build_objective(run, {}, 30)
    start_weights(objective, run)
    return objective.eval()


def images(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def logits(objective: Objective, pixels_BCHW: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    images_BE, scale, bias = objective.heads["text"](objective.pooled("pool", pixels_BCHW))
    texts_TE = objective.embed_text(inputs["input_ids"], inputs["attention_mask"].bool())
    return scale * images_BE @ texts_TE.T + (0.0 if bias is None else bias)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_start_is_the_complete_model(folders: dict[str, Path], kind: str) -> None:
    objective = started(run_of(kind, folders[kind]))
    pixels_BCHW = objective.pixel_norm(images())
    wanted = stock_logits(kind, folders[kind], pixels_BCHW)
    found = logits(objective, pixels_BCHW, tokens(folders[kind], False))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def save(folder: Path, run: RunConfig, objective: Objective, tokenizer: Path) -> None:
    """Write a checkpoint."""
    identity = {"backbone": backbone_config(run.backbone).to_diff_dict(), "text": text_identity(run.text)}
    checkpoint = folder / "checkpoints" / "step-00000001"
    write_checkpoint(checkpoint, run, objective, 1, 30, tokenizer, {}, identity)


@torch.no_grad()
def test_published_siglip_2_names_no_padding_token(folders: dict[str, Path], tmp_path: Path) -> None:
    """`SiglipTextConfig` then has 1, and the tokenizer has 0."""
    folder = shutil.copytree(folders["siglip"], tmp_path / "siglip2")
    config = json.loads((folder / "config.json").read_text())
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        del config["text_config"][key]
    (folder / "config.json").write_text(json.dumps(config))
    run = run_of("siglip", folder)
    run = run.model_copy(update={"text": with_token_ids(run.text, find_tokenizer({}, str(folder)))})
    objective = started(run)
    pixels_BCHW = objective.pixel_norm(images())
    found = logits(objective, pixels_BCHW, tokens(folder, False))
    torch.testing.assert_close(found, stock_logits("siglip", folder, pixels_BCHW), rtol=1e-5, atol=1e-6)
    assert text_identity(run.text)["pad_token_id"] == 0


def test_a_padding_token_that_the_configuration_names_must_be_the_tokenizers(folders: dict[str, Path]) -> None:
    tokenizer = find_tokenizer({}, str(folders["siglip"]))
    text = run_of("siglip", folders["siglip"]).text
    assert with_token_ids(text, tokenizer) == text
    tokenizer.pad_token = "<unk>"
    with pytest.raises(ConfigError, match="pad_token_id of the tokenizer must be 0"):
        with_token_ids(text, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_export_before_training_is_the_stock_model(
    folders: dict[str, Path], kind: str, tmp_path: Path, same_process: None
) -> None:
    """Also if the folder of the start has moved since."""
    run = run_of(kind, folders[kind])
    run = run.model_copy(update={"output_dir": tmp_path / "run"})
    objective = started(run)
    save(tmp_path / "run", run, objective, folders[kind])
    moved = folders[kind].rename(tmp_path / "moved")
    read_text_config.cache_clear()
    (tmp_path / "run" / "tokenizer").symlink_to(moved)
    facts = export(tmp_path / "run", tmp_path / "out", wanted=ExportContents("zero_shot"))
    moved.rename(folders[kind])
    assert facts["verified"]["classes"]["zero_shot"] == {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    assert "VisionTextDualEncoderModel" not in (tmp_path / "out" / "README.md").read_text()
    pixels_BCHW = objective.pixel_norm(images())
    wanted = stock_logits(kind, folders[kind], pixels_BCHW)
    found = stock_logits(kind, tmp_path / "out", pixels_BCHW)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", folders[kind]))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0 if name != "logit_bias" else 1e-6)


def test_a_zero_shot_export_is_not_evaluated_and_its_export_does_not_offer_it(
    folders: dict[str, Path], forks: Forks, shards: Path, tmp_path: Path
) -> None:
    run = run_of("clip", folders["clip"])
    save(tmp_path / "run", run, started(run), folders["clip"])
    out, data = str(tmp_path / "out"), ["--data", str(shards / "val")]
    done = forks.run("export", str(tmp_path / "run"), "--task", "zero_shot", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "m3i-scale evaluate" not in done.stdout
    assert "zero-shot-image-classification" in done.stdout
    embedded = ["embed", out, *data, "--output", str(tmp_path / "features.npz")]
    for command in (["evaluate", out, *data], embedded, ["compare", out, out, "--data", str(shards)]):
        refused = forks.run(*command)
        assert refused.returncode == 2
        assert "zero-shot" in refused.stderr
        assert "--task features" in refused.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_shot_export_is_no_vision_model(folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(ExportError) as caught:
        load_vision(folders[kind], "mean", torch.device("cpu"))
    assert "zero-shot" in caught.value.what
    assert "--task features" in (caught.value.fix or "")


def captioned(inputs: dict[str, Tensor]) -> Batch:
    """Four images with the captions of `CAPTIONS`."""
    fields = {"text_ids_BT": inputs["input_ids"], "text_mask_BT": inputs["attention_mask"].bool()}
    return replace(random_batch(4), **fields, has_text_B=torch.ones(4, dtype=torch.bool), captions_B=torch.arange(1, 5))


def stock_gradients(kind: str, model: Any) -> dict[str, Tensor]:
    """Gradients of a stock model under the names of the objective."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.startswith("vision_model.head."):
            ours = MAP_HEAD[name.removeprefix("vision_model.head.")]
            shares = gradient.chunk(len(ours))
            found |= {f"decoders.pool.{part}": share for part, share in zip(ours, shares, strict=True)}
            continue
        for theirs, here in (
            ("vision_model.", "student.model."),
            ("text_model.", "text.model."),
            ("visual_projection.", "heads.text.projection."),
            ("text_projection.", "text.projection."),
            ("logit_scale", "heads.text.log_scale"),
            ("logit_bias", "heads.text.bias"),
        ):
            if name.startswith(theirs):
                found[here + name.removeprefix(theirs)] = gradient.reshape(-1) if "logit" in name else gradient
                break
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_published_loss_with_its_gradients(folders: dict[str, Path], kind: str) -> None:
    run = run_of(kind, folders[kind])
    recipe = run.recipe | {"targets": run.recipe["targets"][:1], "teachers": {}}
    recipe["decoders"] = {"pool": recipe["decoders"]["pool"]}
    objective = started(run.model_copy(update={"recipe": recipe}))
    inputs = tokens(folders[kind], False)
    batch = captioned(inputs)
    loss, _ = objective(batch)
    loss.backward()
    model = AutoModel.from_pretrained(folders[kind])
    if kind == "clip":
        pixels_BCHW = objective.pixel_norm(batch.view(1))
        wanted = model(pixel_values=pixels_BCHW, return_loss=True, **inputs).loss
        output = model(pixel_values=pixels_BCHW, **inputs)
        again = ClipLoss()(output.image_embeds, output.text_embeds, model.logit_scale.exp())
        torch.testing.assert_close(wanted, again, rtol=1e-6, atol=1e-6)
    else:
        padded = {"input_ids": tokens(folders[kind], True)["input_ids"]}
        output = model(pixel_values=objective.pixel_norm(batch.view(1)), **padded)
        wanted = SigLipLoss()(output.image_embeds, output.text_embeds, model.logit_scale.exp(), model.logit_bias)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    gradients = stock_gradients(kind, model)
    named = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    assert gradients.keys() == named.keys()
    for name, parameter in named.items():
        limit = 1e-6 * max(1.0, float(gradients[name].abs().max()))
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=limit, msg=name)


def test_a_frozen_text_encoder_gets_no_gradient_and_the_rest_does(folders: dict[str, Path]) -> None:
    objective = started(run_of("clip", folders["clip"], "text.freeze=true"))
    loss, _ = objective(captioned(tokens(folders["clip"], False)))
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.text.parameters())
    assert all(parameter.grad is not None for parameter in objective.student.parameters())


@torch.no_grad()
def test_a_pretrained_bert_is_read_at_its_first_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stock = BertModel(BertConfig(vocab_size=30, **sizes), add_pooling_layer=True).eval()
    stock.save_pretrained(tmp_path)
    small = "backbone.config={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}"
    objective = started(load_run("clip", [f"text.from_pretrained={tmp_path}", small, "recipe.targets.0.width=16"]))
    ids_TL, mask_TL = torch.randint(4, 30, (3, 6)), torch.ones(3, 6, dtype=torch.bool)
    mask_TL[1, 3:] = False
    first_TD = stock(input_ids=ids_TL, attention_mask=mask_TL).last_hidden_state[:, 0]
    wanted = F.normalize(first_TD @ objective.text.projection.weight.T, dim=-1)
    torch.testing.assert_close(objective.embed_text(ids_TL, mask_TL), wanted, rtol=1e-5, atol=1e-6)


def test_token_ids_are_those_of_the_tokenizer(folders: dict[str, Path]) -> None:
    tokenizer = find_tokenizer({}, str(folders["clip"]))
    for recipe, key, value in (("clip_text_model", "eos_token_id", 3), ("siglip_text_model", "pad_token_id", 0)):
        text = load_run("clip", [f"text.model_type={recipe}"]).text
        assert with_token_ids(text, tokenizer).config[key] == value
    assert with_token_ids(load_run("clip", []).text, tokenizer).config == {}
    of_siglip = run_of("siglip", folders["siglip"], f"text.tokenizer={folders['clip']}").text
    assert with_token_ids(of_siglip, tokenizer) == of_siglip
    tokenizer.pad_token = "<unk>"
    with pytest.raises(ConfigError) as caught:
        with_token_ids(of_siglip, tokenizer)
    assert "pad_token_id" in caught.value.what
    assert caught.value.where == "text.tokenizer"


def write_end_token(folder: Path, number: int) -> None:
    """Give `z`, the highest id, and the end token each other's ids if `number` is 29, and name token 2 in config.json,
    as published CLIP models do."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["model"]["vocab"] |= {"<eos>": number, "z": 32 - number}
    next(token for token in parts["added_tokens"] if token["content"] == "<eos>")["id"] = number
    parts["post_processor"]["special_tokens"]["<eos>"]["ids"] = [number]
    (folder / "tokenizer.json").write_text(json.dumps(parts))


@pytest.mark.parametrize("number", [3, 29])
def test_an_end_token_that_transformers_looks_for_by_its_id_must_be_the_highest(
    folders: dict[str, Path], number: int, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    write_end_token(folder, number)
    text, tokenizer = run_of("clip", folder).text, find_tokenizer({}, str(folder))
    assert tokenizer("a")["input_ids"][-1] == number
    if number == 29:
        assert with_token_ids(text, tokenizer) == text
        return
    with pytest.raises(ConfigError) as caught:
        with_token_ids(text, tokenizer)
    assert str(folder) in (caught.value.where or "")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("kind", "overrides", "where"),
    [
        ("clip", ["recipe.targets.0.width=48"], "text.from_pretrained"),
        ("siglip", ["recipe.targets.0.width=48"], "text.from_pretrained"),
        ("siglip", ["text.max_tokens=10"], "text.max_tokens"),
        ("clip", ["text.max_tokens=20"], "text.max_tokens"),
        ("clip", ["text.config={hidden_size: 64}"], "text.config"),
        ("clip", ["text.from_pretrained=/nothing/there"], "text.from_pretrained"),
    ],
)
def test_what_does_not_fit_the_pretrained_encoder_is_an_error(
    folders: dict[str, Path], kind: str, overrides: list[str], where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objective(run_of(kind, folders[kind], *overrides), {}, 30)
    assert where in (caught.value.where or "")
    assert caught.value.fix


@pytest.mark.parametrize(
    "overrides",
    [["text.model_type=bert"], ["text.from_pretrained=null", "text.freeze=true"]],
    ids=["model_type", "freeze"],
)
def test_a_setting_without_effect_is_an_error(folders: dict[str, Path], overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        run_of("clip", folders["clip"], *overrides)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_hold_the_text_encoder_and_evaluate_in_the_joint_space(
    folders: dict[str, Path], kind: str, tmp_path: Path, same_process: None
) -> None:
    run = run_of(kind, folders[kind])
    objective = started(run)
    save(tmp_path, run, objective, folders[kind])
    export(tmp_path, tmp_path / "out")
    loaded, of_export, _ = load_objective(tmp_path / "out", torch.device("cpu"))
    towers = towers_of(loaded, of_export, tmp_path / "out", torch.device("cpu"))
    inputs = tokens(folders[kind], False)
    wanted = objective.embed_text(inputs["input_ids"], inputs["attention_mask"].bool())
    torch.testing.assert_close(torch.from_numpy(towers.texts(list(CAPTIONS))), wanted, rtol=1e-5, atol=1e-6)
    images_BCHW = images()
    torch.testing.assert_close(towers.images(images_BCHW), objective.embed_images(images_BCHW, "text"))


@torch.no_grad()
def test_one_model_is_recognized_however_its_folder_is_written(folders: dict[str, Path]) -> None:
    run = run_of("clip", folders["clip"], f"text.from_pretrained={folders['clip']}/")
    head = started(run).heads["text"].projection.weight
    torch.testing.assert_close(head, load_file(folders["clip"] / "model.safetensors")["visual_projection.weight"])


def test_dropout_of_a_frozen_text_encoder_is_off(folders: dict[str, Path]) -> None:
    run = run_of("clip", folders["clip"], "text.freeze=true", "text.config={attention_dropout: 0.5}")
    assert not started(run).train().text.training
    assert started(run_of("clip", folders["clip"])).text.model.config.attention_dropout == 0.0


@torch.no_grad()
def test_other_parts_start_random_and_are_named(folders: dict[str, Path]) -> None:
    """A recipe that pools in another way has no use for CLIP's projection of images."""
    from m3i_scale.objective.pretrained import pretrained_plans

    run = run_of("clip", folders["clip"], "recipe.decoders.pool.kind=mean_pool")
    objective = build_objective(run, {}, 30)
    plans = {part: open_plan() for part, _, open_plan in pretrained_plans(objective, run)}
    assert "heads.text.projection.weight" in plans["heads"].report["fresh"]
    assert plans["heads"].names == ["text.projection.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pooling_without_zero_shot_export_is_a_warning(folders: dict[str, Path], kind: str) -> None:
    for overrides, count in (([], 0), (["recipe.decoders.pool.kind=mean_pool"], 1)):
        run = run_of(kind, folders[kind], *overrides)
        assert len(zero_shot_warnings(run, parse_recipe(run.recipe), 30)) == count
    trained = ["text.from_pretrained=null", "text.max_tokens=77"]
    run = run_of(kind, folders[kind], "recipe.decoders.pool.kind=mean_pool", *trained)
    assert zero_shot_warnings(run, parse_recipe(run.recipe), 30) == []


def test_mixed_parts_have_no_stock_model(folders: dict[str, Path], tmp_path: Path) -> None:
    run = run_of("siglip", folders["siglip"], "recipe.targets.0.distribution={kind: boltzmann}")
    save(tmp_path, run, started(run), folders["siglip"])
    with pytest.raises(ExportError) as caught:
        zero_shot_part(find_source(tmp_path), 30)
    assert "siglip_text_model" in caught.value.what
    assert "bernoulli" in (caught.value.why or "")
