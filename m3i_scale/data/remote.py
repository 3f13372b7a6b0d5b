"""Bytes of remote files through fsspec: each attempt has a time limit, and is repeated with back-off and full jitter.

Every read is checked to be of the length that was asked for, so what is cut off or not ranged never passes for data.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import io
import math
import os
import selectors
import signal
import subprocess
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.asyn import sync
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    wait_combine,
    wait_random_exponential,
)

from m3i_scale.data.faults import FaultError, RemoteReadError, to_fault
from m3i_scale.data.places import Place, Url
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import ConfigError

SMALL_FILE_BYTES = 256 << 20
"""Labels, manifests, indices and tokenizers beside shards are not larger; the most that is read of one."""
PART_BYTES = 8 << 20
"""Whole shards are fetched in requests of this size: a fault costs one of them, and a slow server is soon noticed."""
BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_PAUSE_S = 300.0
"""A server that wants to be left alone for longer is asked after this time all the same."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
_HTTP = ("http", "https")
_FRESH: dict[str, dict[str, Any]] = {"s3": {"refresh": True}, "hf": {"refresh": True}}
"""How `info` is told to ask the server, and not a listing that it remembers."""
_EXACT = {"hf": {"cache_type": "none"}}
"""How `cat_file` is told to read what is asked for, and not megabytes ahead."""
_PIPE_BLOCK = 1 << 20

Result = TypeVar("Result")


def default_cache_dir() -> Path:
    """Where caches lie by convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3i-scale"


@dataclass(frozen=True)
class Access:
    """How shards are read, remote ones above all."""

    attempts: int = 8
    """Of every request, before the shard counts as bad."""
    timeout_s: float = 60.0
    """Of one request, from its start to its last byte."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    cache_bytes: int = 50 << 30
    """0: nothing is fetched whole, every sample is read by range."""
    allow_shell: bool = False
    start_timeout_s: float = 20.0
    """Of a small request before the first step, all its attempts together."""
    patience_s: float = math.inf
    """Of any request, all its attempts together; pauses that the server asked for are not cut short."""
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    """A larger sample is not read, wherever it lies."""

    def at_start(self) -> Access:
        """For small requests before the first step: somebody waits for the answer, and may mend what is wrong."""
        limit = self.start_timeout_s
        return dataclasses.replace(self, timeout_s=min(self.timeout_s, limit), patience_s=limit)


@dataclass(frozen=True)
class Facts:
    """What a server says of a file."""

    size: int
    version: str
    """Another one when the content is another: ETag, generation, hash or time; empty where the server has none."""
    sha256: str = ""


def facts(url: Url, access: Access) -> Facts:
    """Size and version of a file, asked of the server.

    Raises:
        FaultError: after all attempts.
    """
    return retried(lambda: _facts(url, access), access)


def read_range(url: Url, start: int, end: int, access: Access, version: str = "") -> bytes:
    """Bytes [start, end) of a file.

    Args:
        url: no pipe.
        start: first byte.
        end: byte after the last.
        access: attempts and time limit.
        version: of the file; refuses another where the server tells it with every answer (http).

    Raises:
        FaultError: after all attempts.
    """
    return retried(lambda: _range(url, start, end, access, version), access)


def read_file(place: Place, access: Access | None = None) -> bytes:
    """A whole small file beside shards.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
    """
    if not isinstance(place, Url):
        return place.read_bytes()
    access, found = access or Access().at_start(), None

    def whole() -> bytes | None:
        try:
            if place.scheme in _HTTP:
                return _http(place, access, SMALL_FILE_BYTES)
            more = SMALL_FILE_BYTES + 1  # one byte more than may be tells that there are more
            data: bytes = _call(place, "cat_file", access, start=0, end=more, **_EXACT.get(place.scheme, {}))
            if len(data) == more:
                raise _too_long(SMALL_FILE_BYTES)
        except FileNotFoundError:  # most folders lack most of these files: that is no reason to ask again
            return None
        return data

    try:
        found = retried(whole, access)
    except FaultError as fault:
        raise RemoteReadError(fault) from None
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(place))
    return found


def fetch(
    url: Url,
    size: int,
    out: BinaryIO,
    access: Access,
    version: str = "",
    *,
    arrived: int = 0,
    note: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a whole file of known size and version to `out`.

    Args:
        url: of the file.
        size: in bytes.
        out: from its beginning on.
        access: attempts and time limit.
        version: of the file.
        arrived: bytes that `out` has already.
        note: called with the bytes that have arrived, after each part; never of a pipe or without ranges.

    Raises:
        FaultError: after all attempts.
    """
    if url.scheme == "pipe":
        retried(lambda: _run_pipe(url, out, access, size), access)
        return
    try:
        out.seek(arrived)
        for start in range(arrived, size, PART_BYTES):
            end = min(size, start + PART_BYTES)
            out.write(read_range(url, start, end, access, version))
            note(end)
    except FaultError as fault:
        if not fault.not_ranged:
            raise
        retried(lambda: _stream(url, out, access, size), access)


def fetch_pipe(url: Url, out: BinaryIO, access: Access) -> int:
    """What a command writes, whose size is not known yet; the number of bytes.

    Raises:
        FaultError: after all attempts.
    """
    return retried(lambda: _run_pipe(url, out, access, None), access)


def list_folder(url: Url, access: Access | None = None) -> list[Url]:
    """Files directly in a folder.

    Raises:
        FaultError: after all attempts.
    """
    access = access or Access().at_start()
    names = retried(lambda: _call(url, "ls", access, detail=False), access)
    return sorted({url / str(name).rstrip("/").rpartition("/")[2] for name in names})


def filesystem(url: Url, access: Access) -> Any:
    """fsspec's file system of the scheme, one per process and thread: they do not survive a fork.

    Credentials are found by the usual chains of each.

    Raises:
        ConfigError: the package that reads the scheme is not installed.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.scheme in _HTTP:
        options["client_kwargs"] = {"trust_env": True}  # proxies, ~/.netrc
    elif url.scheme == "s3":
        seconds = {"connect_timeout": access.timeout_s, "read_timeout": access.timeout_s}
        options["config_kwargs"] = {**seconds, "retries": {"total_max_attempts": 1}}
    try:
        found = fsspec.filesystem(url.scheme, **options)
    except ImportError:
        package = _PACKAGES[url.scheme]
        raise ConfigError(
            f"{url.scheme}:// needs the package {package}",
            where=str(url),
            fix=f"pip install {package}",
        ) from None
    if url.scheme == "s3":
        found.retries = 1  # ours are spread out, and counted
    elif url.scheme == "gs":
        found._request = types.MethodType(type(found)._request.__wrapped__, found)  # likewise: it has no setting for it
    return found


def _call(url: Url, method: str, access: Access, **options: Any) -> Any:
    """One request. Synchronous file systems have time limits of their own."""
    files = filesystem(url, access)
    if files.async_impl:
        options["timeout"] = access.timeout_s
    return getattr(files, method)(url.address, **options)


def retried(attempt: Callable[[], Result], access: Access, lasting: tuple[type[Exception], ...] = ()) -> Result:
    """The result of an attempt that is repeated while it fails.

    Args:
        attempt: is called again after every `FaultError`, and after every error that stands for one.
        access: how often.
        lasting: errors that another attempt would not mend.

    Raises:
        FaultError: that of the last attempt.
    """

    def once() -> Result:
        try:
            return attempt()
        except Exception as error:
            fault = to_fault(error, access.timeout_s)
            if isinstance(fault, FaultError):
                fault.lasting |= isinstance(error, lasting)
            raise fault from error

    # Random over the whole interval ("full jitter"), or a thousand readers would all come back at the same moments.
    for trial in Retrying(
        stop=functools.partial(_gives_up, access),
        wait=wait_combine(_pause_wanted, wait_random_exponential(multiplier=BACKOFF_S, max=MAX_BACKOFF_S)),
        retry=retry_if_exception(lambda error: isinstance(error, FaultError) and not error.lasting),
        reraise=True,
    ):
        with trial:
            return once()
    raise RuntimeError("tenacity ended without a result")


def _pause_wanted(state: RetryCallState) -> float:
    fault = state.outcome.exception() if state.outcome else None
    return min(MAX_PAUSE_S, fault.pause_s) if isinstance(fault, FaultError) else 0.0


def _gives_up(access: Access, state: RetryCallState) -> bool:
    if state.attempt_number >= access.attempts:
        return True
    waited_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
    return not _pause_wanted(state) and waited_s > access.patience_s


def _facts(url: Url, access: Access) -> Facts:
    info = _call(url, "info", access, **_FRESH.get(url.scheme, {}))
    if info.get("size") is None:
        raise FaultError("size unknown", "the server does not say how long the file is", lasting=True)
    lfs = info.get("lfs") or {}
    names = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified")
    told = [str(lfs.get("sha256") or ""), *(str(info.get(name) or "") for name in names)]
    return Facts(int(info["size"]), next(filter(None, told), ""), str(lfs.get("sha256") or ""))


def _range(url: Url, start: int, end: int, access: Access, version: str) -> bytes:
    if url.scheme in _HTTP:
        data = _http(url, access, end - start, version, f"bytes={start}-{end - 1}")
    else:
        data = _call(url, "cat_file", access, start=start, end=end, **_EXACT.get(url.scheme, {}))
    if len(data) != end - start:
        raise FaultError("cut off", f"{len(data)} of {end - start} bytes at {start}")
    return data


def _http(url: Url, access: Access, most: int, version: str = "", ranged: str = "") -> bytes:
    """Return the answer to one request, of which no more than `most` bytes are read.

    Raises:
        FaultError: it is longer, or not what was asked for.
        FileNotFoundError: there is no such file.
    """
    files = filesystem(url, access)
    found = sync(files.loop, _answer, files, url.address, most, version, ranged, timeout=access.timeout_s)
    return cast(bytes, found)


async def _answer(files: Any, address: str, most: int, version: str, ranged: str) -> bytes:
    """Read an answer as fsspec's own would not: that reads all of a file whose server knows no ranges, or never ends,
    and sees no other version."""
    session = await files.set_session()
    headers = {"Accept-Encoding": "identity", **({"Range": ranged} if ranged else {})}
    async with session.get(files.encode_url(address), headers=headers) as answer:
        if answer.status == 404 and not ranged:
            raise FileNotFoundError(errno.ENOENT, "no such file", address)
        answer.raise_for_status()
        if ranged and answer.status != 206:
            raise FaultError("no ranges", "the server sends whole files only", not_ranged=True, lasting=True)
        sent = answer.headers.get("Content-Range")  # of what ends early the length tells
        wanted = ranged.replace("=", " ").rpartition("-")[0]
        if ranged and sent is not None and not sent.startswith(f"{wanted}-"):
            raise FaultError("another range", f"asked for {ranged}, the server sent {sent[:100]}")
        told = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if version and told != version:
            raise FaultError(
                "replaced", f"version {version} was indexed, the server has {told or 'none'}", lasting=True
            )
        data = bytearray()
        async for block in answer.content.iter_any():
            data += block
            if len(data) > most:
                raise _too_long(most)
        return bytes(data)


def _too_long(most: int) -> FaultError:
    return FaultError("answer too long", f"more than {most} bytes", lasting=True)


class _Limited:
    """A file for fsspec to write to, up to a size."""

    def __init__(self, out: BinaryIO, size: int) -> None:
        self._out, self._size = out, size
        self.read, self.tell, self.close = out.read, out.tell, out.close

    def write(self, data: bytes) -> int:
        if self._out.tell() + len(data) > self._size:
            raise _too_long(self._size)
        return self._out.write(data)


def _stream(url: Url, out: BinaryIO, access: Access, size: int) -> None:
    """A file from beginning to end, from a server that knows no ranges."""
    out.seek(0)
    _call(url, "get_file", _whole(access, size), lpath=_Limited(out, size), headers={"Accept-Encoding": "identity"})
    if out.tell() != size:
        raise FaultError("cut off", f"{out.tell()} of {size} bytes")


def _whole(access: Access, size: int) -> Access:
    """A time limit for a whole file in one request: as long as all its parts would have."""
    return Access(access.attempts, access.timeout_s * max(1, size // PART_BYTES))


def _run_pipe(url: Url, out: BinaryIO, access: Access, size: int | None) -> int:
    """Run a command and keep what it writes. A failing part of a pipeline fails the whole."""
    out.seek(0)
    command = ["bash", "-o", "pipefail", "-c", url.address.removeprefix("pipe:")]
    total, most = 0, access.cache_bytes if size is None else size  # what is larger than the cache cannot be kept
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process,
        _ended(process),
    ):
        for block in _blocks(process, access.timeout_s):
            total += len(block)
            if total > most:
                raise _too_long(most)
            out.write(block)
        code = process.wait(access.timeout_s)
    if code:
        raise FaultError("the command failed", f"exit code {code}")
    if size is not None and total != size:
        raise FaultError("cut off", f"{total} of {size} bytes")
    return total


def _blocks(process: subprocess.Popen[bytes], timeout_s: float) -> Iterator[bytes]:
    if process.stdout is None:
        raise RuntimeError("no pipe")
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(timeout_s):
                raise asyncio.TimeoutError
            block = os.read(process.stdout.fileno(), _PIPE_BLOCK)
            if not block:
                return
            yield block


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Nothing of the command outlives its use, whatever it has started itself."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class RangedFile(io.RawIOBase):
    """A remote file that can be sought, for one reading from front to back with gaps. Wrap it in a BufferedReader."""

    def __init__(self, url: Url, size: int, access: Access) -> None:
        self._url, self._size, self._access = url, size, access
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte; nothing is read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file goes."""
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        buffer[:count] = read_range(self._url, self._position, self._position + count, self._access)
        self._position += count
        return count
