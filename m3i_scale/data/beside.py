"""Folders that lie beside remote shards, brought to this host."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from m3i_scale.data.faults import start_fix
from m3i_scale.data.places import Place, Url
from m3i_scale.data.remote import Access, read_file
from m3i_scale.errors import DataError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.txt")
"""What a folder that `AutoTokenizer` loads may hold; many servers do not list."""


def tokenizer_folder(place: Place, where: str = "", access: Access | None = None) -> Path | None:
    """A tokenizer folder on this host; None where there is none. Remote ones are kept by the hash of what they hold.

    Args:
        place: where it may lie.
        where: comes before the place in errors.
        access: how servers are asked.

    Raises:
        DataError: it cannot be read, or not be kept.
    """
    if not isinstance(place, Url):
        return place if place.is_dir() else None
    files: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        try:
            files[name] = read_file(place / name, access)
        except FileNotFoundError:
            if not files:
                return None
        except OSError as error:
            told = f"cannot read the tokenizer: {error}"
            raise DataError(told, where=f"{where}{place / name}", fix=start_fix(error)) from None
    return _kept(files)


def _kept(files: dict[str, bytes]) -> Path:
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    root = Access().cache_dir / "tokenizers"
    folder = root / digest.hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            return folder
        temporary = Path(tempfile.mkdtemp(dir=root, suffix=".partial"))
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(temporary)
    except OSError as error:
        raise DataError(f"cannot keep the tokenizer: {error}", where=str(root)) from None
    return folder
