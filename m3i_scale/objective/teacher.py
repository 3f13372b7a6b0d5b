"""Frozen teachers: any `transformers` vision model with one token per patch, or the initial backbone."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPVisionModelWithProjection
from transformers.initialization import no_init_weights

from m3i_scale.backbones.base import Backbone, Tokens, patch_grid
from m3i_scale.backbones.build import backbone_config, backbone_source, build_backbone
from m3i_scale.backbones.families import VisionConfig
from m3i_scale.backbones.families.dino import keep_frequencies
from m3i_scale.backbones.load_plan import LoadPlan, plan_load, plan_model
from m3i_scale.backbones.sources import Source, pretrained_folder
from m3i_scale.backbones.sources.files import weight_files
from m3i_scale.backbones.sources.hub import hub_places
from m3i_scale.config import BackboneConfig, RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json, sha256_of, similar_path
from m3i_scale.objective.inputs import PixelNorm
from m3i_scale.objective.recipe import Recipe


class Teacher(nn.Module, ABC):
    """An encoder of full images with frozen weights."""

    prefix: ClassVar[str]
    """Name prefix of the parameters that are loaded from its files."""
    width: int
    """D, the channels of a patch token."""

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tokens:
        """Encode uint8 images as image feature (B, 1, E) and patch tokens (B, N, D)."""

    @abstractmethod
    def plan(self) -> LoadPlan:
        """Return the plan for loading the weights, by names below `prefix`. Reads no weights."""


class FrozenStart(Teacher):
    """The initial backbone as a frozen teacher; it uses the student's normalization."""

    prefix = "backbone.model."

    def __init__(self, spec: BackboneConfig, backbone: Backbone, pixel_norm: PixelNorm) -> None:
        super().__init__()
        self.spec, self.width = spec, backbone.width
        self.backbone, self.pixel_norm = backbone, pixel_norm
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tokens:
        """Encode uint8 images as class token (B, 1, D), or mean token if there is none, and patch tokens (B, N, D)."""
        self.backbone.eval()
        return self.backbone.encode_whole(self.pixel_norm(images_BCHW))

    def plan(self) -> LoadPlan:
        plan = plan_load(backbone_source(self.spec), backbone_config(self.spec))
        if fresh := plan.report["fresh"]:
            raise ConfigError(
                f"{len(fresh)} weights of the backbone are random, e.g. {fresh[0]}, so its initial state cannot be a "
                "teacher",
                where=f"backbone.from_pretrained: {self.spec.from_pretrained}",
                why="the source has no such weights",
                fix="start from an export of a run, which has all of them",
            )
        return plan


class FrozenTeacher(Teacher):
    """A frozen `transformers` vision model with patch tokens, run on the student's patch grid."""

    prefix = "model."

    def __init__(self, source: str, where: str, config: Any, pixel_norm: PixelNorm, student: VisionConfig) -> None:
        super().__init__()
        self.source, self.where = source, where
        """Folder or Hub id, and the config key that names it."""
        self.width = int(config.hidden_size)
        with no_init_weights():
            self.model = _vision_model(config)
        self.pixel_norm, self.student = pixel_norm, student
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self.requires_grad_(False)

    def size_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the image height and width for a grid of this model's patches."""
        patch = int(self.model.config.patch_size)
        return grid[0] * patch, grid[1] * patch

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tokens:
        """Encode uint8 images as image feature (B, 1, E) and patch tokens (B, N, D).

        The image feature of image-text models is `get_image_features`: the attention pool of SigLIP, or the class token
        of CLIP after its norm and projection. RADIO predicts the same: its adaptors are compared with the text
        embeddings of these teachers (`radio/open_clip_adaptor.py`). A CLIP vision tower without projection, or AIMv2,
        has the pooled output. Without one, it is the class token, or else the mean patch token. A ViT also uses the
        class token: most published weights lack its tanh pooler.

        Images are resized if the patch size differs from the student's, and normalized as in the model's training.
        """
        self.model.eval()
        keep_frequencies(getattr(self.model, "rope_embeddings", None))
        first = next(self.model.parameters())
        grid = patch_grid(images_BCHW, self.student.patch_size)
        if images_BCHW.shape[-2:] != (size := self.size_for(grid)):
            images_BCHW = F.interpolate(images_BCHW.float(), size, mode="bilinear", antialias=True)
        pixels_BCHW = self.pixel_norm(images_BCHW).to(first.dtype)
        options = {"interpolate_pos_encoding": True} if self.interpolates else {}
        output = self.model(pixel_values=pixels_BCHW, **options)
        hidden_BSD = output.last_hidden_state
        tokens_BND = hidden_BSD[:, -grid[0] * grid[1] :]
        pooled_BE = None if hasattr(self.model, "pooler") else output.get("pooler_output", output.get("image_embeds"))
        if pooled_BE is not None:
            return pooled_BE[:, None], tokens_BND
        has_cls = hidden_BSD.shape[1] > tokens_BND.shape[1]
        return (hidden_BSD[:, :1] if has_cls else tokens_BND.mean(dim=1, keepdim=True)), tokens_BND

    def plan(self) -> LoadPlan:
        config = self.model.config
        self.check_image_size(self.student.image_size)
        with torch.device("meta"):
            model = _vision_model(config)
        # The tanh pooler of a ViT is unused (see `forward`), and most published weights lack it.
        pooler = [name for name, _ in model.named_parameters() if "pooler" in name]
        folder = pretrained_folder(self.source, self.where)
        files = Source(self.source, "transformers", folder, config, hub_places)
        return plan_model(files, model, self.where, fresh=pooler, all_placed=False)

    @torch.no_grad()
    def check_image_size(self, image_size: int) -> None:
        """Check that the model supports the student's image size in pixels, and that its outputs are [class token?,
        registers?, patches] and depend only on parameters. All of this depends on the architecture only, so one layer
        with random weights is enough."""
        config, where = self.model.config, f"{self.where}: {self.source}"
        shallow = copy.deepcopy(config)
        if isinstance(getattr(config, "num_hidden_layers", None), int):
            shallow.num_hidden_layers = 1
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(shallow, trust_remote_code=False).eval()
            kept = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
            if kept:
                raise ConfigError(
                    f"the teacher must have no buffers except weights, got e.g. {min(kept)}",
                    where=where,
                    fix="use a plain vision Transformer, e.g. a ViT or DINOv2",
                )
            options = {"interpolate_pos_encoding": True} if self.interpolates else {}
            side = image_size // self.student.patch_size
            pixels_BCHW = torch.randn(1, 3, *self.size_for((side, side)))
            try:
                output, again = (model(pixel_values=pixels_BCHW, **options).last_hidden_state for _ in range(2))
            except (RuntimeError, ValueError) as error:
                own = int(getattr(config, "image_size", 224)) // config.patch_size
                raise ConfigError(
                    f"the teacher must accept the student's grid of {side} × {side} patches: "
                    f"{str(error).splitlines()[0]}",
                    where=where,
                    why=f"its position embeddings are for {own} × {own} patches",
                    fix=f"set backbone.config.image_size to {own} × the backbone's patch size",
                ) from None
        patches = side**2
        before = (output.shape[1] if output.ndim == 3 else 0) - patches
        if before not in {0, 1, 1 + int(getattr(config, "num_register_tokens", 0))}:
            raise ConfigError(
                f"the teacher must return a class token and {patches} patch tokens, got shape {tuple(output.shape)}",
                where=where,
                fix="use a plain vision Transformer, e.g. a ViT or DINOv2",
            )
        if not torch.equal(output, again):  # e.g. a ViTMAEModel shuffles its tokens even with mask_ratio 0
            raise ConfigError(
                "the teacher must not mask or shuffle patches at random",
                where=where,
                fix="use a plain vision Transformer, e.g. a ViT or DINOv2",
            )


def _has_projection(config: Any) -> bool:
    return CLIPVisionModelWithProjection.__name__ in (config.architectures or ())


def _vision_model(config: Any) -> Any:
    """Return the model of a configuration that `_read_config` returned."""
    if _has_projection(config):
        return CLIPVisionModelWithProjection(config)
    return AutoModel.from_config(config, trust_remote_code=False)


@cache
def _read_config(source: str, where: str) -> Any:
    """Return the `transformers` configuration of a teacher; for image-text models, the vision part."""
    if Path(source).parent.is_dir() and not Path(source).is_dir() and str(Path(source).parent) != ".":
        fix = similar_path(Path(source), "use a folder with config.json, or a Hub id")
        raise ConfigError(f"no such folder: '{source}'", where=where, fix=fix)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a teacher from '{source}': {str(error).splitlines()[0]}",
            where=where,
            fix="use a folder with config.json, model.safetensors and preprocessor_config.json, or a Hub id",
        ) from None
    if isinstance(config, CLIPConfig):
        config.vision_config.update(
            {"projection_dim": config.projection_dim, "architectures": [CLIPVisionModelWithProjection.__name__]}
        )
    config = getattr(config, "vision_config", config)
    for field in ("hidden_size", "patch_size"):
        if not isinstance(getattr(config, field, None), int):
            raise ConfigError(
                f"the teacher must have a number `{field}`, but its {config.model_type} has none",
                where=f"{where}: {source}",
                fix="use a plain vision Transformer, e.g. a ViT or DINOv2",
            )
    return config


def build_teacher(run: RunConfig, recipe: Recipe, name: str, student: VisionConfig) -> Teacher:
    """Return the module of a recipe's teacher, without its weights (see `Teacher.plan`)."""
    source, where = recipe.teachers[name].from_pretrained, f"recipe.teachers.{name}.from_pretrained"
    if recipe.teachers[name].is_start:
        _check_widths(recipe, name, student.hidden_size)
        if run.backbone.from_pretrained is None:
            raise ConfigError(
                "the teacher `student` needs pretrained weights, but `backbone.from_pretrained` is not set",
                where=f"{where}: student",
                fix="set backbone.from_pretrained=/data/models/dinov2-base; for a folder named student write ./student",
            )
        augment = run.data.augment
        return FrozenStart(run.backbone, build_backbone(student), PixelNorm(augment.mean, augment.std))
    config = _read_config(source, where)
    _check_widths(recipe, name, config.projection_dim if _has_projection(config) else config.hidden_size)
    config._attn_implementation = "sdpa"
    return FrozenTeacher(source, where, config, _normalisation(source), student)


def _check_widths(recipe: Recipe, name: str, width: int) -> None:
    taught = [target for target in recipe.head_targets if target.encoder == "teacher" and target.teacher == name]
    for head in {target.head for target in taught}:
        if recipe.heads[head].width != width:
            raise ConfigError(
                f"the width of head '{head}' must be {width}, the width of the image feature of teacher '{name}', got "
                f"{recipe.heads[head].width}",
                where=f"recipe.heads.{head}.width",
                fix=f"set recipe.heads.{head}.width={width}",
            )


def _normalisation(source: str) -> PixelNorm:
    path = pretrained_folder(source) / "preprocessor_config.json"
    try:
        values = read_json(path)
        mean, std = (tuple(map(float, values[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "the teacher must have an image processor with mean and standard deviation",
            where=str(path),
            why="it would get images with another normalization than in its training",
            fix="add the preprocessor_config.json of the model",
        ) from None
    return PixelNorm(mean, std)


def teachers_sha256(recipe: Recipe, backbone: BackboneConfig) -> dict[str, str]:
    """Return a hash over each teacher's weight files, by name. `backbone` names the student's pretrained weights."""
    hashes = {}
    for name, spec in recipe.teachers.items():
        source, kind, where = spec.from_pretrained, "transformers", f"recipe.teachers.{name}.from_pretrained"
        if spec.is_start:
            start, where = backbone_source(backbone), "backbone.from_pretrained"
            source, kind = start.given, start.kind
        hashes[name] = _hash_weights(source, kind, where)
    return hashes


@cache
def _hash_weights(source: str, kind: str, where: str) -> str:
    return sha256_of(*weight_files(pretrained_folder(source, where, kind), kind, where))
