"""Build the modules of a run file's recipe, and give them their first weights."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.presets import VisionConfig
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.balance import GroupWeights
from m3i_scale.objective.decoders import ClassTokenSpec, width_of
from m3i_scale.objective.encoders import MomentumTarget, Projector, TextTower, text_config
from m3i_scale.objective.heads import ImageHead
from m3i_scale.objective.information import Objective
from m3i_scale.objective.positions import grid_position
from m3i_scale.objective.ranks import Ranks, SingleProcess
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.targets.base import HeadTarget, Sizes
from m3i_scale.objective.targets.text import Text
from m3i_scale.objective.teacher import build_teacher, teacher_config


def build_objective(
    run: RunConfig,
    label_sets: dict[str, list[str]],
    vocab_size: int | None,
    ranks: Ranks | None = None,
    *,
    target_encoders: bool = True,
    image_counts: list[int] | None = None,
) -> Objective:
    """Build all modules of a run's recipe, not yet initialised (see `initialize_module`).

    Args:
        run: the run file.
        label_sets: class names by label set, in the order of `Batch.label_sets_B`.
        vocab_size: of the tokenizer; only read when the recipe has a text target.
        ranks: other ranks for losses over the global batch; default: none.
        target_encoders: build the momentum copy, the teacher and what predicts it, memories and balanced weights, which
            only training needs.
        image_counts: in how many images for training a category is; which only a federated loss needs.

    Raises:
        ConfigError: the recipe, the backbone and the data do not fit together.
    """
    recipe = parse_recipe(run.recipe)
    config = backbone_config(run.backbone)
    student = build_backbone(config)
    if run.task is not None and run.task.freeze:
        student.requires_grad_(False)
    _check_fit(run, recipe, student, label_sets, vocab_size)
    decoders = nn.ModuleDict({name: _decoder(recipe, name, config) for name in recipe.decoders})
    classes = [len(names) for names in label_sets.values()]
    ranks = ranks or SingleProcess()
    heads = _target_heads(recipe, decoders, student, classes, ranks, target_encoders, image_counts)
    weights = [target.weight for target in recipe.targets]
    momentum = teacher = text = None
    depth = recipe.momentum.projector_depth if recipe.momentum is not None and recipe.projects_dense_targets else 0
    if recipe.momentum is not None and target_encoders:
        momentum = MomentumTarget(build_backbone(config), depth, *_averaged(recipe, decoders, config, ranks))
    if run.task is not None and run.task.ema is not None and target_encoders:
        pools = nn.ModuleDict({name: _decoder(recipe, name, config) for name in recipe.decoders})
        averaged = _target_heads(recipe, decoders, student, classes, ranks, target_encoders)
        momentum = MomentumTarget(build_backbone(config), 0, pools, nn.ModuleDict(), averaged)
    projector = Projector(config.hidden_size, depth) if depth else None
    if recipe.teacher is not None and target_encoders:
        teacher = build_teacher(recipe, config)
    if recipe.uses_text and vocab_size is not None:
        kernel = run.backbone.attention_kernel
        tower = text_config(run.text.config, vocab_size, run.text.max_tokens, kernel)
        text = TextTower(tower, next(iter(_text_widths(recipe))))
    return Objective(
        recipe,
        student,
        decoders,
        heads,
        mean=run.data.augment.mean,
        std=run.data.augment.std,
        mixed_attention=run.backbone.attention == "mixed",
        ranks=ranks,
        weights=recipe.balance.module(weights, **dict(recipe.balance)) if target_encoders else GroupWeights(weights),
        image_heads=_image_heads(recipe, decoders, ranks),
        states=_memories(recipe) if target_encoders else None,
        projector=projector,
        momentum=momentum,
        teacher=teacher,
        text=text,
    )


def inference_names(run: RunConfig, label_sets: dict[str, list[str]], vocab_size: int | None) -> set[str]:
    """Return the names of the tensors of an objective without target encoders; arguments as of `build_objective`."""
    with torch.device("meta"):
        return set(build_objective(run, label_sets, vocab_size, target_encoders=False).state_dict())


def _check_fit(
    run: RunConfig, recipe: Recipe, student: Backbone, label_sets: dict[str, list[str]], vocab_size: int | None
) -> None:
    if run.backbone.attention == "mixed" and recipe.mix is None:
        raise ConfigError("`attention: mixed` has no effect: the recipe mixes no images", where="backbone.attention")
    if recipe.labels_file is not None and not label_sets:
        raise ConfigError(
            f"the recipe predicts classes, and no source has {recipe.labels_file}",
            fix="put it, a list of class names, beside the shards of masks"
            if recipe.reads_masks
            else "give labels to `shards make`, or take a recipe without a category target",
        )
    if recipe.uses_text and vocab_size is None:
        raise ConfigError(
            "the recipe has a text target, and there is no tokenizer", fix="text.tokenizer=/path/to/folder"
        )
    if recipe.mix is not None and run.optim.micro_batch_size < len(recipe.mix.inputs):
        raise ConfigError(
            f"a mix of {len(recipe.mix.inputs)} images needs a micro-batch of at least as many",
            where=f"optim.micro_batch_size: {run.optim.micro_batch_size}",
        )
    widths = _text_widths(recipe)
    if len(widths) > 1:
        raise ConfigError(f"text targets share one tower, so they need one width; got {sorted(widths)}", where="recipe")
    first_is_cls = [
        target.name for target in recipe.targets if isinstance(recipe.decoders[target.decoder], ClassTokenSpec)
    ]
    if first_is_cls and not student.has_class_token:
        raise ConfigError(
            f"this backbone has no class token, and '{first_is_cls[0]}' reads it",
            where="recipe.decoders",
            fix="decode with attention_pool or mean_pool",
        )
    if recipe.mix is not None and run.backbone.attention == "own" and not student.own_attention:
        raise ConfigError(
            "a convolutional backbone cannot keep the images of a mix apart",
            where="backbone.attention: own",
            fix="backbone.attention=mixed",
        )
    if run.backbone.attention == "mixed" and first_is_cls:
        raise ConfigError(
            f"in mixed attention one class token stands for all images of a mix; '{first_is_cls[0]}' reads it",
            fix="decode with attention_pool or mean_pool",
        )
    cells = (student.grid[0] // student.cell) ** 2
    masked = [spec.name for spec in recipe.inputs if spec.mask is not None]
    if masked and cells < 2:
        raise ConfigError(
            f"input '{masked[0]}' hides a part of {cells} patch of {student.cell * student.patch_size} pixels",
            where="backbone.config",
            why="what is hidden in part needs at least two patches",
            fix="a larger image_size",
        )
    if recipe.mix is not None and cells < len(recipe.mix.inputs):
        raise ConfigError(
            f"{cells} patches cannot be dealt to {len(recipe.mix.inputs)} images", where="backbone.config"
        )


def _text_widths(recipe: Recipe) -> set[int]:
    return {target.width for target in recipe.targets if isinstance(target, Text)}


def _decoder(recipe: Recipe, name: str, config: VisionConfig) -> nn.Module:
    try:
        return recipe.decoders[name].build(config)
    except ValueError as error:
        raise ConfigError(f"decoder '{name}': {error}", where=f"recipe.decoders.{name}") from None


def _target_heads(
    recipe: Recipe,
    decoders: nn.ModuleDict,
    student: Backbone,
    classes: list[int],
    ranks: Ranks,
    target_encoders: bool,
    image_counts: list[int] | None = None,
) -> nn.ModuleDict:
    """Return the targets' own heads, by target."""
    heads = nn.ModuleDict()
    config = student.model.config
    encoded = {}
    if recipe.teacher is not None and target_encoders:
        encoded["teacher"] = int(teacher_config(recipe.teacher.from_pretrained).hidden_size)
    for target in recipe.targets:
        if isinstance(target, HeadTarget) or (target.encoder == "teacher" and not target_encoders):
            continue
        sizes = Sizes(
            decoded=width_of(decoders[target.decoder]),
            encoded=encoded.get(target.encoder, config.hidden_size),
            pixels=config.patch_size**2 * config.num_channels,
            classes=classes,
            backbone=student,
            ranks=ranks,
            image_counts=image_counts,
        )
        heads[target.name] = target.build_head(sizes)
    return heads


def _image_heads(recipe: Recipe, decoders: nn.ModuleDict, ranks: Ranks) -> nn.ModuleDict:
    heads = nn.ModuleDict()
    for name, spec in recipe.heads.items():
        widths = {width_of(decoders[target.decoder]) for target in recipe.head_targets if target.head == name}
        if len(widths) > 1:
            raise ConfigError(
                f"head '{name}' is fed by decoders of widths {sorted(widths)}", where=f"recipe.heads.{name}"
            )
        heads[name] = ImageHead(widths.pop(), spec, ranks, online=True, prototypes=spec.prototypes > 0)
    return heads


def _memories(recipe: Recipe) -> nn.ModuleDict:
    """Return what heads remember: targets that share one remember alike."""
    first = {name: next(target for target in recipe.head_targets if target.head == name) for name in recipe.heads}
    return nn.ModuleDict({name: first[name].build_memory(spec) for name, spec in recipe.heads.items()})


def _averaged(
    recipe: Recipe, decoders: nn.ModuleDict, config: VisionConfig, ranks: Ranks
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Return copies of the pools and heads of momentum targets."""
    pools, heads = nn.ModuleDict(), nn.ModuleDict()
    for target in recipe.head_targets:
        if target.encoder != "momentum":
            continue
        if not target.dense:
            pools[target.decoder] = _decoder(recipe, target.decoder, config)
        width, spec = width_of(decoders[target.decoder]), recipe.heads[target.head]
        heads[target.head] = ImageHead(width, spec, ranks, online=False, prototypes=target.averages_prototypes)
    return pools, heads


def initialize_module(owner: nn.Module, module: nn.Module) -> None:
    """Give `module`'s own parameters their first values.

    Args:
        owner: the nearest `transformers` model above `module` (which knows its initialisation), or `module` itself.
        module: one module; its parameters are whole while this is called.
    """
    if isinstance(owner, PreTrainedModel):
        owner._init_weights(module)
        if isinstance(getattr(module, "position_embeddings", None), nn.Parameter):
            _start_on_grid(cast(Tensor, module.position_embeddings))
        elif isinstance(owner, CLIPVisionModel) and module is owner.embeddings.position_embedding:
            _start_on_grid(module.weight[None])
    elif type(module) is nn.Linear:
        # As MAE: by both widths. A fixed 0.02 is made for a ViT-B; a layer of 96 channels would pass on a fifth.
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


@torch.no_grad()
def _start_on_grid(table_1LD: Tensor) -> None:
    """Let learnt positions start from the sine-cosine grid of MAE and MoCo v3 (class token: zeros), not from noise: a
    short training would be spent on finding out which patches are neighbours."""
    side = math.isqrt(table_1LD.shape[1] - 1)
    table_1LD[0, 0] = 0
    table_1LD[0, 1:] = grid_position((side, side), table_1LD.shape[2], table_1LD.device)


_ONLINE = {
    "backbone": "student",
    "pools": "decoders",
    "heads": "image_heads",
    "projector": "projector",
    "target_heads": "heads",
}
"""Parts of the momentum target → those of the objective that they follow."""


def momentum_pairs(objective: Objective) -> list[tuple[str, str]]:
    """Return the (online, averaged) names of all parameters that the momentum target follows."""
    if objective.momentum is None:
        return []
    pairs = []
    for name, _ in objective.momentum.named_parameters():
        part, _, rest = name.partition(".")
        pairs.append((f"{_ONLINE[part]}.{rest}", f"momentum.{name}"))
    return pairs
