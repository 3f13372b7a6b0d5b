"""Setup of a task on a backbone: checks, freezing, learning-rate scales and drop path (stochastic depth)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from m3i_scale.config import RunConfig
from m3i_scale.config.sections import Kind
from m3i_scale.errors import ConfigError
from m3i_scale.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from m3i_scale.backbones.base import Backbone
    from m3i_scale.backbones.families import VisionConfig
    from m3i_scale.objective.information import Objective

_FAMILIES = {"transformer": "a plain Transformer (ViT, DINOv2, CLIP, SigLIP)", "internimage": "InternImage"}
_BRANCHES = ("attention", "self_attn", "mlp")
"""Names of the residual branch modules in layers of ViT, DINOv2 and CLIP."""


class BackboneTask(Task):
    """Task that trains a head on a backbone, and the backbone unless it is frozen.

    Reading a config must not import torch, so methods import what they need.
    """

    kinds: ClassVar[dict[str, type[Kind]]] = Task.kinds

    def check(self, run: RunConfig, model: VisionConfig) -> None:
        """Validate the settings of all tasks. Options without effect are errors."""
        _check_family(run, model)
        if self.freeze:
            _check_frozen(run)
        if self.dcn_lr != 1 and not _is_internimage(model):
            raise ConfigError(
                f"dcn_lr has no effect: a {model.model_type} has no deformable convolutions",
                where=f"task.dcn_lr: {self.dcn_lr:g}",
                fix="leave it out, or use an InternImage",
            )

    def check_classes(self, label_sets: dict[str, list[str]]) -> None:
        """Check that there is only one list of classes."""
        if len(label_sets) > 1:
            several = ", ".join(f"{name} ({len(names)} classes)" for name, names in label_sets.items())
            raise ConfigError(
                f"a {self.model} has one class list, but the datasets have {several}",
                where="data.datasets",
                fix=f"set one data.datasets.NAME.label_set for datasets with equal {self.labels_file}"
                + ("" if self.dense else ", or data.datasets.NAME.labels=false to leave a list out"),
            )

    def prepare(self, objective: Objective, classes: int, erasing: float = 0.0) -> None:
        if self.drop_path:
            apply_drop_path(objective.student, self.drop_path)
        if self.freeze:
            objective.train()  # everything except the backbone

    def lr_scales(self, objective: Objective) -> dict[str, float]:
        from m3i_scale.objective.build import backbone_scales

        if self.freeze or (self.layer_decay == 1 and self.dcn_lr == 1):
            return {}
        return backbone_scales(objective, self.layer_decay, dense=self.dense, dcn=self.dcn_lr)


def _is_internimage(model: VisionConfig) -> bool:
    from m3i_scale.backbones.internimage import InternImageConfig

    return isinstance(model, InternImageConfig)


def _check_family(run: RunConfig, config: VisionConfig) -> None:
    from m3i_scale.backbones.families import DEFAULT_PRESET

    backbone, protocol = run.backbone, run.protocol
    if protocol is None or protocol.family is None:
        return
    family = "internimage" if _is_internimage(config) else "transformer"
    if family != protocol.family:
        raise ConfigError(
            f"the protocol is for {_FAMILIES[protocol.family]}, but the backbone is {_FAMILIES[family]}",
            where=f"backbone: {backbone.from_pretrained or backbone.preset or DEFAULT_PRESET}",
            why="its learning rates per layer fit only that family",
            fix="use a protocol for this backbone, or the default of `finetune`, which fits all",
        )


def full_image_recipe(kind: str, head: Kind) -> dict[str, Any]:
    """Return the recipe of a task with one target, named after its `kind`, that a head predicts from the uncropped
    image."""
    target = {
        "name": kind,
        "kind": kind,
        "inputs": ["image"],
        "decoder": "patches",
        "head": head.model_dump(mode="json"),
    }
    return {
        "name": kind,
        "family": "supervised",
        "inputs": [{"name": "image", "view": 1}],
        "decoders": {"patches": {"kind": "pointwise"}},
        "targets": [target],
    }


def check_last_layer(out_layers: tuple[int, ...] | None, model: VisionConfig) -> None:
    """Check that a head reads the last layer of a plain Transformer. Exports of older runs are not checked."""
    if out_layers is None or _is_internimage(model):
        return
    last, depth = out_layers[-1], model.num_hidden_layers
    if last < depth:
        raise ConfigError(
            f"the head must read the last layer of the backbone, {depth}, but the last in task.head.out_layers is "
            f"{last}",
            where=f"task.head.out_layers: {list(out_layers)}",
            why=f"layers {last + 1} to {depth} would be computed and exported without effect",
            fix="set task.head.out_layers=null, which selects layers over the full depth, including the last",
        )


def _check_frozen(run: RunConfig) -> None:
    if run.backbone.from_pretrained is None:
        raise ConfigError(
            "a frozen backbone needs pretrained weights, but backbone.from_pretrained is not set",
            where="task.freeze",
            why="features of random weights measure nothing",
            fix="set backbone.from_pretrained=/data/first-export, or task.freeze=false",
        )
    if run.backbone.activation_checkpointing != "none":
        raise ConfigError(
            "`activation_checkpointing` has no effect on a frozen backbone",
            where="backbone.activation_checkpointing",
            fix="leave it out",
        )


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the drop rate of every layer: a linear ramp from 0 to `rate`, as in all published recipes."""
    return [rate * layer / max(depth - 1, 1) for layer in range(depth)]


def apply_drop_path(backbone: Backbone, rate: float) -> None:
    """Add drop path to every layer of a backbone, with a rate that increases with depth: residual branches are dropped
    at random during training.

    The output of a branch is dropped before its layer scale, if any; the order does not matter, because both are
    factors. `transformers` has no drop path for ViT and CLIP, and only one rate for all layers of DINOv2.
    """
    from m3i_scale.backbones.internimage.modeling_internimage import InternImageLayer

    layers = backbone.layers
    for layer, layer_rate in zip(layers, drop_path_rates(rate, len(layers)), strict=True):
        if isinstance(layer, InternImageLayer):
            layer.drop_path = layer_rate
        elif layer_rate > 0:
            for name in _BRANCHES:
                if hasattr(layer, name):
                    getattr(layer, name).register_forward_hook(partial(_drop_branch, layer_rate))


def _drop_branch(rate: float, module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that multiplies a branch's output by 0 or 1/(1 − rate) per sample. Inactive in evaluation mode."""
    import torch

    if not module.training:
        return output
    branch_BLD: Tensor = output[0] if isinstance(output, tuple) else output
    kept_B = torch.rand(len(branch_BLD), device=branch_BLD.device) >= rate
    dropped_BLD = branch_BLD * (kept_B / (1 - rate)).to(branch_BLD.dtype)[:, None, None]
    return (dropped_BLD, *output[1:]) if isinstance(output, tuple) else dropped_BLD
