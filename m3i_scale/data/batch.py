"""Layout of a micro-batch, the same for all targets, and its collation from samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.config.data import Reads
from m3i_scale.config.views import ViewSpecs, view_sizes
from m3i_scale.defaults import MASK_SIDE

if TYPE_CHECKING:  # the objective imports batches without image libraries
    from transformers import PreTrainedTokenizerBase

    from m3i_scale.data.augment import Objects
    from m3i_scale.data.views import Views

_BY_VALUE_BYTES = 65_536
_COUNTED_OBJECTS = 20
"""Objects per image of synthetic batches; COCO has 7 on average."""
_OF_OBJECTS = {"boxes_BN4": 0, "box_labels_BN": -1, "box_masks_BNMM": 0}
"""Fields with an objects axis, with their padding values."""
CAPTION_MULTIPLE = 16
"""Captions of a batch are padded to a multiple of this many tokens, up to `max_tokens`."""
_BY_VALUE_TYPES = (torch.int64, torch.float32, torch.bool)


@dataclass
class Batch:
    """A micro-batch of B samples with V + V' views each. Missing annotations are marked, never dropped."""

    images_VBCHW: Tensor
    """uint8 (V, B, 3, H, W): augmented views of the backbone's size, not yet normalized."""
    small_VBCHW: Tensor
    """uint8 (V', B, 3, h, w): smaller views, which follow the others; V' is 0 if the recipe has none."""
    crops_VB4: Tensor
    """float32 (V + V', B, 4): top, left, height, width of the crop in pixels of the (already flipped) source image."""
    flips_VB: Tensor
    """bool (V + V', B): whether the source image was flipped, which happens before the crop."""
    sizes_B2: Tensor
    """float32 (B, 2): height, width of the source image in pixels."""
    labels_B: Tensor
    """int64 (B): class index in the class list `label_sets_B`; −1 if the sample has no label."""
    label_sets_B: Tensor
    """int64 (B): index of the dataset's class list; −1 if the sample has no label."""
    text_ids_BT: Tensor
    """int64 (B, T): caption tokens, padded."""
    text_mask_BT: Tensor
    """bool (B, T): true for tokens, false for padding; a sample without caption has one true (padding) token."""
    has_text_B: Tensor
    """bool (B): whether the sample has a caption."""
    captions_B: Tensor
    """int64 (B): hash of the caption, equal for equal captions; 0 if there is none."""
    seeds_B: Tensor
    """int64 (B): random seed of the sample in this epoch; masks are drawn from it, so they do not depend on ranks. It
    stays on the CPU, where other values are also drawn from it: reading it from a GPU would synchronize."""
    masks_BHW: Tensor
    """uint8 (B, H, W): class of every pixel of view 1, 255 for no class; (B, 0, 0) if no target uses it."""
    boxes_BN4: Tensor
    """float32 (B, N, 4): x1, y1, x2, y2 of the objects in view 1, padded; N = 0 if no target uses them."""
    box_labels_BN: Tensor
    """int64 (B, N): classes of the objects; −1 is padding."""
    box_masks_BNMM: Tensor
    """uint8 (B, N, M, M): each object's mask, cropped to its box and resized; M = 0 if no target uses it."""
    keys: list[str]
    """`dataset/shard/key` of every sample, for error messages."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, with small tensors as arrays: each tensor would cost a file in shared memory."""
        return {name: _by_value(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def view(self, number: int) -> Tensor:
        """Return the images of a view of either size, counted from 1: uint8 (B, 3, H, W)."""
        own = len(self.images_VBCHW)
        return self.images_VBCHW[number - 1] if number <= own else self.small_VBCHW[number - 1 - own]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are copied to a device, by name: all but the seeds."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "seeds_B"}

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; the seeds stay on the CPU."""
        # A copy to the CPU must be synchronous, because the CPU reads it immediately.
        queued = torch.device(device).type != "cpu"
        copies: dict[str, Any] = {name: value.to(device, non_blocking=queued) for name, value in self.tensors.items()}
        return replace(self, **copies)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `change` applied to every tensor, for example pinning. This includes the seeds, which
        are copied to the device when masks are drawn."""
        tensors = self.tensors | {"seeds_B": self.seeds_B}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)

    @staticmethod
    def cat(parts: list[Batch]) -> Batch:
        """Concatenate the parts of one micro-batch in order; captions are padded to the longest part."""
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
            if field.name in _OF_OBJECTS:
                values = _padded_alike(values, _OF_OBJECTS[field.name])
            joined[field.name] = torch.cat(values, dim=1 if "_VB" in field.name else 0)
        return Batch(**joined)


@dataclass
class MixedBatch(Batch):
    """A micro-batch of mixed images, each made of two; `labels_B` has the class of the first."""

    soft_labels_BK: Tensor
    """float32 (B, K): smoothed class probabilities."""


@dataclass(frozen=True)
class Sample:
    """A valid sample: decoded and checked, but not yet collated."""

    views: Views
    label: int | None
    label_set: int
    caption: str | None
    seed: int
    key: str


class Collator:
    """Collator of samples into a batch. Captions are truncated to `max_tokens` (special tokens included) and padded to
    the longest caption, rounded up to a multiple of `CAPTION_MULTIPLE`, so that compiled layers see few different
    lengths. Without a tokenizer, captions are dropped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate B samples into a batch, in order."""
        captions = [sample.caption if self._tokenizer is not None else None for sample in samples]
        ids_BT, mask_BT = self._tokens(captions)
        crops_VB = list(zip(*(sample.views.crops for sample in samples), strict=True))
        boxes = [[[crop.top, crop.left, crop.height, crop.width] for crop in crops_B] for crops_B in crops_VB]
        flips = [[crop.flip for crop in crops_B] for crops_B in crops_VB]
        sets = [-1 if sample.label is None else sample.label_set for sample in samples]
        return Batch(
            images_VBCHW=torch.from_numpy(np.stack([sample.views.pixels_VCHW for sample in samples], axis=1)),
            small_VBCHW=torch.from_numpy(np.stack([sample.views.small_VCHW for sample in samples], axis=1)),
            crops_VB4=torch.tensor(boxes, dtype=torch.float32),
            flips_VB=torch.tensor(flips, dtype=torch.bool),
            sizes_B2=torch.tensor([sample.views.size for sample in samples], dtype=torch.float32),
            labels_B=torch.tensor([-1 if sample.label is None else sample.label for sample in samples]),
            label_sets_B=torch.tensor(sets),
            text_ids_BT=ids_BT,
            text_mask_BT=mask_BT,
            has_text_B=torch.tensor([caption is not None for caption in captions]),
            captions_B=torch.tensor([caption_hash(caption) for caption in captions]),
            seeds_B=torch.tensor([sample.seed for sample in samples]),
            masks_BHW=_masks([sample.views.mask_HW for sample in samples]),
            **_objects([sample.views.objects for sample in samples]),
            keys=[sample.key for sample in samples],
        )

    def _tokens(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        padding = 0 if self._tokenizer is None else int(self._tokenizer.pad_token_id)
        rows = [[padding]] * len(captions)
        present = [number for number, caption in enumerate(captions) if caption is not None]
        if self._tokenizer is not None and present:
            texts = [captions[number] for number in present]
            encoded = self._tokenizer(texts, truncation=True, max_length=self._max_tokens, padding=False)["input_ids"]
            for number, ids in zip(present, encoded, strict=True):
                rows[number] = ids or [padding]
        width = max(map(len, rows))
        if self._tokenizer is not None:
            width = min(-(-width // CAPTION_MULTIPLE) * CAPTION_MULTIPLE, self._max_tokens)
        ids_BT = np.full((len(rows), width), padding, dtype=np.int64)
        mask_BT = np.zeros((len(rows), width), dtype=np.bool_)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = row
            mask_BT[number, : len(row)] = True
        return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


def no_objects(count: int) -> dict[str, Tensor]:
    """Return empty object tensors."""
    return {
        "boxes_BN4": torch.empty(count, 0, 4),
        "box_labels_BN": torch.empty(count, 0, dtype=torch.int64),
        "box_masks_BNMM": torch.empty(count, 0, 0, 0, dtype=torch.uint8),
    }


def _objects(objects: Sequence[Objects | None]) -> dict[str, Tensor]:
    read = [one for one in objects if one is not None]
    if not read:
        return no_objects(len(objects))
    columns = zip(*((one.boxes_N4, one.labels_N, one.masks_NMM) for one in read), strict=True)
    return {
        name: torch.cat(_padded_alike([torch.from_numpy(value)[None] for value in values], padding))
        for (name, padding), values in zip(_OF_OBJECTS.items(), columns, strict=True)
    }


def _padded_alike(parts: Sequence[Tensor], padding: int) -> list[Tensor]:
    """Pad parts (B, N, …) to the same number of objects."""
    count, padded = max(part.shape[1] for part in parts), []
    for part in parts:
        padded.append(part.new_full((part.shape[0], count, *part.shape[2:]), padding))
        padded[-1][:, : part.shape[1]] = part
    return padded


def _masks(masks: Sequence[NDArray[np.uint8] | None]) -> Tensor:
    read = [mask_HW for mask_HW in masks if mask_HW is not None]
    return torch.from_numpy(np.stack(read)) if read else torch.empty(len(masks), 0, 0, dtype=torch.uint8)


def caption_hash(caption: str | None) -> int:
    """Return a positive 63-bit hash, equal for equal captions; 0 for None."""
    if caption is None:
        return 0
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1 | 1


def synthetic_batch(
    count: int, views: ViewSpecs, *, image: int, tokens: int, classes: int, vocabulary: int, reads: Reads = "labels"
) -> Batch:
    """Return a batch of noise images with labels and captions.

    Uses torch's default device: under `torch.device("meta")`, the batch has shapes only.

    Args:
        count: number of samples.
        views: view specs of the recipe.
        image: default view size in pixels.
        tokens: tokens per caption.
        classes: exclusive upper limit of labels.
        vocabulary: exclusive upper limit of token ids.
        reads: further annotations of the samples.
    """
    objects = _COUNTED_OBJECTS if reads in ("boxes", "boxes_and_masks") else 0
    side = MASK_SIDE if reads == "boxes_and_masks" else 0
    pixels = image if reads == "masks" else 0
    sizes = view_sizes(views, image)
    large = sizes.count(image)
    small = sizes[-1] if large < len(sizes) else 0
    crops = torch.tensor([0.0, 0.0, image, image]).expand(len(sizes), count, 4)
    corners = torch.rand(count, objects, 2) * image / 2
    return Batch(
        images_VBCHW=torch.randint(0, 256, (large, count, 3, image, image), dtype=torch.uint8),
        small_VBCHW=torch.randint(0, 256, (len(sizes) - large, count, 3, small, small), dtype=torch.uint8),
        crops_VB4=crops,
        flips_VB=torch.zeros(len(sizes), count, dtype=torch.bool),
        sizes_B2=torch.full((count, 2), float(image)),
        labels_B=torch.randint(0, classes, (count,)),
        label_sets_B=torch.zeros(count, dtype=torch.int64),
        text_ids_BT=torch.randint(5, vocabulary, (count, tokens)),
        text_mask_BT=torch.ones(count, tokens, dtype=torch.bool),
        has_text_B=torch.ones(count, dtype=torch.bool),
        captions_B=torch.arange(1, count + 1),
        seeds_B=torch.randint(0, 2**62, (count,)),
        masks_BHW=torch.randint(0, min(classes, 255), (count, pixels, pixels), dtype=torch.uint8),
        boxes_BN4=torch.cat([corners, corners + image / 4], dim=-1),
        box_labels_BN=torch.randint(0, classes, (count, objects)),
        box_masks_BNMM=torch.ones(count, objects, side, side, dtype=torch.uint8),
        keys=[str(number) for number in range(count)],
    )


def _by_value(value: Any) -> Any:
    small = isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes <= _BY_VALUE_BYTES
    return value.detach().numpy() if small and (value.dtype in _BY_VALUE_TYPES or not value.nbytes) else value
