"""Train the caption tokenizer of a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""In the order of their ids: padding is 0."""
MAX_ALPHABET = 1_000


def train_tokenizer(captions: Iterable[str], folder: Path, vocabulary: int) -> None:
    """Train a lowercase WordPiece tokenizer and save it in `folder` in the layout of `AutoTokenizer`.

    `vocabulary` is the maximum number of tokens, special tokens included.
    """
    captions = sorted(captions)
    learner = _pieces(models.WordPiece(unk_token="[UNK]"))
    # The trainer numbers inner characters in the order of a hash map, and breaks ties between merges by number.
    # Naming the characters beforehand makes the vocabulary deterministic.
    fixed = SPECIAL_TOKENS + [f"##{character}" for character in _alphabet(captions, learner)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=fixed, show_progress=False)
    learner.train_from_iterator(captions, trainer)
    tokenizer = _pieces(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)


def _pieces(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(captions: list[str], tokenizer: Tokenizer) -> list[str]:
    """Return the most frequent characters of the captions, up to the trainer's limit."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tokenizer.normalizer.normalize_str(caption).replace(" ", ""))
    return sorted(sorted(counts, key=lambda character: (-counts[character], character))[:MAX_ALPHABET])
