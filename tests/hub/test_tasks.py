"""Classifiers, dual encoders, backbones of detectors and timm folders: for every stock backbone, what was trained."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_export_backbones import BACKBONES
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)
from weights import started

from m3i_scale.config import RunConfig, parse_section
from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import ExportError
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.features import load_vision
from m3i_scale.evaluation.samples import open_table, read_samples
from m3i_scale.exports import export as export_module
from m3i_scale.exports.export import export
from m3i_scale.exports.reference import real_pictures
from m3i_scale.exports.write import ExportContents, plan_parts

RUNS = {"vit": None, **BACKBONES}
POOLED = ("vit", "dinov2")


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    """Runs of every backbone, and with a class token in place of the mean; made when first asked for."""
    made = {}

    def run(kind, pool="mean_pool"):
        if (kind, pool) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{pool}") / "run"
            made[kind, pool] = make_run(folder, backbone=RUNS[kind], pool=pool)
            made[kind, pool][1].eval()
        return made[kind, pool]

    return run


def norms_at_random(objective):
    """First weights of a norm are 1 and 0: two in a row would be one."""
    with torch.no_grad():
        for norm in (objective.student.model.layernorm, objective.decoders["pool"].norm):
            norm.weight.normal_()
            norm.bias.normal_()


def pixels_of(objective):
    side = objective.student.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    return images, objective.pixel_norm(images)


def test_the_classifier_of_mae_and_sim(make_run, shards, tmp_path, same_process):
    """The mean of tokens before the final norm: the export is timm's classifier with fc_norm and no norm."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    values = {
        "output_dir": str(tmp_path / "run"),
        "task": {"kind": "classification", "pool": "mean_pool", "final_norm": False},
        "backbone": {"config": shape | {"image_size": 32, "patch_size": 8}},
        "data": {"datasets": {"things": {"path": str(shards / "train")}}},
    }
    run = parse_section(RunConfig, values, where="test")
    folder, objective = make_run(tmp_path / "run", run=run, train=norms_at_random)
    objective.eval()
    export(folder, tmp_path / "out", wanted=ExportContents("classification"))
    images, pixels = pixels_of(objective)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert not [name for name, _ in model.named_parameters() if name.startswith("timm_model.norm.")]
    with torch.no_grad():
        tokens = objective.student.encode_whole(pixels, norm=False)[1]
        wanted = objective.heads["category"](objective.decoders["pool"](tokens))[0]
        torch.testing.assert_close(objective.embed_images(images, "category"), wanted)
        torch.testing.assert_close(model(pixels).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "pool", "loads_as"),
    [
        ("vit", "mean_pool", "TimmWrapperForImageClassification"),
        ("vit", "class_token", "ViTForImageClassification"),
        ("dinov2", "mean_pool", "TimmWrapperForImageClassification"),
        ("dinov2", "class_token", "Dinov2ForImageClassification"),
        ("internimage", "mean_pool", "InternImageForImageClassification"),
    ],
)
def test_classifier(runs, tmp_path, same_process, kind, pool, loads_as):
    folder, objective = runs(kind, pool)
    result = export(folder, tmp_path / "out", wanted=ExportContents("classification"))
    assert result["verified"]["classes"]["classifier"] == loads_as
    images, pixels = pixels_of(objective)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(pixels).logits, objective.embed_images(images, "category"), atol=1e-5, rtol=1e-4
        )
    assert model.config.id2label == {0: "warm-things", 1: "cold-things", 2: "green-things"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "@inproceedings{su2023m3i" in card


@pytest.mark.parametrize(
    ("kind", "pool"), [("vit", "mean_pool"), ("vit", "class_token"), ("dinov2", "mean_pool"), ("clip", "class_token")]
)
def test_dual_encoder_in_the_pipeline(runs, tmp_path, same_process, kind, pool):
    folder, objective = runs(kind, pool)
    export(folder, tmp_path / "out", wanted=ExportContents("zero_shot"))
    assert "VisionTextDualEncoderModel` is not supported" in (tmp_path / "out" / "README.md").read_text()
    classify = pipeline("zero-shot-image-classification", str(tmp_path / "out"))
    labels = ["thing number 3", "cold things", "green"]
    picture = real_pictures(objective.student.image_size)["square"]
    found = classify(picture, candidate_labels=labels, hypothesis_template="{}")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size, 3).permute(2, 0, 1)
    tokens = classify.tokenizer(labels, padding=True, return_tensors="pt")
    texts = objective.embed_text(tokens["input_ids"], tokens["attention_mask"].bool())
    with torch.no_grad():
        scale = objective.heads["text"].log_scale.exp().clamp(max=100)
        wanted = (scale * objective.embed_images(pixels[None], "text") @ texts.T).softmax(dim=-1)[0]
    by_label = {item["label"]: item["score"] for item in found}
    torch.testing.assert_close(torch.tensor([by_label[label] for label in labels]), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", POOLED)
def test_backbone_of_a_detector(runs, tmp_path, same_process, monkeypatch, kind):
    """`AutoBackbone` asks the Hub for the name before it reads a folder."""
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda self, name, **kwargs: True)
    folder, objective = runs(kind)
    export(folder, tmp_path / "out", wanted=ExportContents("backbone"))
    _, pixels = pixels_of(objective)
    model = AutoBackbone.from_pretrained(str(tmp_path / "out"), out_indices=[1, -1]).eval()
    with torch.no_grad():
        first, last = model(pixels).feature_maps
        wanted = objective.student.encode_whole(pixels)[1].transpose(1, 2).unflatten(2, (4, 4))
    assert first.shape == (2, 32, 4, 4)
    torch.testing.assert_close(last, wanted, atol=1e-5, rtol=1e-4)


def test_a_vit_whose_mlp_is_no_multiple_of_its_width_becomes_a_backbone(make_run, tmp_path, same_process):
    backbone = {
        "config": {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 72},
            **{"image_size": 32, "patch_size": 8},
        }
    }
    folder, _ = make_run(tmp_path / "run", backbone=backbone)
    result = export(folder, tmp_path / "out", wanted=ExportContents("backbone"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_ratio"] == 3
    assert result["verified"]["largest_output_difference"]["backbone"] < 1e-4


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_timm_features(runs, tmp_path, same_process, kind):
    folder, objective = runs(kind)
    export(folder, tmp_path / "out", wanted=ExportContents("features", "timm"))
    _, pixels = pixels_of(objective)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        wanted = torch.cat(objective.student.encode_whole(pixels), dim=1)
        torch.testing.assert_close(model.forward_features(pixels), wanted, atol=1e-5, rtol=1e-4)
    assert model.pretrained_cfg["mean"] == pytest.approx(objective.pixel_norm.mean_C.tolist())


@pytest.mark.parametrize(
    ("kind", "pool"),
    [("vit", "mean_pool"), ("vit", "class_token"), ("dinov2", "mean_pool"), ("internimage", "mean_pool")],
)
def test_a_classifier_is_evaluated_and_trained_further(runs, shards, tmp_path, same_process, kind, pool):
    """Its head's top-1 is that of the trained head, its features are the backbone's, and a run starts from them."""
    folder, objective = runs(kind, pool)
    export(folder, tmp_path / "out", wanted=ExportContents("classification"))
    found = evaluate(tmp_path / "out", str(shards / "val"), train_data=str(shards / "train"), measures=("classifier",))
    table = open_table(str(shards / "val"), "--data")
    size = objective.student.image_size
    read = list(read_samples(table, CenterCrop(size, size)))
    images = torch.from_numpy(np.stack([sample.pixels for sample in read]))
    right = objective.embed_images(images, "category").argmax(dim=1) == torch.tensor(table.labels)
    assert found["measures"]["classifier"]["top-1"]["value"] == pytest.approx(right.float().mean().item())
    pixels = objective.pixel_norm(images)
    with torch.no_grad():
        patches = objective.student.encode_whole(pixels)[1]
        if kind != "internimage":  # its features are another map than its dense tokens
            vision = load_vision(tmp_path / "out", "mean", torch.device("cpu"))
            torch.testing.assert_close(vision.encode(images)[0], patches.mean(dim=1), atol=1e-5, rtol=1e-4)
        further = started(tmp_path / "out", **({"fusion_width": 64} if kind == "internimage" else {}))
        torch.testing.assert_close(further.encode_whole(pixels)[1], patches, atol=1e-5, rtol=1e-4)


def test_timm_classifier(runs, tmp_path, same_process):
    folder, objective = runs("dinov2")
    result = export(folder, tmp_path / "out", wanted=ExportContents("classification", "timm"))
    assert set(result["verified"]["largest_output_difference"]) == {"classifier", "classifier.timm"}
    images, pixels = pixels_of(objective)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), objective.embed_images(images, "category"), atol=1e-5, rtol=1e-4)
    assert model.pretrained_cfg["label_names"][0] == "warm-things"


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        ("clip", ExportContents("classification"), "norms have ε = 1e-05"),
        ("clip", ExportContents("backbone"), "a clip_vision_model cannot be exported for AutoBackbone"),
        ("internimage", ExportContents("zero_shot"), "no Transformers class computes a dual encoder"),
        ("internimage", ExportContents("features", "timm"), "internimage is not written in timm"),
        ("vit", ExportContents("zero_shot", "timm"), "features or a classifier"),
        ("vit", ExportContents("features", "timm", max_shard_size="1MB"), "reads one file"),
        ("vit", ExportContents("features", label_set="things"), "has no effect"),
        ("vit", ExportContents("classification", label_set="thing"), "unknown label set 'thing'"),
        ("vit", ExportContents("classify"), "unknown task 'classify'"),
        ("vit", ExportContents("features", "tim"), "unknown format 'tim'"),
        ("vit", ExportContents("zero_shot", "open_clip"), "unknown format 'open_clip'"),
        ("vit", ExportContents(max_shard_size="big"), "got 'big'"),
    ],
)
def test_what_cannot_be_is_refused(runs, tmp_path, kind, wanted, message):
    with pytest.raises(ExportError, match=message):
        export(runs(kind)[0], tmp_path / "out", wanted=wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_custom_target_without_an_export_is_an_error():
    custom = SimpleNamespace(modality="mask", title="a custom target")
    with pytest.raises(ExportError) as caught:
        plan_parts(SimpleNamespace(recipe=SimpleNamespace(targets=[custom])), ExportContents("segmentation"), None)
    assert "--task features" in str(caught.value.fix)


def test_several_label_sets_are_named(make_run, tmp_path, same_process):
    sets = {"things": ["a", "b", "c"], "colors": ["red", "blue"]}
    folder, objective = make_run(tmp_path / "run", label_sets=sets)
    with pytest.raises(ExportError) as caught:
        export(folder, tmp_path / "out", wanted=ExportContents("classification"))
    assert caught.value.where == "--label-set"
    assert "things, colors" in caught.value.fix
    export(folder, tmp_path / "out", wanted=ExportContents("classification", label_set="colors"))
    images, pixels = pixels_of(objective)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted = objective.embed_images(images, "category")[:, 3:]
        torch.testing.assert_close(model(pixels).logits, wanted, atol=1e-5, rtol=1e-4)
    assert model.config.id2label == {0: "red", 1: "blue"}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "internimage"])
def test_shards_and_their_index(runs, tmp_path, same_process, kind):
    folder, objective = runs(kind)
    export(folder, tmp_path / "out", wanted=ExportContents(max_shard_size="20KB"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model = AutoModel.from_pretrained(tmp_path / "out", **({"add_pooling_layer": False} if kind == "vit" else {}))
    trained = objective.student.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_weights_are_read_one_at_a_time(runs, tmp_path, monkeypatch, same_process):
    """A mapping that hands out one tensor at a time is enough, and the folder needs each of them once."""
    from m3i_scale.exports import source as source_module

    load, reads = source_module.saved_weights, []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

        def items(self):
            raise AssertionError("all at once")

        values = items

    monkeypatch.setattr(source_module, "saved_weights", lambda *args: Lazy(dict(load(*args))))
    export(runs("vit")[0], tmp_path / "out", wanted=ExportContents("classification"))
    assert max(reads.count(name) for name in reads if name.startswith("student.model.")) == 2  # written, and run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.new_zeros(0), "has no elements"),
        (lambda tensor: torch.full_like(tensor, torch.nan), "non-finite"),
        (lambda tensor: tensor.half(), "must be float32, got float16"),
        (lambda tensor: tensor[:1], "does not fill a ViTModel"),
        (torch.zeros_like, "all values"),
        (None, "same values"),
    ],
)
def test_a_tensor_that_no_training_leaves(runs, tmp_path, monkeypatch, change, message):
    from m3i_scale.exports import source as source_module

    load = source_module.saved_weights
    name, other = (f"student.model.layers.{layer}.mlp.fc1.weight" for layer in (0, 1))

    def changed(*args):
        weights = dict(load(*args))
        return weights | {name: weights[other] if change is None else change(weights[name])}

    monkeypatch.setattr(source_module, "saved_weights", changed)
    with pytest.raises(ExportError, match=message):
        export(runs("vit")[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_onnx(runs, tmp_path):
    """Real processes: one that translates, and one without transformers that runs what was written."""
    folder, objective = runs("vit", "class_token")
    result = export(folder, tmp_path / "out", wanted=ExportContents("classification", "onnx"))
    assert result["verified"]["programs"].keys() == {"onnx"}
    images, pixels = pixels_of(objective)
    wanted = objective.embed_images(images, "category")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-4)


def test_formats_whose_extra_is_not_installed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    for extra in ("onnx", "timm"):
        with pytest.raises(ExportError) as caught:
            export(tmp_path / "no run", tmp_path / "out", wanted=ExportContents("features", extra))
        assert f".[{extra}]" in caught.value.fix


ALONE = """
import sys
from transformers import pipeline
from PIL import Image
try:
    import m3i_scale
except ImportError:
    print(pipeline("image-classification", sys.argv[1])(Image.open(sys.argv[2]), top_k=1)[0]["label"])
"""


def test_a_classifier_where_the_package_is_not_importable(runs, tmp_path):
    export(runs("vit", "class_token")[0], tmp_path / "out", wanted=ExportContents("classification"), dtype="bfloat16")
    real_pictures(32)["large"].save(tmp_path / "photo.png")
    code = f"import sys; sys.modules['m3i_scale'] = None\n{ALONE}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out", tmp_path / "photo.png"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.stdout.split()[-1] in ("warm-things", "cold-things", "green-things")
    assert Image.open(tmp_path / "photo.png").size == (64, 64)
