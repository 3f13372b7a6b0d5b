"""Put samples together to a part of a micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.data.batch import Batch
from m3i_scale.data.views import Views


@dataclass(frozen=True)
class Sample:
    """One good sample."""

    views: Views
    label: int | None
    label_set: int
    caption: str | None
    seed: int
    key: str


class Collator:
    """Samples → Batch. Captions are cut to `max_tokens` and padded to the longest of the part.

    Args:
        tokenizer: None leaves captions out.
        max_tokens: special tokens included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """A batch of B samples, in order."""
        captions = [sample.caption if self._tokenizer is not None else None for sample in samples]
        ids_BT, mask_BT = self._tokens(captions)
        crops = [
            [[crop.top, crop.left, crop.height, crop.width] for crop in views]
            for views in zip(*(sample.views.crops for sample in samples), strict=True)
        ]
        flips = [
            [crop.flip for crop in views] for views in zip(*(sample.views.crops for sample in samples), strict=True)
        ]
        sets = [-1 if sample.label is None else sample.label_set for sample in samples]
        return Batch(
            images_VBCHW=torch.from_numpy(np.stack([sample.views.pixels_VCHW for sample in samples], axis=1)),
            crops_VB4=torch.tensor(crops, dtype=torch.float32),
            flips_VB=torch.tensor(flips, dtype=torch.bool),
            sizes_B2=torch.tensor([sample.views.size for sample in samples], dtype=torch.float32),
            labels_B=torch.tensor([-1 if sample.label is None else sample.label for sample in samples]),
            label_sets_B=torch.tensor(sets),
            text_ids_BT=ids_BT,
            text_mask_BT=mask_BT,
            has_text_B=torch.tensor([caption is not None for caption in captions]),
            captions_B=torch.tensor([caption_hash(caption) for caption in captions]),
            seeds_B=torch.tensor([sample.seed for sample in samples]),
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
        ids_BT = np.full((len(rows), width), padding, dtype=np.int64)
        mask_BT = np.zeros((len(rows), width), dtype=np.bool_)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = row
            mask_BT[number, : len(row)] = True
        return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


def caption_hash(caption: str | None) -> int:
    """A positive 63-bit number, equal for equal captions; 0 for none."""
    if caption is None:
        return 0
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1 | 1
