"""The peers of step.py: models, losses and optimizers of other libraries, as their own training code combines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

CONTEXT, VOCABULARY = 77, 49408
SIGLIP_CONTEXT, SIGLIP_VOCABULARY = 64, 32000
CLASSES = 1000
CLIP = {"image": 224, "patch": 32, "width": 384, "depth": 12, "heads": 6, "batch": 32}
SIGLIP = CLIP
MAE = {"image": 224, "patch": 16, "width": 384, "depth": 12, "heads": 6, "batch": 32}
SUPERVISED = MAE
LOCAL = {"local": 96, "local_crops": 8}
HEAD = {"hidden": 2048, "bottleneck": 256, "prototypes": 65536}
DINOV2 = MAE | LOCAL | HEAD | {"batch": 8}
"""ViT-S/16. The batch counts images: each has 2 global and 8 local crops."""
DECODER = {"width": 512, "depth": 8, "heads": 16}
LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.05, (0.9, 0.95), 1e-8
EMA_DECAY, TEACHER_TEMPERATURE, SMOOTHING = 0.994, 0.04, 0.1


class Side(NamedTuple):
    """One side of a pair."""

    step: Callable[[], None]
    parameters: int
    """Number of trainable parameters."""


def trainable(module: nn.Module) -> int:
    """Return the number of trainable parameters of a module that is not partitioned."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _adamw(model: nn.Module, *, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused)


def _side(
    model: nn.Module,
    forward: Callable[[], Any],
    optimizer: torch.optim.Optimizer,
    after: Callable[[], None] = lambda: None,
) -> Side:
    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()
        after()

    return Side(step, trainable(model))


def _images(sizes: dict[str, int], size: str = "image", count: int = 1) -> torch.Tensor:
    device, side = get_accelerator().current_device_name(), sizes[size]
    return torch.randn(count * sizes["batch"], 3, side, side, device=device)


def open_clip_step(tokens: torch.Tensor, *, fused: bool | None = None) -> Side:
    """Return the step of open_clip's CLIP. Plain AdamW is its trainer's optimizer."""
    import open_clip

    vision = {"image_size": CLIP["image"], "layers": CLIP["depth"], "width": CLIP["width"], "patch_size": CLIP["patch"]}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": CLIP["width"], "heads": CLIP["heads"]}
    device = get_accelerator().current_device_name()
    model = open_clip.CLIP(CLIP["width"], vision, text | {"layers": CLIP["depth"]}).to(device).train()
    loss = open_clip.ClipLoss()
    images, captions = _images(CLIP), tokens.to(device)

    def forward() -> Any:
        image_features, text_features, scale = model(images, captions)
        return loss(image_features, text_features, scale)

    return _side(model, forward, _adamw(model, fused=fused))


def open_clip_siglip_step(tokens: torch.Tensor) -> Side:
    """Return the step of open_clip's SigLIP: its `ViT-B-32-SigLIP2-256` configuration with the width, heads and image
    size of `SIGLIP`, and context and vocabulary of its `ViT-B-16-SigLIP`."""
    import open_clip
    import timm
    from open_clip.loss import SigLipLoss

    width, heads = SIGLIP["width"], SIGLIP["heads"]
    text: dict[str, Any] = {"context_length": SIGLIP_CONTEXT, "vocab_size": SIGLIP_VOCABULARY}
    text |= {"width": width, "heads": heads, "layers": SIGLIP["depth"]}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    name = "vit_base_patch32_siglip_256"
    vision = {"image_size": 256, "timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    model = open_clip.CustomTextCLIP(width, vision, text, init_logit_bias=-10)
    # open_clip's configuration can name a timm model, but not its width.
    model.visual.trunk = timm.create_model(
        name, num_classes=0, global_pool="map", embed_dim=width, num_heads=heads, img_size=SIGLIP["image"]
    )
    device = get_accelerator().current_device_name()
    model.to(device).train()
    loss = SigLipLoss()
    images, captions = _images(SIGLIP), tokens.to(device)
    return _side(model, lambda: loss(*model(images, captions)), _adamw(model, fused=None))


def vit_mae_step() -> Side:
    """Return the step of ViTMAEForPreTraining. Fused AdamW is the default of `transformers` Trainer."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=MAE["width"],
        num_hidden_layers=MAE["depth"],
        num_attention_heads=MAE["heads"],
        intermediate_size=4 * MAE["width"],
        image_size=MAE["image"],
        patch_size=MAE["patch"],
        decoder_hidden_size=DECODER["width"],
        decoder_num_hidden_layers=DECODER["depth"],
        decoder_num_attention_heads=DECODER["heads"],
        decoder_intermediate_size=4 * DECODER["width"],
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    model = ViTMAEForPreTraining(config).to(get_accelerator().current_device_name()).train()
    images = _images(MAE)
    return _side(model, lambda: model(pixel_values=images).loss, _adamw(model, fused=True))


def timm_step(labels: torch.Tensor) -> Side:
    """Return the step of timm's train.py: model, loss with its default label smoothing, and AdamW."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    device = get_accelerator().current_device_name()
    model = timm.create_model("vit_small_patch16_224", num_classes=CLASSES).to(device).train()
    loss = LabelSmoothingCrossEntropy(smoothing=SMOOTHING)
    options: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY, "betas": BETAS, "eps": EPS}
    images, targets = _images(SUPERVISED), labels.to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", **options)
    return _side(model, lambda: loss(model(images), targets), optimizer)


class _LightlyDinov2(nn.Module):
    """Backbone and the two heads of lightly's example, of the student or of its EMA teacher."""

    def __init__(self) -> None:
        from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import vit_small_patch16_224

        super().__init__()
        vit = vit_small_patch16_224(pos_embed="learn", dynamic_img_size=True, init_values=1e-5)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")
        self.dino_head, self.ibot_head = (
            DINOv2ProjectionHead(DINOV2["width"], HEAD["hidden"], HEAD["bottleneck"], HEAD["prototypes"])
            for _ in range(2)
        )


def lightly_dinov2_step() -> Side:
    """Return the step of lightly's `examples/pytorch/dinov2.py` with `ibot_separate_head` and without stochastic depth.
    Masks are drawn in every step."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.utils import random_block_mask, update_momentum

    device = get_accelerator().current_device_name()
    student, teacher = _LightlyDinov2().to(device).train(), _LightlyDinov2().to(device).requires_grad_(False).eval()
    teacher.load_state_dict(student.state_dict())
    dino_loss, ibot_loss, koleo_loss = (loss.to(device) for loss in (DINOLoss(), IBOTPatchLoss(), KoLeoLoss()))
    crops = DINOV2["local_crops"]
    global_views, local_views = _images(DINOV2, count=2), _images(DINOV2, "local", crops)
    rows, columns = student.backbone.vit.patch_embed.grid_size

    def forward() -> Any:
        count = len(global_views)
        mask = global_views.new_zeros((count, student.backbone.sequence_length), dtype=torch.bool)
        block_mask = random_block_mask(size=(count, rows, columns), device=mask.device)
        mask[:, 1:] = block_mask.flatten(start_dim=1)
        with torch.no_grad():
            teacher_features = teacher.backbone.encode(global_views)
            teacher_cls = teacher.dino_head(teacher_features[:, 0])
            teacher_masked = teacher.ibot_head(teacher_features[mask])
        features = student.backbone.encode(global_views, mask=mask)
        student_global = student.dino_head(features[:, 0])
        student_masked = student.ibot_head(features[mask])
        student_local = student.dino_head(student.backbone.encode(local_views)[:, 0])
        dino = dino_loss(
            teacher_out=teacher_cls.chunk(2),
            student_out=torch.cat([student_global, student_local]).chunk(2 + crops),
            teacher_temp=TEACHER_TEMPERATURE,
        )
        ibot = ibot_loss(
            teacher_out=teacher_masked, student_out=student_masked, mask=block_mask, teacher_temp=TEACHER_TEMPERATURE
        )
        return dino + ibot + 0.1 * sum(koleo_loss(tokens) for tokens in features[:, 0].chunk(2))

    return _side(
        student,
        forward,
        _adamw(student, fused=None),
        after=lambda: update_momentum(student, teacher, m=EMA_DECAY),
    )
