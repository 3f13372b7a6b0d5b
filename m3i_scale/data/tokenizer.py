"""Caption tokenizer: trained by `shards make`, loaded by training and export."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m3i_scale.config import DatasetConfig
from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.address import Address, Url
from m3i_scale.data.remote.faults import start_fix
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.shards import shard_folder
from m3i_scale.errors import ConfigError, DataError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""In the order of their ids: padding is 0."""

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.txt")
"""Files that an `AutoTokenizer` folder may contain; needed because many servers cannot list folders."""

MAX_ALPHABET = 1_000
_LONG_LETTERS = 200
_ADDED = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")


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


def find_tokenizer(
    sources: dict[str, DatasetConfig], configured: str | None, access: Access | None = None
) -> PreTrainedTokenizerBase:
    """Load the `configured` tokenizer (`text.tokenizer`: a folder or a Hub id), or the one next to the shards of the
    first dataset that has one: `tokenizer/` in the folder of the shards or in its parent."""
    if configured is not None:
        return _load(configured, "text.tokenizer")
    places = []
    for name, source in sources.items():
        folder = shard_folder(source.path)
        for place in (folder / "tokenizer", folder.parent / "tokenizer"):
            tokenizer = _load_sidecar(place, name, access)
            if tokenizer is not None:
                return tokenizer
            places.append(str(place))
    raise ConfigError(
        "the recipe has a text target, but there is no tokenizer",
        where="text.tokenizer; looked in " + ", ".join(places or ["no dataset"]),
        fix="make the shards with `m3i-scale shards make`, which trains one, or set text.tokenizer",
    )


def check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that special tokens mark the start and the end of a text, as next-token prediction requires."""
    ends, text = (tokenizer(given)["input_ids"] for given in ("", "a"))
    if len(ends) < 2 or (ends[0], ends[-1]) != (text[0], text[-1]):
        raise ConfigError(
            f"the tokenizer '{tokenizer.name_or_path}' does not add special tokens at the start and the end of a text",
            where="text.tokenizer",
            why="captions are predicted token by token, from their first token to their end",
            fix="use one that does, such as the tokenizer of BERT or the one that `shards make` trains",
        )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all settings besides the vocabulary that determine tokens, as JSON types; large parts are hashed.

    Truncation and padding are omitted, because they are set at each call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a Python tokenizer, which has no description
        return {"class": type(tokenizer).__name__}
    parts = json.loads(backend.to_str())
    model = {key: value for key, value in parts["model"].items() if not isinstance(value, list | dict)}
    # Older versions of tokenizers store a merge as one string.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"].get("merges") or ()]
    scores = parts["model"]["vocab"] if isinstance(parts["model"]["vocab"], list) else None
    added = [[token.get(field) for field in _ADDED] for token in parts["added_tokens"]]
    return {
        **{part: _shortened(parts[part]) for part in ("normalizer", "pre_tokenizer", "post_processor")},
        "model": {**model, "merges_sha256": _sha256(merges), "scores_sha256": _sha256(scores)},
        "added_tokens_sha256": _sha256(added),
        "truncation_side": tokenizer.truncation_side,
    }


def _shortened(value: Any) -> Any:
    """Replace long strings, such as character tables, by their hashes."""
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return _sha256(value) if isinstance(value, str) and len(value) > _LONG_LETTERS else value


def _sha256(value: Any) -> str | None:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest() if value else None


def _load_sidecar(place: Address, source: str, access: Access | None) -> PreTrainedTokenizerBase | None:
    where = f"data.datasets.{source}"
    if isinstance(place, Path):
        return _load(str(place), where) if place.is_dir() else None
    with tempfile.TemporaryDirectory() as folder:
        return _load(folder, where, str(place)) if _copy_files(place, Path(folder), source, access) else None


def _copy_files(remote: Url, folder: Path, source: str, access: Access | None) -> bool:
    """Download a remote tokenizer; return whether it exists."""
    for name in TOKENIZER_FILES:
        try:
            data = read_file(remote / name, access)
        except FileNotFoundError:
            if name == TOKENIZER_FILES[0]:
                return False
            continue
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer: {error}",
                where=f"dataset '{source}': {remote / name}",
                fix=start_fix(error),
            ) from None
        (folder / name).write_bytes(data)
    return True


def _load(folder: str, where: str, name: str | None = None) -> PreTrainedTokenizerBase:
    name = name or folder
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=os.path.isdir(folder), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        # if a folder contains code, transformers recommends running it
        reason = "it contains custom code" if "trust_remote_code" in str(error) else str(error)
        raise ConfigError(f"cannot load the tokenizer '{name}': {reason}", where=where) from None
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer '{name}' has no padding token", where=where, fix="set pad_token in its files")
    tokenizer.name_or_path = name
    return tokenizer
