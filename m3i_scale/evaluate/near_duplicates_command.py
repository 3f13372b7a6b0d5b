"""`m3i-scale shards near-duplicates`. Slow imports happen inside the functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from m3i_scale.data.workers import DEFAULT_WORKERS
from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.options import AsJson
from m3i_scale.output import leave_out_accelerator_warning
from m3i_scale.shards.options import print_summary, progress_bar

SHOWN_GROUPS, SHOWN_IMAGES = 20, 5


def near_duplicates(
    shards: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single tars.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Shards of an evaluation: which of its images are in SHARDS? Repeatable.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Compare features of this model, an export or any Hub folder, not hashes.")
    ] = None,
    distance: Annotated[int | None, typer.Option(help="Of 64 bits of the hashes, so many may differ (3).")] = None,
    similarity: Annotated[float | None, typer.Option(help="With --features: the least cosine (0.98).")] = None,
    device: Annotated[str | None, typer.Option(help="With --features: auto (default), cpu, cuda, cuda:1 …")] = None,
    max_image_pixels: Annotated[
        int | None, typer.Option(min=1, help="Of hashes: larger images are left out (89,478,485).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help=f"Of hashes: processes that read shards ({DEFAULT_WORKERS}).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find images that look alike, or images of an evaluation that are also in the training data.

    Exit code 2 if there are any. Nothing is changed.
    """
    leave_out_accelerator_warning()
    from m3i_scale.evaluate.near_duplicates import find_near_duplicates

    with progress_bar([*shards, *(against or ())], quiet=as_json or features is not None) as advance:
        report = find_near_duplicates(
            shards,
            against=against or (),
            features=features,
            distance=distance,
            similarity=similarity,
            max_pixels=max_image_pixels,
            workers=workers,
            device=device,
            advance=advance,
        )
    print_summary(report, as_json, _lines(report))
    if report.get("near_duplicates") or report.get("leaks"):
        raise typer.Exit(EXIT_USER_ERROR)


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
    likeness = [f"{image[name]:g}" for name in ("distance", "similarity") if name in image]
    likeness += ["mirrored"] if image.get("mirrored") else []
    return f"{Path(image['shard']).name}/{image['key']}" + (f" ({', '.join(likeness)})" if likeness else "")
