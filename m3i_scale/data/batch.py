"""What the loader hands to the objective: one micro-batch, whatever targets its samples have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BY_VALUE_BYTES = 65_536
_BY_VALUE_TYPES = (torch.int64, torch.float32, torch.bool)


@dataclass
class Batch:
    """A micro-batch of B samples with V views each. What a sample lacks is marked, never left out."""

    images_VBCHW: Tensor
    """uint8 (V, B, 3, H, W): augmented views, not yet normalised."""
    crops_VB4: Tensor
    """float32 (V, B, 4): top, left, height, width of the crop in pixels of the (already flipped) source image."""
    flips_VB: Tensor
    """bool (V, B): whether the source image was flipped, which happens before the crop."""
    sizes_B2: Tensor
    """float32 (B, 2): height, width of the source image in pixels."""
    labels_B: Tensor
    """int64 (B): index in the label set `label_sets_B`, −1 where the sample has no category."""
    label_sets_B: Tensor
    """int64 (B): index of the source's label set, −1 where the sample has no category."""
    text_ids_BT: Tensor
    """int64 (B, T): caption tokens, padded."""
    text_mask_BT: Tensor
    """bool (B, T): true on tokens, false on padding; a sample without caption has one true (padding) token."""
    has_text_B: Tensor
    """bool (B): whether the sample has a caption."""
    captions_B: Tensor
    """int64 (B): hash of the caption, equal for equal captions; 0 where there is none."""
    seeds_B: Tensor
    """int64 (B): random seed of the sample in this epoch; masks are drawn from it, so they do not depend on ranks."""
    keys: list[str]
    """`source/shard/key` of every sample, for error messages."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """For the way out of a worker: small tensors as arrays, since each tensor costs a file of shared memory."""
        return {name: _by_value(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tensors again."""
        arrived = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in state.items()
        }
        vars(self).update(arrived)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return Batch(**moved, keys=self.keys)

    @staticmethod
    def cat(parts: list[Batch]) -> Batch:
        """Parts of one micro-batch, in order; captions are padded to the longest part."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.text_ids_BT.shape[1] for part in parts)
        joined: dict[str, Any] = {}
        for field in fields(Batch):
            values: list[Any] = [getattr(part, field.name) for part in parts]
            if field.name == "keys":
                joined["keys"] = [key for part in values for key in part]
                continue
            if field.name in ("text_ids_BT", "text_mask_BT"):
                values = [torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values]
            joined[field.name] = torch.cat(values, dim=1 if "_VB" in field.name else 0)
        return Batch(**joined)


def _by_value(value: Any) -> Any:
    small = isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes <= _BY_VALUE_BYTES
    return value.detach().numpy() if small and value.dtype in _BY_VALUE_TYPES else value
