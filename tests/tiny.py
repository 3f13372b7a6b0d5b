"""Models of 64 channels and two layers on images of 32 pixels, and batches for them."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from typing import Any

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from m3i_scale.config import RunConfig, known_recipes, load_run
from m3i_scale.data.batch import Batch, no_objects
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.objective.build import build_objective, ema_pairs, initialize_module
from m3i_scale.objective.information import Objective
from m3i_scale.objective.teacher import FrozenStart

SMALL_BUCKETS = {
    "reduce_bucket_size": 4_096,
    "stage3_prefetch_bucket_size": 3_686,
    "stage3_max_live_parameters": 65_536,
    "stage3_max_reuse_distance": 65_536,
    "sub_group_size": 32_768,
}
"""So small that even these models are gathered, released, reduced and updated in parts."""
LABEL_SETS = {"shapes": ["disc", "square", "cross"], "colors": ["red", "blue"]}
VOCABULARY = 50
TEACHERS = "M3I_TEST_TEACHERS"
GRID = (4, 4)
SMALL_VIEWS = 10

_SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    **{"image_size": 32, "patch_size": 8},
}
_BACKBONE = ("backbone.preset=vit-ti/16", f"backbone.config={_SIZES}")
_TEXT = (
    "text.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}",
    "text.max_tokens=16",
)
MAPS = (
    "backbone.preset=internimage-h",
    "backbone.config={channels: 16, depths: [1, 1, 2, 1], groups: [1, 2, 4, 8], level2_post_norm_block_ids: [1], "
    "fusion_width: 64, image_size: 64}",
    "backbone.weight_init=default",
    "backbone.freeze=[]",
)
"""A convolutional backbone with every part that the largest ones have; on images of 64 pixels, which is two cells."""
DINOV2 = (
    "backbone.preset=dinov2-b/14",
    "backbone.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2, image_size: 32, "
    "patch_size: 8}",
)
REGISTERS = ("backbone.preset=dinov2-reg-b/14", DINOV2[1])
DINOV3 = (
    "backbone.preset=dinov3-s+/16",
    "backbone.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 96, "
    "image_size: 32, patch_size: 8}",
    "backbone.freeze=[]",
)
SIGLIP = ("backbone.preset=siglip-b/16",)
SIM_PARTS = (
    "recipe.ema.projector=transformer",
    "recipe.decoders.dense={kind: siamese, depth: 2, heads: 2}",
    "backbone.weight_init=xavier_uniform",
    "backbone.freeze=[position_embeddings, patch_embeddings]",
    "optim.decay_tokens=true",
)
"""The parts of SIM as published, for a recipe with dense targets."""
RECIPES = tuple(known_recipes())
MULTI_CROP = (
    "recipe.views=[{count: 2}, {count: 2, size: 16}]",
    "recipe.inputs=[{name: small, view: 3, views: 2}, "
    "{name: large, view: 1, views: 2, mask: {form: block, ratio: [0.2, 0.6], masked: mask_token, share: 0.5}}]",
    *(f"recipe.targets.{number}.{field}" for number in (0, 1) for field in ("inputs=[large, small]", "pairs=other")),
)
"""Of `global_distillation`: two views, in part mask tokens, and two small ones predict the two."""


LAYER_NORM = (
    "recipe.ema={start: 0.995, end: 1.0}",
    "recipe.decoders.dense={kind: transformer, width: 32, heads: 2, depth: 1}",
)
"""Of `sim`: without batch norm over tokens."""


def in_parts(ds_config: str) -> dict[str, Any]:
    """A built-in DeepSpeed file with small buckets."""
    raw = load_ds_config(ds_config)
    zero = raw["zero_optimization"]
    return raw | {"zero_optimization": zero | {key: value for key, value in SMALL_BUCKETS.items() if key in zero}}


TEACHER_WIDTHS = {"teacher": 48, "dinov2": 48, "clip": 40, "siglip": 32}
FEATURE_WIDTHS = TEACHER_WIDTHS | {"clip": 24}
"""Of image features: those of CLIP are projected."""


@functools.cache
def tiny_teacher(name: str = "teacher") -> str:
    """A folder with a stock vision model: DINOv2, which sees the student's patches, CLIP with its texts and half their
    side, SigLIP without class token and twice their side; ranks take those of their parent."""
    if TEACHERS not in os.environ:
        root = tempfile.mkdtemp(prefix="m3i-teachers-")
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):  # what a test draws does not depend on whether it is the first to ask
            for teacher in TEACHER_WIDTHS:
                _make_teacher(teacher, f"{root}/{teacher}")
            torch.manual_seed(12)
            ViTModel(ViTConfig(**_SIZES), add_pooling_layer=False).save_pretrained(f"{root}/start")
        os.environ[TEACHERS] = root
    return f"{os.environ[TEACHERS]}/{name}"


def tiny_start() -> str:
    """A folder with weights of the tiny backbone, to start from."""
    return tiny_teacher("start")


def _make_teacher(name: str, folder: str) -> None:
    width = TEACHER_WIDTHS[name]
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    torch.manual_seed(11)
    if name == "clip":
        texts = {**sizes, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
        images = {**sizes, "image_size": 16, "patch_size": 4, "hidden_act": "gelu"}
        projected = FEATURE_WIDTHS[name]
        CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=projected)).save_pretrained(folder)
    elif name == "siglip":
        SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64, patch_size=16)).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8, mlp_ratio=2)).save_pretrained(folder)
    BitImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(folder)


@functools.cache
def tiny_overrides(recipe: str) -> list[str]:
    """The built-in recipe of that name with narrow decoders, heads and towers."""
    run = load_run(recipe)
    raw, found = run.recipe, [*_BACKBONE]
    if run.backbone.from_pretrained is not None:
        found += ["backbone.preset=null", f"backbone.from_pretrained={tiny_start()}"]
    if run.text.from_pretrained is not None:
        kind = "siglip_text_model" if "siglip" in run.text.from_pretrained else "clip_text_model"
        found += ["text.from_pretrained=null", f"text.model_type={kind}"]
    for name, decoder in raw["decoders"].items():
        if decoder["kind"] in ("transformer", "cross_attention", "causal_transformer"):
            found += [f"recipe.decoders.{name}.{field}" for field in ("width=32", "heads=2", "depth=1")]
        elif decoder["kind"] == "siamese":
            found += [f"recipe.decoders.{name}.{field}" for field in ("heads=2", "depth=1")]
        elif decoder["kind"] == "attention_pool":
            found.append(f"recipe.decoders.{name}.width=64")
    for name, head in raw.get("heads", {}).items():
        small = {"hidden": 48, "width": 24, "prototypes": 12, "predictor_hidden": 40}
        found += [f"recipe.heads.{name}.{field}={value}" for field, value in small.items() if head.get(field)]
    for number, target in enumerate(raw["targets"]):
        if target["kind"] == "text":
            found += [*_TEXT, *([f"recipe.targets.{number}.width=32"] if target.get("width", 512) else [])]
        if "layers" in target:
            found.append(f"recipe.targets.{number}.layers=2")
        if "clusters" in target:
            found.append(f"recipe.targets.{number}.clusters=12")
        if "size" in target.get("regularizer", ()):
            found.append(f"recipe.targets.{number}.regularizer.size=20")
        if target.get("encoder") == "teacher" and "head" in target:
            found.append(f"recipe.heads.{target['head']}.width={FEATURE_WIDTHS[target['teacher']]}")
    found += [f"recipe.views.{number}.size=16" for number, view in enumerate(raw.get("views", [])) if "size" in view]
    others = [name for name, spec in raw.get("teachers", {}).items() if spec["from_pretrained"] != "student"]
    found += [f"recipe.teachers.{name}.from_pretrained={tiny_teacher(name)}" for name in others]
    return found


def tiny_run(recipe: str, *overrides: str) -> RunConfig:
    return load_run(recipe, [*tiny_overrides(recipe), "optim.micro_batch_size=4", *overrides])


def tiny_objective(recipe: str, *overrides: str, seed: int = 0) -> Objective:
    """Initialized, in fp32; the EMA teacher holds the first weights of the backbone."""
    run = tiny_run(recipe, *overrides)
    objective = build_objective(run, LABEL_SETS, VOCABULARY if "text" in run.model_fields_set else None)
    first_weights(objective, seed, run.backbone.weight_init)
    return objective


def first_weights(objective: Objective, seed: int, weight_init: str = "default") -> None:
    """Those that a run would start from."""
    initialize = functools.partial(initialize_module, weight_init=weight_init)
    initialize_sharded(objective, initialize, seed=seed, skip=("momentum.", "teachers."))
    for teacher in objective.teachers.values():
        plan = teacher.plan()
        values = dict(zip(plan.names, plan.tensors(), strict=True))
        filled = [teacher.get_submodule(teacher.prefix.rstrip("."))]
        filled += [objective.student.model] if isinstance(teacher, FrozenStart) else []
        for model in filled:
            model.load_state_dict(values, strict=False)
    named = dict(objective.named_parameters())
    with torch.no_grad():
        for online, target in ema_pairs(objective):
            named[target].copy_(named[online])


def random_batch(
    size: int,
    *,
    seed: int = 0,
    views: int = 2,
    text: bool = True,
    labels: bool = True,
    repeated_caption: bool = True,
    image: int = 32,
) -> Batch:
    """Noise images with geometry, and small views behind them, which most recipes have no use for; every third sample
    lacks a caption, every fourth a category. Sample 6 repeats the caption of sample 1, so that among eight samples on
    two ranks the repetition lies on the other rank."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(size)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    has_text = (number % 3 != 2) if text else torch.zeros(size, dtype=torch.bool)
    has_label = (number % 4 != 3) if labels else torch.zeros(size, dtype=torch.bool)
    sets = torch.where(has_label, number % 2, -1)
    lengths = torch.randint(2, 9, (size,), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]) & has_text[:, None]
    mask[:, 0] = True
    captions = torch.where(has_text, number * 7919 + 1, 0)
    ids = torch.randint(5, VOCABULARY, (size, 8), generator=generator) * mask
    if size > 6 and repeated_caption:
        for column in (captions, ids, mask):
            column[6] = column[1]
    images = torch.randint(0, 256, (views, size, 3, image, image), generator=generator, dtype=torch.uint8)
    corners = torch.cat([uniform(0, 20, views, size, 2), uniform(20, 40, views, size, 2)], dim=-1)
    flips = torch.rand(views, size, generator=generator) < 0.5
    of_small = torch.Generator().manual_seed(seed)
    return Batch(
        images_VBCHW=images,
        small_VBCHW=torch.randint(
            0, 256, (SMALL_VIEWS, size, 3, image // 2, image // 2), generator=of_small, dtype=torch.uint8
        ),
        crops_VB4=torch.cat([corners, torch.rand(SMALL_VIEWS, size, 4, generator=of_small) * 20 + 1]),
        flips_VB=torch.cat([flips, torch.zeros(SMALL_VIEWS, size, dtype=torch.bool)]),
        sizes_B2=torch.full((size, 2), 64.0),
        labels_B=torch.where(has_label, number % 2, -1),
        label_sets_B=sets,
        text_ids_BT=ids,
        text_mask_BT=mask,
        has_text_B=has_text,
        captions_B=captions,
        seeds_B=torch.randint(0, 2**62, (size,), generator=generator),
        masks_BHW=torch.empty(size, 0, 0, dtype=torch.uint8),
        **no_objects(size),
        keys=[f"k{int(n)}" for n in number],
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start … stop−1 of a batch."""
    fields = {name: value[:, start:stop] if "_VB" in name else value[start:stop] for name, value in vars(batch).items()}
    return Batch(**fields)
