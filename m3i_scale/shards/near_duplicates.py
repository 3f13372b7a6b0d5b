"""`m3i-scale shards near-duplicates`. Slow imports happen inside the functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import EXIT_USER_ERROR, ConfigError, DataError
from m3i_scale.options import AsJson
from m3i_scale.shards.options import Workers, print_summary, progress_bar
from m3i_scale.shards.process_pool import DEFAULT_WORKERS

if TYPE_CHECKING:
    from m3i_scale.shards.existing_shards import Advance

DISTANCE = 3
"""Default maximum number of different bits between the hashes of near-duplicates (docs/data.md)."""
SHOWN_GROUPS, SHOWN_IMAGES = 20, 5


def near_duplicates(
    shards: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single tars.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Shards of an evaluation: which of its images are in SHARDS? Repeatable.")
    ] = None,
    distance: Annotated[int, typer.Option(help="Maximum number of different bits of 64-bit hashes.")] = DISTANCE,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Larger images are left out.")] = MAX_IMAGE_PIXELS,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Find images that look alike, or images of an evaluation that are also in the training data.

    Exit code 2 if there are any. Nothing is changed.
    """
    with progress_bar([*shards, *(against or ())], quiet=as_json) as advance:
        report = find_near_duplicates(
            shards,
            against=against or (),
            distance=distance,
            max_pixels=max_image_pixels,
            workers=workers,
            advance=advance,
        )
    print_summary(report, as_json, _lines(report))
    if report.get("near_duplicates") or report.get("leaks"):
        raise typer.Exit(EXIT_USER_ERROR)


def find_near_duplicates(
    sources: Sequence[str],
    *,
    against: Sequence[str] = (),
    distance: int = DISTANCE,
    max_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = DEFAULT_WORKERS,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Return groups of similar images; with `against`, images of these evaluation shards that are also in the sources.

    Args:
        sources: folders of shards, brace patterns or single tars.
        distance: maximum number of different hash bits.
        max_pixels: skip larger images.
        advance: called with the size in bytes of every hashed shard.
    """
    from m3i_scale.shards.hashes import read_hashes
    from m3i_scale.shards.nearest import MAX_DISTANCE, report_of

    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"--distance {distance}", fix=f"0 to {MAX_DISTANCE} of 64 bits")
    _check_apart(sources, against)
    training, *evaluation = [
        read_hashes(some, max_pixels=max_pixels, workers=workers, advance=advance)
        for some in (sources, against)
        if some
    ]
    return report_of(training, evaluation[0] if evaluation else None, distance, sources)


def _check_apart(sources: Sequence[str], against: Sequence[str]) -> None:
    from m3i_scale.data.shards import local_shards

    seen: set[Path] = set()
    for path in (path.resolve() for source in (*sources, *against) for path in local_shards(source)):
        if path in seen:
            raise DataError("a shard is named twice", where=str(path), why="all of it would be its own duplicate")
        seen.add(path)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    if "leaks" in report:
        groups = [(leak["alike"] + 1, [leak, *leak["training"]]) for leak in report["leaks"]]
        head = f"{report['leaked']} of {report['evaluation_images']} images of the evaluation are like ones of"
        yield f"{head} {report['images']} images ({report['leaked_share']:.2%})"
    else:
        groups = [(group["size"], group["images"]) for group in report["near_duplicates"]]
        head = f"{report['groups']} groups of images that are alike: {report['beyond_first']} beyond the first"
        yield f"{head}, of {report['images']}"
    for size, group in groups[:SHOWN_GROUPS]:
        more = f" and {size - SHOWN_IMAGES} more" if size > SHOWN_IMAGES else ""
        yield f"{size}: {' '.join(map(_image, group[:SHOWN_IMAGES]))}{more}"
    if len(groups) > SHOWN_GROUPS:
        yield f"{len(groups) - SHOWN_GROUPS} more: --json lists all"
    for name in ("not_compared", "evaluation_not_compared"):
        for reason, count in report.get(name, {}).items():
            yield f"{name.replace('_', ' ')}: {count} × {reason}"


def _image(image: dict[str, Any]) -> str:
    name = f"{Path(image['shard']).name}/{image['key']}"
    if "distance" not in image:
        return name
    return f"{name} ({image['distance']}{', mirrored' if image['mirrored'] else ''})"
