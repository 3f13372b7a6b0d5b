"""What one of two ranks does in `test_detector_on_ranks.py`: `python detector_ranks.py OUT`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from detectors import FOUR_SCENES, batch_of, shake, small_backbone, small_spec
from safetensors.torch import save_file
from torch import Tensor, nn

from m3i_scale.engine.activations import apply_activation_checkpointing
from m3i_scale.engine.deepspeed.resolve import load_ds_config, resolve
from m3i_scale.engine.engine import build_engine
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.ranks import Ranks
from m3i_scale.tasks.detection.detection_heads import RfDetr
from m3i_scale.tasks.detection.detection_losses import Objects
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector
from m3i_scale.tasks.detection.object_detector import ObjectDetector
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector

STAGES = {
    "zero1_cpu_fp32": "zero1_cpu_fp32",
    "zero1_bf16": "zero1_bf16",
    "zero2_bf16": "zero2_bf16",
    "rfdetr": "zero1_cpu_fp32",
    "rfdetr_bf16": "zero2_bf16",
}
"""DeepSpeed files by case: of a Mask R-CNN, and of RF-DETR."""
STEPS = 2
QUERIES = {"channels": 16, "queries": 6, "groups": 2, "decoder_layers": 2, "decoder_width": 32}


class Detection(nn.Module):
    """Backbone and detector in one module, as an engine wants them."""

    def __init__(self, ranks: Ranks, case: str) -> None:
        super().__init__()
        self.student = small_backbone()
        self.detector: ObjectDetector = MaskRcnnDetector(small_spec(), self.student, 3, ranks)
        if case.startswith("rfdetr"):
            self.detector = RfDetrDetector(RfDetr.model_validate(QUERIES), self.student, 3, ranks)

    def forward(self, images_BCHW: Tensor, objects: Objects) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.detector.losses(self.detector.encode(self.student, images_BCHW), objects)
        return torch.stack(list(losses.values())).sum(), losses


def first_weights(module: nn.Module) -> None:
    initialize_sharded(module, initialize_module, seed=0)
    shake(module, 0.02)


def mean_gradients(module: nn.Module) -> Tensor:
    """Norms of the mean over ranks of what every parameter's gradient is, in the order of the parameters."""
    norms = []
    for parameter in module.parameters():
        gradient = safe_get_full_grad(parameter)
        norms.append(torch.zeros(()) if gradient is None else gradient.float().norm())
    return torch.stack(norms)


def main(out: Path) -> None:
    ranks = start_ranks()
    for case, stage in STAGES.items():
        config: dict[str, Any] = resolve(
            load_ds_config(stage),
            world_size=2,
            batch_size=4,
            micro_batch_size=2,
            clip_grad_norm=1.0,
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.1,
            hidden_size=64,
            where=stage,
        ).config
        engine = build_engine(partial(Detection, ranks, case), first_weights, config, weight_decay=0.1)
        apply_activation_checkpointing(engine.module, "full")
        told: dict[str, Tensor] = {}
        for step in range(STEPS):
            # At first the second rank has images without objects alone, then the first one.
            scenes = FOUR_SCENES if step == 0 else FOUR_SCENES[::-1]
            images, objects = batch_of(scenes[2 * ranks.rank : 2 * ranks.rank + 2], seed=2 * ranks.rank)
            loss, losses = engine(images, objects)
            engine.backward(loss)
            if step == 0:
                told["gradients"] = mean_gradients(engine.module)
            engine.step()
            told |= {f"{step}/{name}": value.detach().clone() for name, value in losses.items()}
        weights = [parameter.detach().float().norm() for parameter in engine.module.parameters()]
        save_file(told | {"weights": torch.stack(weights)}, out / f"{case}-rank{ranks.rank}.safetensors")
    stop_ranks(wait=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
