"""Mask classification with queries that run through the backbone's last layers (EoMT). Modules and losses come from
`transformers`, but means over a batch are means over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EomtConfig
from transformers.models.eomt.modeling_eomt import EomtHungarianMatcher, EomtLoss, EomtMaskHead, EomtScaleBlock

from m3i_scale.backbones.base import Backbone, Tokens
from m3i_scale.backbones.tokens import TokenBackbone, call_layer
from m3i_scale.errors import ConfigError
from m3i_scale.objective.ranks import Ranks
from m3i_scale.tasks.segmentation.pixel_heads import PixelHead, resized
from m3i_scale.tasks.segmentation.segmentation_heads import EomtSegmentation

_POWER = 0.9
_COUNTED_CLASSES = 8
"""Number of classes per image when FLOPs are counted on meta tensors."""


class MaskQueries(PixelHead):
    """EoMT: queries attend to the image in the last blocks; each predicts a mask and its class.

    In training, queries use masked attention: they only see patches of their predicted mask. The masks are annealed
    from all blocks to none, so the trained model needs no attention masks.
    """

    def __init__(self, spec: EomtSegmentation, backbone: Backbone, classes: int, ranks: Ranks) -> None:
        super().__init__()
        if not isinstance(backbone, TokenBackbone):
            raise ConfigError(
                "EoMT needs a plain Transformer: its queries are tokens",
                where="task.head.kind: eomt",
                fix="set task.head=upernet",
            )
        if spec.blocks > len(backbone.layers):
            raise ConfigError(
                f"task.head.blocks must be at most {len(backbone.layers)}, the number of backbone layers, got "
                f"{spec.blocks}",
                where="task.head.blocks",
                fix=f"set task.head.blocks={len(backbone.layers)} or less",
            )
        self.spec, self.size = spec, backbone.image_size
        self.config = query_config(spec, backbone.model.config, classes)
        self.query = nn.Embedding(spec.queries, backbone.width)
        self.upscale_block = EomtScaleBlock(self.config)
        self.mask_head = EomtMaskHead(self.config)
        self.class_predictor = nn.Linear(backbone.width, classes + 1)

    def encode_view(self, backbone: Backbone, images_BCHW: Tensor, progress: float) -> tuple[Tokens, list[Tensor]]:
        """Return the image tokens, and the queries' predictions before each of the last blocks (in training) and after
        the last. Predictions alternate between class logits (B, Q, K + 1) and mask logits (B, Q, H, W)."""
        vision = cast(TokenBackbone, backbone)  # `__init__` rejects other backbones
        predictions: list[Tensor] = []

        def attend(tokens_BSD: Tensor, block: int) -> Tensor | None:
            predictions.extend(self._predict(tokens_BSD, vision.grid))
            share = mask_share(progress, block, self.spec.blocks)
            return self._attention_mask(predictions[-1], tokens_BSD, vision.grid, share) if share else None

        numbers_Q = torch.arange(self.spec.queries, device=images_BCHW.device)
        queries_BQD = self.query(numbers_Q).expand(len(images_BCHW), -1, -1)
        masked = attend if self.training else None
        tokens_BSD = encode_beside(vision, images_BCHW, queries_BQD, self.spec.blocks, masked)
        predictions.extend(self._predict(tokens_BSD, vision.grid))
        return vision.read(tokens_BSD[:, self.spec.queries :]), predictions

    def forward(self, map_BDHW: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return nonnegative class scores per pixel (B, K, H, W): Σ over queries of class probability × mask
        probability."""
        class_logits_BQK, mask_logits_BQHW = maps[-2:]
        return [class_scores(class_logits_BQK, resized(mask_logits_BQHW, (self.size, self.size)))]

    def loss(
        self,
        predictions: list[Tensor],
        maps: Sequence[Tensor],
        truth_BHW: Tensor,
        valid_BHW: Tensor,
        distribution: Any,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted losses of matched queries, summed over all predictions, and log K − the cross-entropy of
        the normalized scores."""
        classes, masks = _targets(truth_BHW, valid_BHW, self.config.num_labels)
        criterion = _GlobalLoss(self.config, ranks, classes)
        weights = {
            "loss_cross_entropy": self.spec.class_weight,
            "loss_mask": self.spec.mask_weight,
            "loss_dice": self.spec.dice_weight,
        }
        total = torch.zeros((), device=truth_BHW.device)
        devices = [truth_BHW.device] if truth_BHW.is_cuda and not self.training else []
        with torch.random.fork_rng(devices, enabled=not self.training and not truth_BHW.is_meta):
            if not self.training and not truth_BHW.is_meta:
                torch.manual_seed(0)  # every evaluation draws the same points
            for class_logits_BQK, mask_logits_BQHW in zip(maps[::2], maps[1::2], strict=True):
                losses = criterion(mask_logits_BQHW.float(), class_logits_BQK.float(), masks, classes)
                total = total + sum(weights[name] * loss for name, loss in losses.items())
        with torch.no_grad():
            log_BKHW = predictions[0].clamp(min=1e-6).log()
            nats: Tensor = distribution.loss(log_BKHW, truth_BHW, valid_BHW, ranks)[1]
        return total, nats

    def _predict(self, tokens_BSD: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        queries_BQD = tokens_BSD[:, : self.spec.queries]
        patches_BDHW = tokens_BSD[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        map_BDHW = self.upscale_block(patches_BDHW)
        masks_BQHW = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries_BQD), map_BDHW)
        return self.class_predictor(queries_BQD), masks_BQHW

    @torch.no_grad()
    def _attention_mask(
        self, mask_logits_BQHW: Tensor, tokens_BSD: Tensor, grid: tuple[int, int], share: float
    ) -> Tensor:
        """Return the additive attention mask (B, 1, S, S). Queries, except for a random fraction, only attend to
        patches of their masks."""
        batch, length, queries = len(tokens_BSD), tokens_BSD.shape[1], self.spec.queries
        shown_BQN = F.interpolate(mask_logits_BQHW.float(), size=grid, mode="bilinear").flatten(2) > 0
        if share < 1:
            shown_BQN |= torch.rand(batch, queries, 1, device=tokens_BSD.device) > share
        read_BSS = torch.ones(batch, length, length, dtype=torch.bool, device=tokens_BSD.device)
        read_BSS[:, :queries, -shown_BQN.shape[2] :] = shown_BQN
        lowest = torch.finfo(tokens_BSD.dtype).min
        return torch.zeros_like(read_BSS, dtype=tokens_BSD.dtype).masked_fill(~read_BSS, lowest)[:, None]


def encode_beside(
    backbone: TokenBackbone,
    images_BCHW: Tensor,
    others_BQD: Tensor,
    blocks: int,
    attend: Callable[[Tensor, int], Tensor | None] | None = None,
) -> Tensor:
    """Encode normalized images with additional tokens before theirs in the last `blocks` layers.

    `attend` is called before each of these layers with the normalized tokens (B, S, D) and the layer's number from 0;
    it returns an additive attention mask. Return the last layer's normalized tokens [others | class token?, registers?
    | patches].
    """
    tokens_BSD, angles = backbone.embed_whole(images_BCHW)
    first = len(backbone.layers) - blocks
    for number, layer in enumerate(backbone.layers):
        if number == first:
            tokens_BSD = torch.cat([others_BQD.to(tokens_BSD.dtype), tokens_BSD], dim=1)
        mask = attend(backbone.normed(tokens_BSD), number - first) if attend is not None and number >= first else None
        tokens_BSD = call_layer(layer, tokens_BSD, angles, mask)
    return backbone.normed(tokens_BSD)


def class_scores(class_logits_BQK: Tensor, mask_logits_BQHW: Tensor) -> Tensor:
    """Return class scores per pixel (B, K, H, W), without the last class, "no object"."""
    classes_BQK = class_logits_BQK.float().softmax(dim=-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", classes_BQK, mask_logits_BQHW.float().sigmoid())


def mask_share(progress: float, block: int, blocks: int) -> float:
    """Return the fraction of queries with masked attention before a block.

    Training has blocks + 2 equal parts. In the first one, all blocks are masked. In each further part, the fraction
    decays to 0 in the next block. In the last one, no block is masked.
    """
    over = min(max(progress * (blocks + 2) - (block + 1), 0.0), 1.0)
    return float((1 - over) ** _POWER)


def query_config(spec: EomtSegmentation, config: Any, classes: int) -> EomtConfig:
    """Return the `EomtConfig` for queries on a plain Transformer, without its MLP."""
    return EomtConfig(
        **{key: getattr(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{key: getattr(config, key) for key in ("hidden_act", "layer_norm_eps", "image_size", "patch_size")},
        num_channels=config.num_channels,
        num_register_tokens=0,
        num_upscale_blocks=max(int(math.log2(config.patch_size)) - 2, 1),
        num_blocks=spec.blocks,
        num_queries=spec.queries,
        num_labels=classes,
        no_object_weight=spec.no_object_weight,
        class_weight=spec.class_weight,
        mask_weight=spec.mask_weight,
        dice_weight=spec.dice_weight,
        train_num_points=spec.points,
    )


def _targets(truth_BHW: Tensor, valid_BHW: Tensor, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the classes that occur in each image and their masks (N, H, W)."""
    if truth_BHW.is_meta:
        classes = [torch.arange(min(count, _COUNTED_CLASSES), device="meta")] * len(truth_BHW)
    else:
        there_BK = torch.zeros(len(truth_BHW), count + 1, device=truth_BHW.device)
        there_BK.scatter_(1, truth_BHW.masked_fill(~valid_BHW, count).flatten(1), 1.0)
        # One transfer for all images: finding their number synchronizes with the device.
        numbers = [row_K.nonzero()[:, 0] for row_K in there_BK[:, :count].cpu()]
        sent = torch.cat(numbers).to(truth_BHW.device, non_blocking=True)
        classes = list(sent.split([len(classes_N) for classes_N in numbers]))
    masks = [
        ((truth_HW == classes_N[:, None, None]) & valid_HW).float()
        for truth_HW, valid_HW, classes_N in zip(truth_BHW, valid_BHW, classes, strict=True)
    ]
    return classes, masks


class _Matcher(EomtHungarianMatcher):  # type: ignore[misc]
    """Hungarian matching of queries and masks. On meta tensors, the first ones match."""

    def forward(
        self, masks_queries_logits: Tensor, class_queries_logits: Tensor, mask_labels: Any, class_labels: Any
    ) -> Any:
        if masks_queries_logits.is_meta:
            count = masks_queries_logits.shape[1]
            return [(torch.arange(min(count, len(one)), device="meta"),) * 2 for one in class_labels]
        pairs = super().forward(masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        both_2N = torch.cat([torch.stack(pair) for pair in pairs], dim=1)  # on the CPU, where they are computed
        both_2N = both_2N.to(masks_queries_logits.device, non_blocking=True)
        return [tuple(pair_2N) for pair_2N in both_2N.split([len(query_N) for query_N, _ in pairs], dim=1)]


class _GlobalLoss(EomtLoss):  # type: ignore[misc]
    """The loss, averaged over queries and masks of all ranks. Images without a class have weight 0."""

    def __init__(self, config: EomtConfig, ranks: Ranks, classes: Sequence[Tensor]) -> None:
        super().__init__(config, {})
        self.ranks, device = ranks, classes[0].device
        self.matcher = _Matcher(config.class_weight, config.mask_weight, config.dice_weight, config.train_num_points)
        count = torch.full((), float(sum(map(len, classes))), device=device)
        self.masks = (ranks.sum(count) / ranks.world_size).clamp(min=1)
        """Mean number of masks per rank."""
        labelled = torch.tensor([float(len(classes_N) > 0) for classes_N in classes])
        self.labelled_B = labelled.to(device, non_blocking=True)

    def get_num_masks(self, class_labels: Any, device: torch.device) -> Tensor:
        return self.masks

    def loss_labels(self, class_queries_logits: Tensor, class_labels: Any, indices: Any) -> dict[str, Tensor]:
        wanted_BQ = torch.full(class_queries_logits.shape[:2], self.num_labels, device=class_queries_logits.device)
        place = self._get_predictions_permutation_indices(indices)
        wanted_BQ[place] = torch.cat([classes[j] for classes, (_, j) in zip(class_labels, indices, strict=True)])
        weight_BQ = torch.ones_like(wanted_BQ, dtype=torch.float32).masked_fill(
            wanted_BQ == self.num_labels, self.eos_coef
        )
        weight_BQ = weight_BQ * self.labelled_B[:, None]
        loss_BQ = F.cross_entropy(class_queries_logits.transpose(1, 2), wanted_BQ, reduction="none")
        total = (self.ranks.sum(weight_BQ.sum()) / self.ranks.world_size).clamp(min=1e-6)
        return {"loss_cross_entropy": (loss_BQ * weight_BQ).sum() / total}
