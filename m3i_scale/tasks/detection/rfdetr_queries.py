"""RF-DETR of `transformers` without its backbone: projector, queries, decoder and heads."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    RfDetrConfig,
    RfDetrDinov2Config,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
)
from transformers.initialization import no_init_weights

from m3i_scale.tasks.detection.detection_heads import RfDetr

Prediction: TypeAlias = dict[str, Tensor]
"""By the names in `transformers`: `logits` (B, Q, K); `pred_boxes` (B, Q, 4), center, width and height relative to the
square; `pred_masks` (B, Q, h, w), logits, if there is a mask head."""
BACKBONE = "backbone.backbone."
"""Name prefix of the backbone in the `RfDetrModel` of `transformers`."""
_FIRST_PROBABILITY = 0.01
"""Initial probability of every class."""


class StockQueries(nn.Module):
    """Projector, queries, decoder and heads of the stock RF-DETR, for `layers` layers of a backbone of this width."""

    def __init__(self, spec: RfDetr, width: int, layers: int, classes: int) -> None:
        super().__init__()
        # A minimal backbone with this number of output layers: it is built with the model, then discarded.
        smallest = RfDetrDinov2Config(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=1,
            mlp_ratio=1,
            out_indices=list(range(1, layers + 1)),
        )
        with no_init_weights():  # initialized once, later
            self.model = stock_class(spec)(stock_config(spec, smallest, classes))
        self.detection.model.backbone = _ProjectedMap(self.detection.model.backbone.projector)
        self._names = {module: name for name, module in self.named_modules()}
        for module in self._names:
            if isinstance(module, PreTrainedModel):  # each of them initializes its modules through this method
                module._init_weights = self._set_first_values
        for layer in self.detection.model.decoder.layers:
            layer.called_in_parts = True  # uses copies of its parameters, which checkpointing would not see

    @property
    def detection(self) -> Any:
        """Return the stock `RfDetrForObjectDetection`, also if it is part of a segmentation model."""
        return self.model if isinstance(self.model, RfDetrForObjectDetection) else self.model.model

    def project(self, maps: list[Tensor]) -> Tensor:
        """Project the layers' maps (B, D, H, W) to the decoder's input: (B, C, H, W)."""
        map_BCHW: Tensor = self.detection.model.backbone.projector(maps)
        return map_BCHW

    def forward(self, map_BCHW: Tensor, side: int) -> list[Prediction]:
        """Return the predictions of the last decoder layer, of its other layers, and of the encoder's proposals.

        In training, the queries of all groups are concatenated. `map_BCHW` is a result of `project`, and `side` the
        image size in pixels.
        """
        detection, size = self.detection, (side, side)
        output = detection.model(map_BCHW)
        hidden, places = output.intermediate_hidden_states, output.intermediate_reference_points
        logits, boxes = detection.predict_class_and_boxes(hidden, places)
        predictions = [
            *({"logits": one, "pred_boxes": two} for one, two in zip(logits, boxes, strict=True)),
            {
                "logits": detection.predict_encoder_class_logits(output.enc_outputs_class),
                "pred_boxes": output.enc_outputs_coord_logits,
            },
        ]
        if isinstance(self.model, RfDetrForInstanceSegmentation):
            masks = [
                *self.model.segmentation_head(map_BCHW, hidden, size),
                self.model.segmentation_head(map_BCHW, output.enc_outputs_class, size, skip_blocks=True),
            ]
            for prediction, masks_BQHW in zip(predictions, masks, strict=True):
                prediction["pred_masks"] = masks_BQHW
        last = len(logits) - 1
        return [predictions[last], *predictions[:last], predictions[-1]]

    def _set_first_values(self, module: nn.Module) -> None:
        """Initialize one module. Sampling locations and class biases follow the rfdetr package (`models/lwdetr.py`,
        `models/transformer.py`), unlike the stock model. Other linear layers use Xavier, as in the package's
        decoder."""
        name = self._names[module]
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight) if name.endswith("query_feat") else nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "class_embed" in name:
                nn.init.constant_(module.bias, -math.log(1 / _FIRST_PROBABILITY - 1))
            elif name.endswith(("sampling_offsets", "attention_weights")) or (
                "bbox_embed" in name and "layers.2" in name
            ):
                nn.init.zeros_(module.weight)
            if name.endswith("sampling_offsets"):
                config = self.model.config
                module.bias.copy_(_rays(config.decoder_cross_attention_heads, config.decoder_n_points))
        elif module is self.model:
            nn.init.zeros_(module.segmentation_bias)
        else:
            module.reset_parameters()  # type: ignore[operator]


class _ProjectedMap(nn.Module):
    """Placeholder for the stock model's backbone; its input is already the projector's output."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, map_BCHW: Tensor, mask_BHW: Tensor) -> tuple[Tensor, Tensor]:
        return map_BCHW, mask_BHW.bool()


def stock_class(spec: RfDetr) -> Any:
    """Return the `transformers` class of the head."""
    return RfDetrForInstanceSegmentation if spec.masks else RfDetrForObjectDetection


def stock_config(spec: RfDetr, backbone: RfDetrDinov2Config, classes: int) -> RfDetrConfig:
    """Return the `transformers` configuration of a head and a backbone; dropout is 0, as in the package."""
    return RfDetrConfig(
        backbone_config=backbone,
        d_model=spec.channels,
        dropout=0.0,
        decoder_ffn_dim=spec.decoder_width,
        decoder_n_points=spec.points,
        decoder_layers=spec.decoder_layers,
        decoder_self_attention_heads=spec.self_attention_heads,
        decoder_cross_attention_heads=spec.cross_attention_heads,
        num_queries=spec.queries,
        group_detr=spec.groups,
        class_loss_coefficient=spec.class_weight,
        bbox_loss_coefficient=spec.box_weight,
        giou_loss_coefficient=spec.giou_weight,
        mask_class_loss_coefficient=spec.mask_weight,
        mask_dice_loss_coefficient=spec.dice_weight,
        mask_downsample_ratio=spec.mask_stride,
        intermediate_size=4 * spec.channels,
        num_labels=classes,
    )


def _rays(heads: int, points: int) -> Tensor:
    """Return initial sampling offsets of the heads relative to the query's box; each head has a different ray."""
    angle_H = torch.arange(heads) * (2 * math.pi / heads)
    ray_H2 = torch.stack([angle_H.cos(), angle_H.sin()], dim=-1)
    ray_H2 = ray_H2 / ray_H2.abs().amax(dim=-1, keepdim=True)
    return (ray_H2[:, None] * torch.arange(1, points + 1)[:, None]).flatten()
