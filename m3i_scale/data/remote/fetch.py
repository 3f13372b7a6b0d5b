"""Reading of remote files through fsspec, with a time limit per attempt and retries.

The length of every read is checked, so truncated responses and ignored ranges never pass for data.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import selectors
import signal
import subprocess
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
from fsspec.asyn import sync

from m3i_scale.data.remote.access import Access, retried
from m3i_scale.data.remote.address import Address, Url
from m3i_scale.data.remote.faults import NO_RANGES, FaultError, RemoteReadError
from m3i_scale.errors import ConfigError, DataError

SMALL_FILE_BYTES = 256 << 20
"""Maximum size that is read of labels, manifests, indices and tokenizer files next to shards."""
PART_BYTES = 8 << 20
"""Request size for complete shards: an error costs one request only, and slow servers are detected early."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
_HTTP = ("http", "https")
_FRESH: dict[str, dict[str, Any]] = {"s3": {"refresh": True}, "hf": {"refresh": True}}
"""Arguments that make `info` query the server instead of a cached listing."""
_EXACT = {"hf": {"cache_type": "none"}}
"""Arguments that make `cat_file` read the requested range only, without megabytes of read-ahead."""
_PIPE_BLOCK = 1 << 20


@dataclass(frozen=True)
class Facts:
    """Size and version of a file on a server."""

    size: int
    version: str
    """Changes with the content: ETag, generation, hash or time; empty if the server sends none."""
    sha256: str = ""


class Output(Protocol):
    """Sink for a complete file, rewound to the start for every attempt."""

    def seek(self, offset: int, /) -> object:
        """Rewind to the start; `offset` is 0."""

    def write(self, data: bytes, /) -> object:
        """Write the next bytes of the file."""


def facts(url: Url, access: Access) -> Facts:
    """Query size and version of a file.

    Raises:
        FaultError: all attempts failed.
    """

    def once() -> Facts:
        info = _call(url, "info", access, **_FRESH.get(url.scheme, {}))
        if info.get("size") is None:
            raise FaultError("size unknown", "the server does not say how long the file is", lasting=True)
        sha256 = str((info.get("lfs") or {}).get("sha256") or "")
        names = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified")
        versions = [sha256, *(str(info.get(name) or "") for name in names)]
        return Facts(int(info["size"]), next(filter(None, versions), ""), sha256)

    return retried(once, access)


def read_range(url: Url, start: int, end: int, access: Access, version: str = "") -> bytes:
    """Read bytes [start, end) of a file.

    Args:
        url: must not be a pipe.
        start: first byte.
        end: byte after the last.
        access: attempts and time limit.
        version: expected version; another one is an error if the server sends it with every response (HTTP).

    Raises:
        FaultError: all attempts failed.
    """

    def once() -> bytes:
        if url.scheme in _HTTP:
            data = _http(url, access, end - start, version, f"bytes={start}-{end - 1}")
        else:
            data = _call(url, "cat_file", access, start=start, end=end, **_EXACT.get(url.scheme, {}))
        if len(data) != end - start:
            raise FaultError("cut off", f"{len(data)} of {end - start} bytes at {start}")
        return data

    return retried(once, access)


def read_file(place: Address, access: Access | None = None) -> bytes:
    """Read a small file next to shards.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: it cannot be read.
    """
    if not isinstance(place, Url):
        return place.read_bytes()
    limits = access or Access().at_start()

    def once() -> bytes | None:
        try:
            if place.scheme in _HTTP:
                return _http(place, limits, SMALL_FILE_BYTES)
            more = SMALL_FILE_BYTES + 1  # one extra byte detects a larger file
            data: bytes = _call(place, "cat_file", limits, start=0, end=more, **_EXACT.get(place.scheme, {}))
            if len(data) == more:
                raise _too_long(SMALL_FILE_BYTES)
        except FileNotFoundError:  # not retried: most folders lack most of these files
            return None
        return data

    try:
        data = retried(once, limits)
    except FaultError as fault:
        raise RemoteReadError(fault) from None
    if data is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(place))
    return data


def fetch(url: Url, out: Output, access: Access, size: int | None = None, version: str = "") -> int:
    """Download a file to `out` by range requests; in one piece from a pipe or a server without ranges.

    Args:
        url: file to download.
        out: rewound and rewritten by retries.
        access: attempts and time limit.
        size: in bytes; None if unknown before the end (pipe).
        version: expected version.

    Returns:
        Size in bytes.

    Raises:
        FaultError: all attempts failed.
        DataError: a pipe, and shell commands are not allowed.
    """
    if url.scheme != "pipe" and size is not None:
        try:
            out.seek(0)
            for start in range(0, size, PART_BYTES):
                out.write(read_range(url, start, min(size, start + PART_BYTES), access, version))
        except FaultError as fault:
            if not fault.not_ranged:
                raise
        else:
            return size
    return retried(lambda: _fetch_at_once(url, out, access, size, version), access)


def list_folder(url: Url, access: Access | None = None) -> list[Url]:
    """List the files directly in a folder.

    Raises:
        FaultError: all attempts failed.
    """
    access = access or Access().at_start()
    names = retried(lambda: _call(url, "ls", access, detail=False), access)
    return sorted({url / str(name).rstrip("/").rpartition("/")[2] for name in names})


def require_shell(url: Url, access: Access) -> None:
    """Raise an error for a pipe unless shell commands are allowed."""
    if url.scheme == "pipe" and not access.allow_shell:
        raise DataError(
            "the shards come out of a shell command, and those are not run",
            where=str(url),
            why="whoever can change the run file or a list of shards could run any program",
            fix="if you trust the commands: data.allow_shell=true",
        )


def filesystem(url: Url, access: Access) -> Any:
    """Return fsspec's file system for the scheme, one per process and thread because none survives a fork.

    Each one finds credentials in its usual places.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.scheme in _HTTP:
        options["client_kwargs"] = {"trust_env": True}  # proxies, ~/.netrc
    elif url.scheme == "s3":
        seconds = {"connect_timeout": access.timeout_s, "read_timeout": access.timeout_s}
        options["config_kwargs"] = {**seconds, "retries": {"total_max_attempts": 1}}
    try:
        files = fsspec.filesystem(url.scheme, **options)
    except ImportError:
        package = _PACKAGES[url.scheme]
        raise ConfigError(
            f"{url.scheme}:// needs the package {package}",
            where=str(url),
            fix=f"pip install {package}",
        ) from None
    if url.scheme == "s3":
        files.retries = 1  # retries are spread out and counted by `retried`
    elif url.scheme == "gs":
        # gcsfs retries six times, for longer than a request may take here, and has no setting for it.
        files._request = types.MethodType(type(files)._request.__wrapped__, files)
    return files


def _call(url: Url, method: str, access: Access, **options: Any) -> Any:
    """Send one request and return the result. Synchronous file systems have their own time limits."""
    files = filesystem(url, access)
    if files.async_impl:
        options["timeout"] = access.timeout_s
    return getattr(files, method)(url.address, **options)


def _http(url: Url, access: Access, limit: int, version: str = "", ranged: str = "") -> bytes:
    """Send one HTTP request and return the body.

    Raises:
        FaultError: the body exceeds `limit` or does not match the request.
        FileNotFoundError: the file does not exist.
    """
    data = bytearray()
    _request(url, access, _Limited(data.extend, limit), version, ranged)
    return bytes(data)


def _request(
    url: Url,
    access: Access,
    write: Callable[[bytes], object],
    version: str = "",
    ranged: str = "",
    limit_s: float | None = None,
) -> None:
    files = filesystem(url, access)
    answer = functools.partial(_answer, files, url.address, write, version, ranged, access.timeout_s)
    sync(files.loop, answer, timeout=limit_s or access.timeout_s)


async def _answer(
    files: Any, address: str, write: Callable[[bytes], object], version: str, ranged: str, silence_s: float
) -> None:
    """Read a response up to a limit and check its version.

    fsspec would read all of a file from a server without ranges, even endlessly, and does not notice another version.
    """
    from aiohttp import ClientTimeout

    session = await files.set_session()
    # The caller limits the total time; the session's default limit would abort full downloads after minutes.
    timeout = ClientTimeout(sock_connect=silence_s, sock_read=silence_s)
    headers = {"Accept-Encoding": "identity", **({"Range": ranged} if ranged else {})}
    async with session.get(files.encode_url(address), headers=headers, timeout=timeout) as answer:
        if answer.status == 404 and not ranged:
            raise FileNotFoundError(errno.ENOENT, "no such file", address)
        answer.raise_for_status()
        if ranged and answer.status != 206:
            raise FaultError(NO_RANGES, "the server sends whole files only", lasting=True)
        sent_range = answer.headers.get("Content-Range")  # truncation is detected by the length
        wanted_range = ranged.replace("=", " ").rpartition("-")[0]
        if ranged and sent_range is not None and not sent_range.startswith(f"{wanted_range}-"):
            raise FaultError("another range", f"asked for {ranged}, the server sent {sent_range[:100]}")
        sent_version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if version and sent_version != version:
            detail = f"version {version} was indexed, the server has {sent_version or 'none'}"
            raise FaultError("replaced", detail, lasting=True)
        async for block in answer.content.iter_any():
            write(block)


class _Limited:
    """Counting writer that limits the number of bytes."""

    def __init__(self, write: Callable[[bytes], object], limit: int) -> None:
        self._write, self._limit, self.count = write, limit, 0

    def __call__(self, data: bytes) -> None:
        self.count += len(data)
        if self.count > self._limit:
            raise _too_long(self._limit)
        self._write(data)


def _too_long(limit: int) -> FaultError:
    return FaultError("answer too long", f"more than {limit} bytes", lasting=True)


def _fetch_at_once(url: Url, out: Output, access: Access, size: int | None, version: str) -> int:
    out.seek(0)
    write = _Limited(out.write, access.cache_bytes if size is None else size)  # a larger file could not be cached
    if url.scheme == "pipe":
        require_shell(url, access)
        _run(url.address.removeprefix("pipe:"), write, access.timeout_s)
    else:  # the time limit is the sum over all parts
        parts = max(1, (size or 0) // PART_BYTES)
        _request(url, access, write, version, limit_s=access.timeout_s * parts)
    if size is not None and write.count != size:
        raise FaultError("cut off", f"{write.count} of {size} bytes")
    return write.count


def _run(command: str, write: Callable[[bytes], object], timeout_s: float) -> None:
    """Run a command and pass on its output. If one part of a pipeline fails, the pipeline fails."""
    with subprocess.Popen(
        ["bash", "-o", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            for block in _blocks(process, timeout_s):
                write(block)
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:  # kill all descendants of the command
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        raise FaultError("the command failed", f"exit code {code}")


def _blocks(process: subprocess.Popen[bytes], timeout_s: float) -> Iterator[bytes]:
    if process.stdout is None:
        raise RuntimeError("no pipe")
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(timeout_s):
                raise TimeoutError
            block = os.read(process.stdout.fileno(), _PIPE_BLOCK)
            if not block:
                return
            yield block
