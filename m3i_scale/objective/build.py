"""Build and initialize the modules of a recipe, and update its EMA teacher, with unpartitioned parameters. Under ZeRO,
`engine` does the last two on the partition, with the same values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel

from m3i_scale.backbones.base import MaskToken
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families import TokenFamily, VisionConfig, family_of, find_family
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.objective.balance import GroupWeights
from m3i_scale.objective.decoders import width_of
from m3i_scale.objective.encoders import EmaTeacher, Projector
from m3i_scale.objective.fit import check_fit
from m3i_scale.objective.heads import ImageHead
from m3i_scale.objective.information import EMA_PREFIX, Objective
from m3i_scale.objective.inputs import PixelNorm
from m3i_scale.objective.positions import grid_position
from m3i_scale.objective.ranks import Ranks, SingleProcess
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.targets.base import HeadTarget, ImageTarget, Sizes
from m3i_scale.objective.targets.text import Text
from m3i_scale.objective.teacher import Teacher, build_teacher
from m3i_scale.objective.text_config import text_config
from m3i_scale.objective.text_tower import TextTower


def build_objective(
    run: RunConfig,
    label_sets: dict[str, list[str]],
    vocab_size: int | None,
    ranks: Ranks | None = None,
    *,
    target_encoders: bool = True,
    image_counts: list[int] | None = None,
) -> Objective:
    """Build all modules of a run's recipe without initializing them (see `initialize_module`).

    Args:
        label_sets: class names by label set, in the order of `Batch.label_sets_B`.
        vocab_size: size of the tokenizer's vocabulary. Only read if the recipe has a text target.
        ranks: ranks of losses over the global batch; default: a single process.
        target_encoders: build the modules that only training needs: EMA teacher, frozen teachers and their predictors,
            mask token, memories and adaptive loss weights.
        image_counts: number of training images per category, for a federated loss only.
    """
    recipe = parse_recipe(run.recipe)
    config = backbone_config(run.backbone)
    project = recipe.ema.build_projector if recipe.ema is not None and recipe.projects_dense_targets else None
    projector = project(config) if project is not None else Projector(config.hidden_size, 0)
    # A final norm that no target uses stays as it starts.
    freeze = [*run.backbone.freeze, *([] if recipe.uses_final_norm else ["final_norm"])]
    student = build_backbone(config, freeze)
    if run.task is not None and run.task.freeze:
        student.requires_grad_(False)
    check_fit(run, recipe, student, label_sets, vocab_size)
    decoders = nn.ModuleDict({name: _decoder(recipe, name, config) for name in recipe.decoders})
    classes = [len(names) for names in label_sets.values()]
    ranks = ranks or SingleProcess()
    taught_by = recipe.teachers if target_encoders else ()
    teachers = nn.ModuleDict({name: build_teacher(run, recipe, name, config) for name in taught_by})
    sizes = Sizes(0, student.width, classes, vocab_size or 0, student, ranks)
    heads = _target_heads(recipe, decoders, teachers, replace(sizes, image_counts=image_counts))
    weights = [target.weight for target in recipe.targets]
    ema_teacher = text = None
    if recipe.ema is not None and target_encoders:
        copies = _ema_copies(recipe, decoders, config, ranks)
        ema_projector = project(config) if project is not None else Projector(config.hidden_size, 0)
        copied = build_backbone(config, freeze, student)
        ema_teacher = EmaTeacher(copied, ema_projector, *copies, layers=recipe.averaged_layers)
    if run.task is not None and run.task.ema is not None and target_encoders:
        pools = nn.ModuleDict({name: _decoder(recipe, name, config) for name in recipe.decoders})
        target_heads = _target_heads(recipe, decoders, teachers, sizes)
        copied, no_projector = build_backbone(config, freeze, student), Projector(config.hidden_size, 0)
        ema_teacher = EmaTeacher(copied, no_projector, pools, nn.ModuleDict(), target_heads)
    if recipe.uses_text_tower and vocab_size is not None:
        width = joint_width(recipe, decoders)
        text = TextTower(text_config(run.text, vocab_size, width, run.backbone.attention_kernel), width)
        text.requires_grad_(not run.text.freeze)
    return Objective(
        recipe,
        student,
        decoders,
        heads,
        pixel_norm=PixelNorm(run.data.augment.mean, run.data.augment.std),
        mixed_attention=run.backbone.attention == "across_images",
        ranks=ranks,
        weights=recipe.balance.module(weights, **dict(recipe.balance)) if target_encoders else GroupWeights(weights),
        image_heads=_image_heads(recipe, decoders, ranks),
        states=_memories(recipe) if target_encoders else nn.ModuleDict(),
        projector=projector if len(projector.blocks) else None,
        ema_teacher=ema_teacher,
        teachers=teachers,
        text=text,
        mask_token=MaskToken(config.hidden_size) if recipe.uses_mask_tokens and target_encoders else None,
    )


def build_on_meta(
    run: RunConfig,
    label_sets: dict[str, list[str]],
    vocab_size: int | None,
    ranks: Ranks | None = None,
    *,
    image_counts: list[int] | None = None,
) -> Objective:
    """Build the objective on the `meta` device; for the arguments see `build_objective`."""
    try:
        with torch.device("meta"):
            return build_objective(run, label_sets, vocab_size, ranks, image_counts=image_counts)
    except UserError:
        raise
    except Exception as error:  # library models may raise any exception for an invalid config value
        raise ConfigError(
            f"the model cannot be built: {type(error).__name__}: {error}",
            where="backbone.config, text.config, recipe",
            fix="compare the sizes in these sections with a built-in recipe; if they are right, report it as a bug",
        ) from error


def joint_width(recipe: Recipe, decoders: nn.ModuleDict) -> int:
    """Return the width of the joint space of images and texts, which all text targets of a recipe share."""
    targets = [target for target in recipe.targets if isinstance(target, Text)]
    widths = {target.width or width_of(decoders[target.decoder]) for target in targets}
    if len(widths) > 1:
        raise ConfigError(
            f"all text targets must have the same width, because they share a text tower; got {sorted(widths)}",
            where="recipe",
            fix="give their heads one width",
        )
    return widths.pop()


def _decoder(recipe: Recipe, name: str, config: VisionConfig) -> nn.Module:
    try:
        return recipe.decoders[name].build(config)
    except ValueError as error:
        raise ConfigError(
            f"decoder '{name}': {error}", where=f"recipe.decoders.{name}", fix="correct the decoder"
        ) from None


def _target_heads(recipe: Recipe, decoders: nn.ModuleDict, teachers: nn.ModuleDict, sizes: Sizes) -> nn.ModuleDict:
    """Return heads by target, without heads of targets with a teacher that is not built. `sizes` are for a target
    without decoder and teacher."""
    heads = nn.ModuleDict()
    for target in recipe.targets:
        encoded = sizes.encoded
        if isinstance(target, ImageTarget) and target.encoder == "teacher":
            if target.teacher not in teachers:
                continue
            encoded = cast(Teacher, teachers[target.teacher]).width
        if not isinstance(target, HeadTarget):
            decoded = width_of(decoders[target.decoder])
            heads[target.name] = target.build_head(replace(sizes, decoded=decoded, encoded=encoded))
    return heads


def _image_heads(recipe: Recipe, decoders: nn.ModuleDict, ranks: Ranks) -> nn.ModuleDict:
    heads = nn.ModuleDict()
    for name, spec in recipe.heads.items():
        widths = {width_of(decoders[target.decoder]) for target in recipe.head_targets if target.head == name}
        if len(widths) > 1:
            raise ConfigError(
                f"all decoders of head '{name}' must have the same width, got {sorted(widths)}",
                where=f"recipe.heads.{name}",
                fix="give these decoders one width, or use one head per width",
            )
        heads[name] = ImageHead(widths.pop(), spec, ranks, online=True, prototypes=spec.prototypes > 0)
    return heads


def _memories(recipe: Recipe) -> nn.ModuleDict:
    """Return the memories of heads; targets of the same memory have the same settings."""
    by_name = {target.memory_name: target for target in recipe.head_targets}
    return nn.ModuleDict({name: by_name[name].build_memory(recipe.heads[by_name[name].head]) for name in by_name})


def _ema_copies(
    recipe: Recipe, decoders: nn.ModuleDict, config: VisionConfig, ranks: Ranks
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    pools, heads = nn.ModuleDict(), nn.ModuleDict()
    targets = [target for target in recipe.head_targets if target.encoder == "ema"]
    for target in targets:
        if not target.dense:
            pools[target.decoder] = _decoder(recipe, target.decoder, config)
        width, spec = width_of(decoders[target.decoder]), recipe.heads[target.head]
        prototypes = any(user.averages_prototypes for user in targets if user.head == target.head)
        heads[target.head] = ImageHead(width, spec, ranks, online=False, prototypes=prototypes)
    return pools, heads


@torch.no_grad()
def update_ema_teacher(objective: Objective, decay: float) -> None:
    """Update every parameter of the EMA teacher: ema ← decay · ema + (1 − decay) · online."""
    named = dict(objective.named_parameters())
    for online, ema in ema_pairs(objective):
        named[ema].lerp_(named[online], 1.0 - decay)


def initialize_module(owner: nn.Module, module: nn.Module, weight_init: str = "default") -> None:
    """Initialize the direct parameters of `module`, which must be gathered (not sharded). `owner` is the nearest
    `transformers` model above it, which defines the initialization, or `module` itself. `weight_init` is the setting of
    the backbone."""
    if isinstance(owner, PreTrainedModel):
        owner._init_weights(module)
        if isinstance(registers := getattr(module, "register_tokens", None), nn.Parameter):
            # DINOv2 leaves registers at zero. They have no positions, so all would get one gradient and stay identical.
            nn.init.trunc_normal_(registers, std=owner.config.initializer_range)
        if isinstance(getattr(module, "position_embeddings", None), nn.Parameter):
            _start_on_grid(cast(Tensor, module.position_embeddings))
        elif isinstance(owner, CLIPVisionModel | SiglipVisionModel) and module is owner.embeddings.position_embedding:
            _start_on_grid(module.weight[None])
        elif isinstance(owner, SiglipVisionModel) and type(module) is nn.Linear:
            nn.init.xavier_uniform_(module.weight)  # as SigLIP initializes attention and MLP
        if weight_init == "xavier_uniform" and isinstance(family := find_family(owner.config), TokenFamily):
            _start_as_mae(owner, family, module)
    elif type(module) is nn.Linear:
        # As MAE: depends on both widths. A fixed std of 0.02 suits a ViT-B; with 96 channels it passes on a fifth.
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


def _start_as_mae(model: PreTrainedModel, family: TokenFamily, module: nn.Module) -> None:
    """Initialize matrices, patch embedding and class token of a backbone as `initialize_weights` of MAE's
    `models_mae.py`."""
    name = next(name for name, child in model.named_modules() if child is module)
    if type(module) is nn.Linear:
        # MAE draws queries, keys and values as one matrix (3D, D), whose bound is 1/√2 of that of three.
        nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1.0)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        module.reset_parameters()  # MAE leaves the bias as torch draws it
        nn.init.xavier_uniform_(module.weight.flatten(1))
    elif (token := family.parts.get("class", "")).rpartition(".")[0] == name != "":
        nn.init.normal_(getattr(module, token.rpartition(".")[2]), std=0.02)


@torch.no_grad()
def _start_on_grid(table_1LD: Tensor) -> None:
    """Initialize learned position embeddings with the sine-cosine grid of MAE and MoCo v3, and zeros for a class token.
    With random values, a short training would be spent on learning which patches are neighbors."""
    side = math.isqrt(table_1LD.shape[1])
    table_1LD.zero_()
    table_1LD[0, -side * side :] = grid_position((side, side), table_1LD.shape[2], table_1LD.device)


_ONLINE = {
    "backbone": "student",
    "pools": "decoders",
    "heads": "image_heads",
    "projector": "projector",
    "target_heads": "heads",
}
"""Maps parts of the EMA teacher to the parts of the objective that they follow."""


def ema_pairs(objective: Objective) -> list[tuple[str, str]]:
    """Return the (student, EMA) names of all trainable parameters that the EMA teacher follows."""
    if objective.momentum is None:
        return []
    learnt = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    pairs = []
    for name, _ in objective.momentum.named_parameters():
        part, _, rest = name.partition(".")
        online = f"{_ONLINE[part]}.{rest}"
        if online in learnt:
            pairs.append((online, f"{EMA_PREFIX}{name}"))
    return pairs


def scales_of(objective: Objective, run: RunConfig) -> dict[str, float]:
    """Return learning-rate multipliers by parameter name; missing names have 1."""
    if run.task is not None:
        return run.task.lr_scales(objective)
    return backbone_scales(objective, run.optim.layer_decay) if run.optim.layer_decay != 1 else {}


def backbone_scales(objective: Objective, decay: float, *, dense: bool = False, dcn: float = 1.0) -> dict[str, float]:
    """Return learning-rate multipliers of the student; arguments as for `Family.lr_scales`."""
    model = objective.student.model
    scales = family_of(model.config).lr_scales(model, decay, dense=dense, dcn=dcn)
    return {f"student.model.{name}": scale for name, scale in scales.items()}
