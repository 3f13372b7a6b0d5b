"""CLI of `m3i-scale shards check | stats | split | merge`: inspect and reshard WebDataset shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from m3i_scale.defaults import MAX_CAPTION_BYTES, MAX_IMAGE_PIXELS, MAX_SAMPLE_BYTES
from m3i_scale.errors import EXIT_USER_ERROR, ConfigError
from m3i_scale.options import AsJson, choices, writes_to
from m3i_scale.shards.options import (
    Name,
    Output,
    ShardOptions,
    Shards,
    Workers,
    choice,
    parse_splits,
    print_summary,
    progress_bar,
    takes_sizes,
)
from m3i_scale.shards.process_pool import DEFAULT_WORKERS
from m3i_scale.text import table_lines

MaxPixels = Annotated[
    int, typer.Option(min=1, metavar="N", help="Larger images are errors, as in data.max_image_pixels.")
]


def check(
    shards: Shards,
    repair_to: Annotated[
        Path | None,
        typer.Option("--repair", callback=writes_to, help="New folder for repaired copies of corrupt shards."),
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="With --repair: also link valid shards into it.")] = False,
    quarantine: Annotated[
        Path | None, typer.Option(callback=writes_to, help="Write one JSON line per error to this file.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="EXT", help="Extension that every sample must have: txt, cls, …; repeat for several."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of classes. Default: from labels.json.")
    ] = None,
    keys_per_shard: Annotated[
        bool, typer.Option("--keys-per-shard", help="Keys are unique only within a shard.")
    ] = False,
    headers_only: Annotated[bool, typer.Option("--headers-only", help="Do not decode images: much faster.")] = False,
    max_image_pixels: MaxPixels = MAX_IMAGE_PIXELS,
    max_caption_bytes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Larger captions are errors, as in data.max_caption_bytes.")
    ] = MAX_CAPTION_BYTES,
    max_sample_bytes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Larger samples are errors, as in data.max_sample_bytes.")
    ] = MAX_SAMPLE_BYTES,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Validate every file of every sample. Nothing is changed.

    Exit with code 2 if there are errors.
    """
    from m3i_scale.shards.check import Rules, check_shards
    from m3i_scale.shards.folder import atomic_folder, check_output_is_new
    from m3i_scale.shards.rearrange import repair

    if link and repair_to is None:
        raise ConfigError("--link has no effect without --repair", fix="add --repair FOLDER, or leave out --link")
    if repair_to is not None:
        check_output_is_new(repair_to)
    rules = Rules(
        max_image_pixels,
        classes,
        tuple(require or ()),
        decode=not headers_only,
        max_caption_bytes=max_caption_bytes,
        max_sample_bytes=max_sample_bytes,
    )
    with progress_bar([shards], quiet=as_json) as advance:
        report = check_shards(
            shards,
            rules,
            workers=workers,
            keys_per_shard=keys_per_shard,
            quarantine=quarantine,
            advance=advance,
        )
    summary = report.summary()
    if repair_to is not None:
        with atomic_folder(repair_to) as folder:
            summary["repair"] = {"output": str(repair_to), **repair(report, folder, workers, link)}
    print_summary(summary, as_json, _check_lines(summary, quarantine))
    if report.bad:
        raise typer.Exit(EXIT_USER_ERROR)


def stats(
    shards: Shards,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id, as in text.tokenizer; default: the one next to the shards.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=4, help="Maximum caption length, as in text.max_tokens (64).")
    ] = None,
    max_image_pixels: MaxPixels = MAX_IMAGE_PIXELS,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Report statistics of samples, sizes, captions, tokens and classes, and exact duplicates."""
    from m3i_scale.shards.stats import stats_of

    with progress_bar([shards], quiet=as_json) as advance:
        counts = stats_of(
            shards,
            max_pixels=max_image_pixels,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            workers=workers,
            advance=advance,
        )
    print_summary(counts, as_json, _stats_lines(counts))


@takes_sizes
def split(
    shards: Shards,
    output: Output,
    options: ShardOptions,
    name: Name = "images",
    shares: Annotated[
        str | None, typer.Option(metavar="SPLITS", help="Fractions by split, e.g. train=0.95,val=0.05.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="FIELD", help="JSON field; samples with the same value stay in one split.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Split samples by fractions, or only reshard them. File contents stay unchanged."""
    from m3i_scale.shards.rearrange import split_shards

    with progress_bar([shards], quiet=as_json, times=2) as advance:
        summary = split_shards(
            shards,
            output,
            options=options,
            name=name,
            shares=None if shares is None else parse_splits(shares),
            group=group,
            advance=advance,
        )
    print_summary(summary, as_json, _rearranged(summary, output))


@takes_sizes
def merge(
    sources: Annotated[list[str], typer.Argument(help="Folders of shards, brace patterns, or .tar files.")],
    output: Output,
    options: ShardOptions,
    name: Name = "images",
    keys: Annotated[
        str,
        typer.Option(
            **choices("refuse", "prefix"), help="Duplicate keys are errors, or all keys get the dataset as prefix."
        ),
    ] = "refuse",
    as_json: AsJson = False,
) -> None:
    """Merge the samples of several datasets into one folder. Class lists are merged by class name."""
    from m3i_scale.shards.rearrange import Keys, merge_shards

    with progress_bar(sources, quiet=as_json, times=2) as advance:
        summary = merge_shards(
            sources, output, options=options, name=name, keys=choice("--keys", keys, Keys), advance=advance
        )
    print_summary(summary, as_json, _rearranged(summary, output))


def _check_lines(summary: dict[str, Any], quarantine: Path | None) -> list[str]:
    rows = []
    for reason, facts in summary["reasons"].items():
        first = facts["examples"][0]
        place = f"{Path(first['url']).name} {first['key']} @{first['offset']}"
        rows.append((reason, facts["count"], f"{place} {first['detail']}"))
    lines = [
        *(table_lines(("reason", "count", "for example"), rows) if rows else ()),
        f"{summary['samples']} samples in {summary['shards']} shards: {summary['bad_samples']} bad samples, "
        f"{summary['shards'] - summary['clean_shards']} bad shards",
        *(f"note: {note}" for note in summary["notes"]),
    ]
    if quarantine is not None:
        lines.append(f"all problems: {quarantine}")
    elif rows:
        lines.append("--quarantine FILE lists all of them, --repair FOLDER writes clean copies of bad shards")
    if "repair" in summary:
        done = summary["repair"]
        lines.append(
            f"{done['output']}: {len(done['repaired'])} shards repaired; {len(done['as_they_are'])} are good as they "
            f"are, {len(done['without_a_good_sample'])} hold no good sample: see shards.json"
        )
    return lines


def _stats_lines(counts: dict[str, Any]) -> Iterator[str]:
    from m3i_scale.shards.annotation_checks import pixel_lines

    yield f"{counts['samples']} samples in {counts['shards']} shards, {counts['bytes'] / 1e6:.1f} MB"
    yield "  ".join(f"{name}: {share:.1%}" for name, share in counts["share_with"].items())
    yield "  ".join(f"{name}: {count}" for name, count in counts["formats"].items())
    names = ("width", "height", "aspect_ratio", "image_bytes", "caption_characters", "caption_words", "caption_tokens")
    quantiles = ("0%", "5%", "50%", "95%", "100%", "mean")
    yield from table_lines(
        ("", "min", "5 %", "median", "95 %", "max", "mean"),
        [
            (name.replace("_", " "), *(f"{counts[name][quantile]:g}" for quantile in quantiles))
            for name in names
            if counts[name]
        ],
    )
    tokens, classes = counts["tokens"], counts["classes"]
    if tokens is not None:
        yield (
            f"{tokens['tokenizer']}: {tokens['unknown_tokens']:.1%} of tokens unknown; of captions "
            f"{tokens['captions_cut']:.1%} cut at {tokens['max_tokens']}, {tokens['captions_stripped']:.1%} stripped"
        )
        for warning in tokens["warnings"]:
            yield f"warning: {warning}; text.tokenizer in the run file takes another tokenizer"
    if classes["present"]:
        yield (
            f"{classes['present']} classes ({classes['absent']} absent), effective number {classes['effective']:g}; "
            f"the largest has {classes['largest_share']:.1%}, the smallest {classes['smallest_share']:.1%}"
        )
    if counts["mask_pixels"] is not None:
        yield from pixel_lines(counts["mask_pixels"], "masks")
    for kind, facts in counts["duplicates"].items():
        example = f", e.g. {' = '.join(facts['examples'][0])}" if facts["examples"] else ""
        yield f"equal {kind}: {facts['groups']} groups, {facts['beyond_first']} beyond the first{example}"
    for reason, count in counts["bad"].items():
        yield f"not counted: {count} × {reason}"


def _rearranged(summary: dict[str, Any], output: Path) -> list[str]:
    from m3i_scale.shards.make import summary_lines

    lines = summary_lines({"splits": summary.get("splits", {"": summary})}, output)
    if summary["tokenizer"] is None:
        lines.append("no tokenizer: the sources have none, or different ones; recipes with text need text.tokenizer")
    return lines
