"""Addresses of files: a local path or a URL for fsspec. URLs and their display names contain no credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from m3i_scale.errors import DataError
from m3i_scale.text import without_secrets

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""Schemes of remote addresses. `file://` is a local path."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|:(?=[^\\/]))")


@dataclass(frozen=True, order=True)
class Url:
    """A remote address with the parts of pathlib's interface that shards need. `str` is safe for logs and state."""

    address: str
    """Address for fsspec."""

    @property
    def scheme(self) -> str:
        """Return the scheme: http, https, s3, gs or hf."""
        return self.address.partition(":")[0]

    @property
    def name(self) -> str:
        """Return the last path component."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Return the name without its last suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """Return the last suffix of the name."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        """Return the parent folder; for the root of a server, the root."""
        above = self.address.rstrip("/").rpartition("/")[0]
        return self if above.endswith(("/", ":")) else Url(above)

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.address.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.address


Address = Path | Url


def is_remote(shards: str) -> bool:
    """Return whether the `path` of a dataset is a remote address, not a local path."""
    scheme = _SCHEME.match(shards)
    return scheme is not None and scheme[1].lower() != "file"


def to_address(text: str, where: str = "shards") -> Address:
    """Parse a local path or a remote address."""
    if not is_remote(text):
        return Path(text.removeprefix("file://"))
    scheme = text.partition(":")[0]
    if scheme not in SCHEMES:
        what, fix = f"shards cannot be read from '{scheme}:'", f"a path, or one of {', '.join(SCHEMES)}"
    elif not text.startswith(f"{scheme}://"):
        what, fix = "not an address", f"{scheme}://…"
    elif scheme != "hf" and _has_login(text):
        what = "the address contains a user name or password, which config files and checkpoints would store"
        fix = "use ~/.netrc or the environment"
    elif "?" in text:
        what = "the address contains a query, which config files and checkpoints would store with any signature in it"
        fix = "remove the query; s3, gs and hf take their credentials from the environment"
    else:
        return Url(text)
    raise DataError(what, where=f"{where}: {without_secrets(text)}", fix=fix)


def _has_login(text: str) -> bool:
    # A password with a slash ends the parsed host early, which leaves a port that is not a number.
    host = urlsplit(text).netloc
    port = host.rpartition("]")[2].partition(":")[2]  # IPv6 addresses are in brackets
    return "@" in host or (bool(port) and not port.isdecimal())
