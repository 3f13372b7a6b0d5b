"""Manifests, which list the files of a directory with sizes and digests, and verification of directories."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from m3i_scale.checkpoint.layout import MANIFEST, checkpoints, step_of
from m3i_scale.errors import CheckpointError
from m3i_scale.files import sha256_of, sha256_of_json, sync

FORMAT = 1
_THREADS = 4  # hashing releases the interpreter lock; more threads than this only make a disk seek


@dataclass(frozen=True)
class Digest:
    """Size in bytes and hexadecimal SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class FileError:
    """A verification error of a committed folder; `line` is the text for one line of output."""

    file: str
    """Path relative to the folder, with `/`; `.` for the folder itself."""
    what: str
    line: str


class Manifest(BaseModel):
    """The contents of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    """Version of this layout."""
    extra: dict[str, Any]
    """Metadata from the writer: step, world size, configuration hash, …"""
    files: dict[str, Digest]
    """Digests, by path relative to the folder, with `/`; without the manifest itself."""


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Sync files of `folder` to disk and hash them; `names` are relative paths with `/`."""

    def digest(name: str) -> tuple[str, Digest]:
        path = folder / name
        sync(path)
        return name, Digest(path.stat().st_size, sha256_of(path))

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
        return dict(pool.map(digest, sorted(names)))


def list_files(folder: Path) -> list[str]:
    """Return every file in the tree of `folder` as a path with `/`, sorted, without the manifest of the folder itself.
    Raise CheckpointError for a link or a special file, because a manifest cannot cover its contents."""
    names = []
    for here, folders, files in os.walk(folder, onerror=raise_error):
        # os.walk does not follow links to directories, but lists them as directories
        links = [name for name in folders if Path(here, name).is_symlink()]
        for path in (Path(here, name) for name in files + links):
            name = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(path.lstat().st_mode):
                raise CheckpointError(f"'{name}' is neither a file nor a directory", where=str(path), fix="remove it")
            if name != MANIFEST:
                names.append(name)
    return sorted(names)


def write_manifest(folder: Path, files: Mapping[str, Digest], extra: Mapping[str, Any]) -> None:
    """Write `manifest.json` and sync it to disk; raise TypeError or ValueError if `extra` is not JSON (NaN is not)."""
    text = _render(Manifest(format=FORMAT, extra=dict(extra), files=dict(files)))
    path = folder / MANIFEST
    try:
        path.write_bytes(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync(path)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a committed folder, without checking the listed files."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            "no manifest: the save was not completed", where=str(path), fix="use another checkpoint of the run"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"the manifest cannot be read: {error.strerror}",
            where=str(path),
            fix="make the file readable, or use another checkpoint of the run",
        ) from None
    torn = CheckpointError("the manifest is corrupt", where=str(path), fix="use another checkpoint of the run")
    try:
        values = json.loads(raw)
        values.pop("sha256")
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"the manifest has format {values['format']}, but this version reads {FORMAT}",
                where=str(path),
                fix="use the version of this package that saved the checkpoint",
            )
        manifest = Manifest.model_validate(values)
        rendered = _render(manifest)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, ValidationError):
        raise torn from None
    if raw != rendered:  # rendering is deterministic, so any changed byte shows
        raise torn
    return manifest


def _render(manifest: Manifest) -> bytes:
    body = manifest.model_dump()
    body["sha256"] = sha256_of_json(body)
    return (json.dumps(body, sort_keys=True, allow_nan=False, indent=1) + "\n").encode()


def verify(path: Path, *, contents: bool = True) -> list[str]:
    """Return the verification errors of a committed folder, one line each; [] if it is valid. `contents=False` compares
    names and sizes only, which misses a flipped bit."""
    return [error.line for error in find_errors(path, contents=contents)]


def find_errors(
    path: Path, *, contents: bool = True, advance: Callable[[int], None] = lambda size: None
) -> list[FileError]:
    """Return the verification errors of a committed folder, file by file; [] if it is valid. See `verify`. `advance` is
    called with the bytes of every checked file, from any thread."""
    try:
        manifest = read_manifest(path)
        present = set(list_files(path))
    except CheckpointError as error:
        file = Path(error.where or path).relative_to(path).as_posix()
        return [FileError(file, error.what, error.what)]
    except OSError as error:
        what = f"the folder cannot be read: {error.strerror}"
        return [FileError(".", what, what)]
    errors = list(_name_errors(path, manifest))
    errors += [_error_in(name, "missing") for name in sorted(manifest.files.keys() - present)]
    errors += [_error_in(name, "not in the manifest") for name in sorted(present - manifest.files.keys())]

    def verify_file(name: str) -> FileError | None:
        what = _check_file(path / name, manifest.files[name], contents)
        advance(manifest.files[name].size)
        return None if what is None else _error_in(name, what)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        results = pool.map(verify_file, sorted(present & manifest.files.keys()))
        return errors + [error for error in results if error is not None]


def newest_good(root: Path, *, contents: bool = True) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest valid checkpoint, and the newer ones that were skipped, each with the reason. `contents` reads
    every byte of the returned checkpoint, so call it on one rank only; for False see `verify`."""
    passed_over: list[tuple[Path, str]] = []
    for path in checkpoints(root):
        errors = verify(path, contents=contents)
        if not errors:
            return path, passed_over
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        passed_over.append((path, errors[0] + more))
    return None, passed_over


def _name_errors(path: Path, manifest: Manifest) -> Iterator[FileError]:
    """Yield an error if a folder was copied or renamed to another step: a run would resume at the contained step and
    find the name in use when it saves."""
    named, held = step_of(path), manifest.extra.get("step")
    if named is not None and held is not None and named != held:
        what = f"the folder name says step {named}, but the checkpoint is of step {held}"
        yield FileError(".", what, what)


def _check_file(path: Path, wanted: Digest, contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted.size:
            return f"{size:,} bytes, the manifest says {wanted.size:,}"
        if contents and sha256_of(path) != wanted.sha256:
            return "the contents have changed (SHA-256 differs)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _error_in(name: str, what: str) -> FileError:
    return FileError(name, what, f"{name}: {what}")


def raise_error(error: OSError) -> None:
    """Raise an error of `os.walk`, which ignores them by default."""
    raise error
