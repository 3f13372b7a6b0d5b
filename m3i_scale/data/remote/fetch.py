"""Reading of remote files through fsspec, with a time limit per attempt and retries.

The length of every read is checked, so truncated responses and ignored ranges are detected. Functions other than
`read_file` raise `ReadError` after all attempts.
"""

from __future__ import annotations

import errno
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.asyn import sync

from m3i_scale.data.remote.access import Access, Address, Url
from m3i_scale.data.remote.read_errors import NO_RANGES, ReadError, retried
from m3i_scale.errors import ConfigError

SMALL_FILE_BYTES = 256 << 20
"""Maximum size of labels, manifests, indices and tokenizer files next to shards."""
PART_BYTES = 8 << 20
"""Request size for complete shards: an error costs one request only, and slow servers are detected early."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
_HTTP = ("http", "https")
_FRESH: dict[str, dict[str, Any]] = {"s3": {"refresh": True}, "hf": {"refresh": True}}
"""Arguments that make `info` query the server instead of a cached listing."""
_EXACT = {"hf": {"cache_type": "none"}}
"""Arguments that make `cat_file` read the requested range only, without megabytes of read-ahead."""
_FILE_SYSTEMS: dict[int, Any] = {}
"""All file systems by `id`, never closed. If a forked process closed inherited sessions, it would remove their
connections from the epoll set that it shares with its parent, and requests of the parent would stall."""


@dataclass(frozen=True)
class Facts:
    """Size and version of a file on a server."""

    size: int
    version: str
    """Changes with the content: ETag, generation, hash or time; empty if the server sends none."""


def facts(url: Url, access: Access) -> Facts:
    """Query size and version of a file."""

    def once() -> Facts:
        info = _call(url, "info", access, **_FRESH.get(url.scheme, {}))
        if info.get("size") is None:
            raise ReadError("size unknown", "the server does not send the size of the file", lasting=True)
        sha256 = str((info.get("lfs") or {}).get("sha256") or "")
        names = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified")
        versions = [sha256, *(str(info.get(name) or "") for name in names)]
        return Facts(int(info["size"]), next(filter(None, versions), ""))

    return retried(once, access)


def read_range(url: Url, start: int, end: int, access: Access, version: str = "") -> bytes:
    """Read bytes [start, end) of a file. Over HTTP, a response without `version` (if it is given) is an error."""

    def once() -> bytes:
        if url.scheme in _HTTP:
            data = _http(url, access, end - start, version, f"bytes={start}-{end - 1}")
        else:
            data = _call(url, "cat_file", access, start=start, end=end, **_EXACT.get(url.scheme, {}))
        if len(data) != end - start:
            raise ReadError("cut off", f"{len(data)} of {end - start} bytes at {start}")
        return data

    return retried(once, access)


def read_file(place: Address, access: Access | None = None) -> bytes:
    """Read a small file next to shards. Raise FileNotFoundError if it is missing, OSError if it cannot be read."""
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
    except ReadError as error:
        raise OSError(f"{error.reason}: {error.detail}") from error  # `start_fix` reads the cause
    if data is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(place))
    return data


def read_parts(url: Url, size: int, access: Access, version: str = "") -> Iterator[bytes]:
    """Read a complete file of `size` bytes by range requests; `version` as in `read_range`."""
    for start in range(0, size, PART_BYTES):
        yield read_range(url, start, min(size, start + PART_BYTES), access, version)


def list_folder(url: Url, access: Access | None = None) -> list[Url]:
    """List the files directly in a folder."""
    access = access or Access().at_start()
    names = retried(lambda: _call(url, "ls", access, detail=False), access)
    return sorted({url / str(name).rstrip("/").rpartition("/")[2] for name in names})


def filesystem(url: Url, access: Access) -> Any:
    """Return fsspec's file system for the scheme, one per process and thread because none survives a fork. It finds
    credentials in the usual places of its service."""
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
            fix=f"run `pip install {package}`",
        ) from None
    _FILE_SYSTEMS[id(files)] = files
    if url.scheme == "s3":
        files.retries = 1  # retries are spread out and counted by `retried`
    elif url.scheme == "gs":
        # gcsfs retries six times, for longer than a request may take here, and has no setting for it.
        files._request = types.MethodType(type(files)._request.__wrapped__, files)
    return files


def _call(url: Url, method: str, access: Access, **options: Any) -> Any:
    """Send one request and return the result. Synchronous file systems apply their built-in time limits."""
    files = filesystem(url, access)
    if files.async_impl:
        options["timeout"] = access.timeout_s
    return getattr(files, method)(url.address, **options)


def _http(url: Url, access: Access, limit: int, version: str = "", ranged: str = "") -> bytes:
    """Send one HTTP request and return the body. Raise `ReadError` if it exceeds `limit` or does not match the
    request, FileNotFoundError if the file does not exist."""
    files = filesystem(url, access)
    data: bytes = sync(files.loop, _answer, files, url.address, limit, version, ranged, timeout=access.timeout_s)
    return data


async def _answer(files: Any, address: str, limit: int, version: str, ranged: str) -> bytes:
    """Read a response up to a limit and check its version.

    fsspec would download complete files from servers without ranges, even endless ones, and does not check versions.
    """
    from aiohttp import ClientTimeout

    session = await files.set_session()
    headers = {"Accept-Encoding": "identity", **({"Range": ranged} if ranged else {})}
    # The caller limits the total time. The default limit of the session, five minutes, would override a longer one.
    async with session.get(files.encode_url(address), headers=headers, timeout=ClientTimeout()) as answer:
        if answer.status == 404 and not ranged:
            raise FileNotFoundError(errno.ENOENT, "no such file", address)
        answer.raise_for_status()
        if ranged and answer.status != 206:
            # Retried: a cache between may answer so now and then.
            raise ReadError(NO_RANGES, "the server ignores range requests and sends the complete file")
        sent_range = answer.headers.get("Content-Range")  # truncation is detected by the length
        wanted_range = ranged.replace("=", " ").rpartition("-")[0]
        if ranged and sent_range is not None and not sent_range.startswith(f"{wanted_range}-"):
            raise ReadError("another range", f"asked for {ranged}, the server sent {sent_range[:100]}")
        sent_version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if version and sent_version != version:
            detail = f"version {version} was indexed, the server has {sent_version or 'none'}"
            raise ReadError("replaced", detail, lasting=True)
        data = bytearray()
        async for block in answer.content.iter_any():
            data += block
            if len(data) > limit:
                raise _too_long(limit)
    return bytes(data)


def _too_long(limit: int) -> ReadError:
    return ReadError("answer too long", f"more than {limit} bytes", lasting=True)
