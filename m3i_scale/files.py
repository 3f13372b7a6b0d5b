"""Atomic writes of files and folders; paths to write to; reading and hashing of files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.text import redact_text

_BLOCK_BYTES = 1 << 20
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:/+")


def local_path(place: str | Path, where: str | None = None) -> Path:
    """Return a user's path to write to, with `~` expanded. Raise ConfigError for an address, a shell variable or an
    unknown user (a local folder of that name would be created), and for a shard that exists. `where` is the setting or
    option."""
    text = os.fspath(place)
    if (scheme := _ADDRESS.match(text)) is not None:
        address = text if "://" in text else f"{scheme[0]}/{text[scheme.end() :]}"  # Path collapses double slashes
        raise ConfigError(
            f"the output must be a local path, got the address '{redact_text(address)}'",
            where=where,
            why="a local folder of that name would be created",
            fix="use a folder on a disk or on a mounted file system, e.g. /data/runs/first",
        )
    if "$" in text:
        raise ConfigError(
            f"the output path must not have variables, got '{redact_text(text)}'",
            where=where,
            why="only a shell replaces `$NAME`; a local folder of that name would be created",
            fix="write out the path, or let the shell replace the variable (double quotes, not single ones)",
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(f"unknown user in the path '{text}'", where=where, fix="use an absolute path")
    path = Path(expanded)
    if path.suffix == ".tar" and os.path.exists(path):
        raise ConfigError(
            f"the output must not replace a shard, got '{path}'",
            where=where,
            why="shards are training data",
            fix="use another path, or remove the file first",
        )
    return path


def require_folder(folder: Path, where: str | None = None) -> Path:
    """Return a folder to read. Raise ConfigError if it does not exist, with similar paths next to it."""
    if folder.is_dir():
        return folder
    raise ConfigError(
        f"'{folder}' must be a folder, but it is a file" if folder.exists() else f"no such folder: '{folder}'",
        where=where or str(folder.absolute()),
        fix=similar_path(folder, otherwise="check the path"),
    )


def similar_path(missing: Path, otherwise: str) -> str:
    """Return the fix for a path that does not exist: similar paths in its folder, or `otherwise`."""
    names: list[str] = []
    with suppress(OSError):
        names = [item.name for item in missing.absolute().parent.iterdir()]
    return did_you_mean(missing.name, names, otherwise, parent=str(missing)[: -len(missing.name)])


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk. Raise OSError if the disk is full or broken; some
    file systems report it only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) and path.is_dir():
            return  # this file system does not support fsync on directories
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, mode: int | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end. After a kill or an error, the old file remains.
    Concurrent writers are safe: the last one wins. Errors name `path`.

    Args:
        path: target, in an existing folder.
        mode: file mode from the first byte on. None: 0666 minus the umask.
        durable: sync the file and its name to disk. False: for files that are recreated if a power cut corrupts them.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)  # the umask may have cleared some bits
            yield file
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        unnamed = error.filename is None and error.errno is not None  # errors of write(2) have no file name
        if unnamed or error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        with suppress(OSError):  # only exists after an error, and that error is more informative
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, text: str, *, mode: int | None = None, durable: bool = True) -> None:
    """Write a text file atomically: after a kill there is either the old or the new file (see `replacing`)."""
    with replacing(path, mode=mode, durable=durable) as file:
        file.write(text.encode())


@contextmanager
def atomic_dir(target: Path, *, replace: bool = False, alone: bool = False, durable: bool = True) -> Iterator[Path]:
    """Create an empty folder next to `target`. It is renamed to `target` once its files are on disk, and removed after
    an error. Partial folders of killed processes are removed by the next call on the same host.

    Args:
        target: missing, or an empty folder.
        replace: replace a non-empty `target` when the new folder is complete.
        alone: no other process on any host writes this target, so all partial folders are removed.
        durable: see `replacing`.
    """
    begun = f".{target.name}@{socket.gethostname()}.{os.getpid()}"
    folder, old = target.with_name(f"{begun}.partial"), target.with_name(f"{begun}.old")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target, alone)
    folder.mkdir()
    try:
        yield folder
        if durable:
            _sync_below(folder)
        if replace and target.is_dir():
            target.rename(old)
        folder.rename(target)
        if durable:
            sync(target.parent)
    except BaseException:
        if old.is_dir() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _remove_left(target: Path, alone: bool) -> None:
    for path in list(target.parent.iterdir()):
        name = re.fullmatch(rf"\.{re.escape(target.name)}@([^@]+)\.(\d+)\.(partial|old)", path.name)
        if name is None:
            continue
        host, process = name[1], int(name[2])  # a restarted container may have the same process id on the same host
        if alone or (host == socket.gethostname() and (process == os.getpid() or has_ended(process))):
            if name[3] == "old" and not target.exists():
                path.rename(target)  # killed before the rename
            else:
                shutil.rmtree(path, ignore_errors=True)


def has_ended(process: int) -> bool:
    """Return whether a process of this host has ended."""
    try:
        os.kill(process, 0)
    except OSError as error:  # PermissionError: a process of another user
        return isinstance(error, ProcessLookupError)
    return False


def _sync_below(folder: Path) -> None:
    for here, _, names in os.walk(folder, topdown=False):
        for path in (Path(here, name) for name in names):
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(here))


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder tree; links count as themselves, files removed meanwhile as 0."""
    total = 0
    for here, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                total += Path(here, name).lstat().st_size
    return total


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 in hexadecimal of one file, or of several files concatenated."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(block):
                digest.update(block[:size])
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def json_ready(value: Any) -> Any:
    """Return a value that JSON can represent: NaN and the infinities become "nan", "inf" and "-inf", which `float()`
    parses."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def json_text(value: Any) -> str:
    """Return a JSON document with one line per entry, for readable diffs."""
    return _json(value, indent=1)


def json_line(value: Any) -> str:
    """Return one line of a JSON Lines file."""
    return _json(value, indent=None)


def _json(value: Any, indent: int | None) -> str:
    text = json.dumps(json_ready(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace").decode()  # file names may be invalid Unicode


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a JSON document atomically; see `replacing`."""
    atomic_write(path, json_text(value), durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON document; raise ValueError if it is not JSON, not UTF-8, or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_lines(path: Path, containing: str = "") -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, only of lines with the text `containing`. Skip truncated lines."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if containing not in line:
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value
