"""Information that a tokenizer loses: unknown tokens, truncated captions, and stripped marks."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from m3i_scale.data.tokenizer import find_tokenizer

UNKNOWN_SHARE, CUT_SHARE, STRIPPED_SHARE = 0.01, 0.05, 0.01
"""Fractions above which a warning is reported."""
_ACCENTS = range(0x300, 0x370)
"""Combining marks of European scripts; words mostly stay readable without them."""


@dataclass(frozen=True)
class Cut:
    """Tokenizer and maximum caption length."""

    tokenizer: str
    """Folder or Hub id."""
    max_tokens: int
    """Longer captions are truncated; includes special tokens."""


@dataclass
class CaptionTokens:
    """Statistics of tokenized captions."""

    captions: int = 0
    tokens: int = 0
    """Without special tokens."""
    unknown: int = 0
    having: Counter[str] = field(default_factory=Counter)
    """Number of captions that are `cut`, have an `unknown` token, or are `stripped` of marks."""

    def add(self, caption: str, cut: Cut) -> int:
        """Count a caption and return its number of tokens, special tokens included."""
        tokenizer = _tokenizer(cut.tokenizer)
        ids = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        length: int = len(ids) + tokenizer.num_special_tokens_to_add()
        unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        self.captions += 1
        self.tokens += len(ids)
        self.unknown += unknown
        facts = {
            "unknown": unknown > 0,
            "cut": length > cut.max_tokens,
            "stripped": _marks(_normalized(tokenizer, caption)) < _marks(caption),
        }
        self.having.update(name for name, holds in facts.items() if holds)
        return length

    def merge(self, other: CaptionTokens) -> None:
        """Add the counts of other captions."""
        self.captions += other.captions
        self.tokens += other.tokens
        self.unknown += other.unknown
        self.having.update(other.having)

    def report(self, cut: Cut) -> dict[str, Any]:
        """Return fractions of tokens and captions, and warnings, as JSON types."""
        shares = {
            "unknown_tokens": _share(self.unknown, self.tokens),
            "captions_with_unknown": _share(self.having["unknown"], self.captions),
            "captions_cut": _share(self.having["cut"], self.captions),
            "captions_stripped": _share(self.having["stripped"], self.captions),
        }
        told = []
        if shares["unknown_tokens"] > UNKNOWN_SHARE:
            told.append(f"{shares['unknown_tokens']:.1%} of the tokens are unknown: to the model all of them are one")
        if shares["captions_cut"] > CUT_SHARE:
            told.append(f"{shares['captions_cut']:.1%} of the captions have more than {cut.max_tokens} tokens: cut")
        if shares["captions_stripped"] > STRIPPED_SHARE:
            told.append(
                f"{shares['captions_stripped']:.1%} of the captions lose marks, such as vowels, to the tokenizer"
            )
        return {"tokenizer": cut.tokenizer, "max_tokens": cut.max_tokens, **shares, "warnings": told}


def tokenizer_for(folder: Path, configured: str | None) -> str | None:
    """Return the configured tokenizer, or the one in the shards' folder; None if there is neither.

    Args:
        folder: folder of the shards.
        configured: a folder or a Hub id.
    """
    beside = [str(place) for place in (folder / "tokenizer", folder.parent / "tokenizer") if place.is_dir()]
    name = configured or (beside[0] if beside else None)
    if name is not None:
        _tokenizer(name)
    return name


@functools.cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return find_tokenizer({}, name)


def _normalized(tokenizer: PreTrainedTokenizerBase, caption: str) -> str:
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return caption if normalizer is None or caption.isascii() else str(normalizer.normalize_str(caption))


def _marks(text: str) -> int:
    """Return the number of combining marks in a text in any normalization form, without accents of European scripts."""
    if text.isascii():
        return 0
    return sum(
        unicodedata.category(letter) == "Mn" and ord(letter) not in _ACCENTS
        for letter in unicodedata.normalize("NFD", text)
    )


def _share(count: int, total: int) -> float:
    return round(count / total, 6) if total else 0.0
