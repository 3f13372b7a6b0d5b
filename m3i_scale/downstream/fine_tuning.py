"""Setup of a task's modules: freezing, learning-rate scales, drop path and mixing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import reduce
from typing import Any

from m3i_scale.backbones.families import Family, VisionConfig, family_of
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.backbones.presets import DEFAULT_PRESET
from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.shards import CATEGORIES, MASK_LABELS, check_mask_classes
from m3i_scale.downstream.drop_path import apply_drop_path
from m3i_scale.downstream.layer_decay import lr_scales
from m3i_scale.errors import ConfigError
from m3i_scale.objective.detection.base import ObjectDetector
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.base import Task
from m3i_scale.tasks.classification.classification_task import Classification
from m3i_scale.tasks.detection.detection_heads import MaskRcnn, RfDetr
from m3i_scale.tasks.detection.detection_task import Detection
from m3i_scale.tasks.segmentation.segmentation_heads import UperNetSegmentation
from m3i_scale.tasks.segmentation.segmentation_task import Segmentation

STUDENT = "student.model."
_FAMILIES = {"transformer": "a plain Transformer (ViT, DINOv2, CLIP, SigLIP)", "internimage": "InternImage"}


def check_task(run: RunConfig, model: VisionConfig) -> None:
    """Validate the task of a run, independent of its data. Options without effect are errors.

    Args:
        run: the config.
        model: the configuration of its backbone.
    """
    task, family = run.task, family_of(model)
    if task is None:
        return
    _check_family(run, model)
    if task.freeze:
        _check_frozen(run)
    augment = run.data.augment
    kinds = (augment, *(source.augment for source in run.data.sources.values()))
    if any(one is not None and one.rand_augment is not None for one in kinds):
        _check_timm("RandAugment is", "data.augment.rand_augment=null")
    if augment.erasing:
        _check_timm("random erasing is", "data.augment.erasing=0")
    if task.dcn_lr != 1 and not isinstance(model, InternImageConfig):
        raise ConfigError(
            f"dcn_lr has no effect: a {model.model_type} has no deformable convolutions",
            where=f"task.dcn_lr: {task.dcn_lr:g}",
            fix="leave it out, or take an InternImage",
        )
    if isinstance(task, Detection) and task.head.masks:
        _check_mask_library()
    if isinstance(task, Segmentation | Detection) and isinstance(task.head, UperNetSegmentation | RfDetr):
        _check_last_layer(task.head, model)
    if isinstance(task, Classification):
        if task.sweep is not None:
            _check_sweep(run, family)
        if task.pool == "class_token" and not family.has_class_token:
            raise ConfigError(
                f"{family.name} has no class token to classify by", where="task.pool", fix="task.pool=mean_pool"
            )
        if task.mixup or task.cutmix:
            _check_timm("mixup and cutmix are", "task.mixup=0 task.cutmix=0")
        if (task.mixup or task.cutmix) and run.optim.micro_batch_size % 2:
            raise ConfigError(
                "mixup and cutmix pair the images of a micro-batch, and one is left over",
                where=f"optim.micro_batch_size: {run.optim.micro_batch_size}",
                fix="an even optim.micro_batch_size",
            )


def _check_family(run: RunConfig, config: VisionConfig) -> None:
    """Check that the run's backbone belongs to the model family of its fine-tuning recipe."""
    backbone, protocol = run.backbone, run.protocol
    if protocol is None or protocol.family is None:
        return
    family = "internimage" if isinstance(config, InternImageConfig) else "transformer"
    if family != protocol.family:
        raise ConfigError(
            f"the protocol is for {_FAMILIES[protocol.family]}, and the backbone is {_FAMILIES[family]}",
            where=f"backbone: {backbone.from_pretrained or backbone.preset or DEFAULT_PRESET}",
            why="learning rates by layer and their decay are those of another model",
            fix="take a protocol for it, or the default one of `finetune`, which is for any",
        )


def _check_last_layer(head: UperNetSegmentation | RfDetr, model: VisionConfig) -> None:
    """Check that a head reads the last layer of a plain Transformer. Exports of older runs are not checked."""
    if head.out_layers is None or isinstance(model, InternImageConfig):
        return
    last, depth = head.out_layers[-1], model.num_hidden_layers
    if last < depth:
        raise ConfigError(
            f"the backbone has {depth} layers, and the last layer that the head reads is {last}",
            where=f"task.head.out_layers: {list(head.out_layers)}",
            why=f"layers {last + 1} to {depth} would be computed and exported without effect",
            fix="task.head.out_layers=null reads layers from the whole depth, the last one among them",
        )


def _check_frozen(run: RunConfig) -> None:
    if run.backbone.from_pretrained is None:
        raise ConfigError(
            "the backbone is frozen at random weights",
            where="task.freeze",
            why="a head on features that nothing was trained for measures nothing",
            fix="backbone.from_pretrained=/data/first-export, or task.freeze=false",
        )
    if run.backbone.activation_checkpointing != "none":
        raise ConfigError(
            "`activation_checkpointing` has no effect: it is for layers that are trained, and the backbone is frozen",
            where="backbone.activation_checkpointing",
            fix="leave it out",
        )


def _check_sweep(run: RunConfig, family: Family) -> None:
    if not family.has_class_token:
        raise ConfigError(
            f"the heads of a sweep read class tokens, and {family.name} has none",
            where="task.sweep",
            fix="leave it out, with task.pool=mean_pool",
        )
    if run.guard.spike is not None:
        raise ConfigError(
            "a spike of the sum of all heads' losses would take all of them back",
            where="guard.spike",
            why="the rate of the fastest is meant to be too high, and the others would lose their steps with it",
            fix="leave it out",
        )
    if run.optim.clip_grad_norm:
        raise ConfigError(
            "the gradient of all heads of a sweep together would be clipped",
            where=f"optim.clip_grad_norm: {run.optim.clip_grad_norm:g}",
            why="how a head learns would depend on the others",
            fix="optim.clip_grad_norm=0",
        )
    if run.data.sources and not run.data.validation:
        raise ConfigError(
            "the best head of a sweep is the best on images for validation, and there are none",
            where="data.validation",
            fix="data.validation.val.shards=/data/shards/val and evaluation.every_steps",
        )


def check_stage(run: RunConfig, engine: dict[str, Any]) -> None:
    """Raise an error for partitioned parameters if ranks may run different modules.

    Args:
        run: the config.
        engine: its resolved DeepSpeed config.
    """
    if isinstance(run.task, Detection) and engine.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            "a detector is not trained by ZeRO stage 3",
            where=f"deepspeed: {run.deepspeed}",
            why="which of its modules compute depends on what an image shows; stage 3 gathers a module's parameters on"
            " all ranks together, and ranks that show different images would wait for each other for ever",
            fix="deepspeed=zero1_bf16 or zero2_bf16; on CPUs zero1_cpu_fp32",
        )


def check_labels(task: Task | None, label_sets: dict[str, list[str]]) -> None:
    """Check that there is exactly one list of classes to predict.

    Args:
        task: of the run.
        label_sets: class names by label set, over all training datasets.
    """
    if isinstance(task, Segmentation) and label_sets:  # datasets without classes are reported elsewhere
        _check_mask_labels(label_sets)
    if isinstance(task, Detection) and len(label_sets) > 1:
        raise ConfigError(
            f"objects have one list of categories, and the sources have {', '.join(label_sets)}",
            where="data.sources",
            fix=f"equal {CATEGORIES} become one by data.sources.NAME.label_set",
        )
    if isinstance(task, Classification) and len(label_sets) != 1:
        several = ", ".join(f"{name} ({len(names)} classes)" for name, names in label_sets.items())
        raise ConfigError(
            f"a classifier has one list of classes, and the sources have {several or 'no labels'}",
            where="data.sources",
            why=None if several else "no source has labels.json beside its shards",
            fix="leave all but one label set out: data.sources.NAME.labels=false; equal lists become one by"
            " data.sources.NAME.label_set"
            if several
            else "make the shards with labels (`shards make`), or put labels.json, a list of class names, beside them",
        )


def check_image_counts(task: Task | None, counts: list[int] | None) -> None:
    """Check that the number of images per category, which a federated loss needs, is known.

    Args:
        task: of the run.
        counts: by category; None if the datasets do not have them.
    """
    head = task.head if isinstance(task, Detection) else None
    if isinstance(head, MaskRcnn) and head.federated_classes is not None and counts is None:
        raise ConfigError(
            "a federated loss draws categories by how many images have them, and no source says so",
            where="task.head.federated_classes",
            why=f"{CATEGORIES} beside the shards has no image_count: it is not of LVIS",
            fix="task.head.federated_classes=null, or shards of LVIS",
        )


def _check_mask_labels(label_sets: dict[str, list[str]]) -> None:
    if len(label_sets) != 1:
        several = ", ".join(f"{name} ({len(names)} classes)" for name, names in label_sets.items())
        raise ConfigError(
            f"pixels have one list of classes, and the sources have {several}",
            where="data.sources",
            fix=f"equal {MASK_LABELS} become one by data.sources.NAME.label_set",
        )
    ((name, names),) = label_sets.items()
    check_mask_classes(names, f"data.sources, label set '{name}': {MASK_LABELS}")


def prepare(objective: Objective, task: Task, classes: int, erasing: float = 0.0) -> None:
    """Set up the modules for training on the task.

    Args:
        objective: newly built, with the task's recipe.
        task: of the run.
        classes: number of classes.
        erasing: see `AugmentConfig`.
    """
    if task.drop_path:
        apply_drop_path(objective.student, task.drop_path)
    if task.freeze:
        objective.train()  # everything except the backbone
    changes: list[Callable[[Batch], Batch]] = []  # needs timm, an optional dependency checked in `check_task`
    if erasing:
        from m3i_scale.downstream.erasing import Erasing

        changes.append(Erasing(erasing, objective.pixel_norm))
    if isinstance(task, Classification) and (task.mixup or task.cutmix):
        from m3i_scale.downstream.mixing import LabelMixing

        changes.append(LabelMixing(task, classes))
    if changes:
        objective.mix_labelled = lambda batch: reduce(lambda changed, change: change(changed), changes, batch)


def _check_mask_library() -> None:
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ConfigError(
            "masks of polygons are drawn by faster-coco-eval, which is not installed",
            where="task.head.masks",
            fix="pip install 'm3i-scale[detection]'",
        )


def _check_timm(what: str, without: str) -> None:
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(
            f"{what} timm's, which is not installed",
            where=without.partition("=")[0],
            fix=f"pip install 'm3i-scale[timm]', or {without}",
        )


def scales_of(module: Any, run: RunConfig) -> dict[str, float]:
    """Return learning-rate multipliers by parameter name; missing names have 1."""
    task = run.task
    if task is None:
        return _by_layer(module, run.optim.layer_decay) if run.optim.layer_decay != 1 else {}
    if isinstance(task, Classification) and task.sweep is not None:
        of_head = {name: scale for name, (_, scale) in task.sweep.heads().items()}
        return {
            f"heads.{head}.{name}": scale
            for head, scale in of_head.items()
            for name, _ in module.heads[head].named_parameters()
        }
    if task.freeze or (task.layer_decay == 1 and task.dcn_lr == 1):
        return {}
    named = _by_layer(module, task.layer_decay, dense=task.dense, dcn=task.dcn_lr)
    if isinstance(module.reader, ObjectDetector):  # its windowed layers have parameters of the backbone's layers
        depth = len(module.student.layers)
        for name, layer in module.reader.backbone_layers().items():
            named[f"heads.detection.{name}"] = task.layer_decay ** (depth - layer)
    return named


def _by_layer(module: Any, decay: float, *, dense: bool = False, dcn: float = 1.0) -> dict[str, float]:
    scales = lr_scales(module.student.model, decay, dense=dense, dcn=dcn)
    return {STUDENT + name: scale for name, scale in scales.items()}
