"""Plan the loading of a run's pretrained weights: backbone, text encoder, and what joins the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from m3i_scale.backbones.build import backbone_config, backbone_source, draw_first_values
from m3i_scale.backbones.load_plan import LoadPlan, Take, plan_load, plan_model
from m3i_scale.backbones.sources import Source, pretrained_folder
from m3i_scale.backbones.sources.files import read_headers, weight_files
from m3i_scale.backbones.sources.hub import hub_places
from m3i_scale.config import RunConfig
from m3i_scale.objective.build import ema_pairs, initialize_module
from m3i_scale.objective.decoders import ClassToken, MapHead
from m3i_scale.objective.information import EMA_PREFIX, TEACHERS_PREFIX, Objective
from m3i_scale.objective.targets.text import Text, TextHead
from m3i_scale.objective.teacher import Teacher
from m3i_scale.objective.text_config import read_text_config
from m3i_scale.objective.text_tower import text_family

Plan = tuple[str, str, Callable[[], LoadPlan]]
"""Part of the model (backbone, text, heads or teachers), prefix of its parameters, and the plan to load it."""

MAP_HEAD = {
    "probe": ("probe",),
    "attention.in_proj_weight": ("query.weight", "key.weight", "value.weight"),
    "attention.in_proj_bias": ("query.bias", "key.bias", "value.bias"),
    "attention.out_proj.weight": ("output.weight",),
    "attention.out_proj.bias": ("output.bias",),
    "layernorm.weight": ("norm.weight",),
    "layernorm.bias": ("norm.bias",),
    "mlp.fc1.weight": ("fc1.weight",),
    "mlp.fc1.bias": ("fc1.bias",),
    "mlp.fc2.weight": ("fc2.weight",),
    "mlp.fc2.bias": ("fc2.bias",),
}
"""Parameters of `MapHead` by the name in SigLIP's pooling head; several divide one tensor equally."""


def pretrained_plans(objective: Objective, run: RunConfig) -> Iterator[Plan]:
    """Yield what a run loads before training, in order. No weights are read."""
    if run.backbone.from_pretrained is not None:
        yield (
            "backbone",
            "student.model.",
            lambda: plan_load(backbone_source(run.backbone), backbone_config(run.backbone)),
        )
    if run.text.from_pretrained is not None and objective.text is not None:
        yield "text", "text.model.", lambda: plan_text(run)
        yield "heads", "", lambda: _plan_heads(objective, run)
    for name, teacher in objective.teachers.items():
        frozen = cast(Teacher, teacher)
        yield "teachers", f"{TEACHERS_PREFIX}{name}.{frozen.prefix}", frozen.plan


def start_weights(objective: Objective, run: RunConfig) -> None:
    """Load the initial weights of a run: random values from `run.seed`, then pretrained weights. The EMA teacher starts
    as a copy of the student. For unpartitioned parameters."""
    initialize = partial(initialize_module, weight_init=run.backbone.weight_init)
    draw_first_values(objective, initialize, seed=run.seed, skip=(EMA_PREFIX, TEACHERS_PREFIX))
    named = dict(objective.named_parameters())
    with torch.no_grad():
        for _, prefix, open_plan in pretrained_plans(objective, run):
            plan = open_plan()
            for name, value in zip(plan.names, plan.tensors(), strict=True):
                named[prefix + name].copy_(value)
        for online, ema in ema_pairs(objective):
            named[ema].copy_(named[online])


def plan_text(run: RunConfig) -> LoadPlan:
    """Match the tensors of `text.from_pretrained` with the parameters of the text encoder. Reads headers only."""
    config = read_text_config(str(run.text.from_pretrained))
    family = text_family(config)
    with torch.device("meta"):
        model = family.model_class(config, **family.options)
    return plan_model(_source(run, config), model, "text.from_pretrained", all_placed=False)


def _source(run: RunConfig, config: Any) -> Source:
    given = str(run.text.from_pretrained)
    return Source(given, "transformers", pretrained_folder(given, "text.from_pretrained"), config, hub_places)


def _plan_heads(objective: Objective, run: RunConfig) -> LoadPlan:
    """Match projections, pooling head, temperature and bias, as far as the recipe has the same parts. All but the text
    projection are loaded only if both encoders come from one model."""
    text = cast(nn.Module, objective.text)
    source = _source(run, cast(Any, text).model.config)
    where = "text.from_pretrained"
    files = weight_files(source.folder, source.kind, where)
    headers = read_headers(files, where)
    places: dict[str, tuple[str, ...]] = {"text_projection.weight": ("text.projection.weight",)}
    offsets: dict[str, float] = {}
    if _one_model(run):
        for target in (item for item in objective.recipe.targets if isinstance(item, Text)):
            more = _places_of(objective, target)
            places |= more
            head = cast(TextHead, objective.heads[target.name])
            offsets[f"heads.{target.name}.bias"] = -(head.first_bias or 0.0)
    wanted = [name for name, _ in objective.named_parameters()]
    takes = [
        Take(name, _share(shape, len(names)), path, tensor, part, len(names), offset=offsets.get(name, 0.0))
        for tensor, names in places.items()
        for path, shape in [headers.get(tensor, (None, ()))]
        for part, name in enumerate(names)
        if path is not None and name in wanted
    ]
    taken = {take.name for take in takes}
    prefixes = tuple(
        f"{part}.{name}."
        for target in objective.recipe.targets
        if isinstance(target, Text)
        for part, name in (("heads", target.name), ("decoders", target.decoder))
    )
    fresh = [name for name in wanted if name.startswith((*prefixes, "text.projection.")) and name not in taken]
    order = {path: number for number, path in enumerate(files)}
    takes.sort(key=lambda take: order[cast(Path, take.file)])
    report = {
        "source": source.given,
        "kind": source.kind,
        "files": [path.name for path in files],
        "loaded": len(takes),
        "parameters": sum(math.prod(take.shape) for take in takes),
        "renamed": {tensor: list(names) for tensor, names in places.items() if taken.issuperset(names)},
        "fresh": fresh,
    }
    return LoadPlan(takes, report | {key: {} for key in ("resized", "constants", "left_out", "assumed")}, where, source)


def _one_model(run: RunConfig) -> bool:
    """Return whether both encoders come from the same folder, however it is written."""
    vision = run.backbone.from_pretrained
    if vision is None or run.text.from_pretrained is None:
        return False
    folders = [pretrained_folder(source, "from_pretrained").resolve() for source in (vision, run.text.from_pretrained)]
    return folders[0] == folders[1]


def _share(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Return the shape of one of equal parts of a tensor. Partitioned parameters do not have it."""
    return (shape[0] // parts, *shape[1:]) if shape else (1,)


def _places_of(objective: Objective, target: Text) -> dict[str, tuple[str, ...]]:
    """Return the parameters of a text target by the name of their tensor in a CLIP or SigLIP model; empty if the recipe
    pools or projects in another way."""
    decoder, head = objective.decoders[target.decoder], f"heads.{target.name}."
    scale: dict[str, tuple[str, ...]] = {"logit_scale": (head + "log_scale",), "logit_bias": (head + "bias",)}
    family = cast(Any, objective.student).family.name
    if family == "CLIP" and isinstance(decoder, ClassToken) and decoder.blocks == 1 and not decoder.mean:
        return {**scale, "visual_projection.weight": (head + "projection.weight",)}
    if family == "SigLIP" and isinstance(decoder, MapHead) and target.width is None:
        pool = f"decoders.{target.decoder}."
        return {
            **scale,
            **{f"vision_model.head.{theirs}": tuple(pool + name for name in ours) for theirs, ours in MAP_HEAD.items()},
        }
    return {}
