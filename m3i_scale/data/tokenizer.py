"""Load the caption tokenizer, from `text.tokenizer` or from a folder next to the shards."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from m3i_scale.config import DatasetConfig
from m3i_scale.data.remote.access import Access, Address, Url
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.remote.read_errors import start_fix
from m3i_scale.data.shards import shard_folder
from m3i_scale.errors import ConfigError, DataError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.txt")
"""Files that an `AutoTokenizer` folder may contain; needed because many servers cannot list folders."""

_LONG_LETTERS = 200
_ADDED = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")


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
        raise ConfigError(
            f"cannot load the tokenizer '{name}': {reason}",
            where=where,
            fix="check the path or the Hub id (needs a network)",
        ) from None
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer '{name}' has no padding token", where=where, fix="set pad_token in its files")
    tokenizer.name_or_path = name
    return tokenizer
