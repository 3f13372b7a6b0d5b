"""`m3i-scale evaluate`, and `m3i-scale compare` with its tables and its page. Slow imports happen inside the
functions."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from m3i_scale import __version__
from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.report import render, warning_lines
from m3i_scale.files import write_json
from m3i_scale.options import AsJson, Imports, choices, reading_bar, writes_to
from m3i_scale.output import print_result
from m3i_scale.text import without_secrets

if TYPE_CHECKING:
    from m3i_scale.run.callbacks import Picture

_PROBES = ("knn", "few_shot", "linear", "dense")
_TEXT = ("zero_shot", "retrieval")
Pooling = Annotated[
    str, typer.Option(**choices("mean", "cls", "both"), help="Image features of the probes: which tokens.")
]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="Images per forward pass; default: 64, on CPUs 16.")]
Workers = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Processes that decode images; default: one per core.")
]
Dtype = Annotated[
    str,
    typer.Option(
        **choices("auto", "float32", "bfloat16"), help="auto: bfloat16 on GPUs that support it, else float32."
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="auto (all visible GPUs, or the CPU), cpu, cuda, cuda:1, …")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(callback=writes_to, help="Folder that keeps features, and reuses them for the same weights and data."),
]
_COLUMNS = ("metric", "before", "after", "difference", "interval", "change")


def _check_cache(cache_dir: Path | None, imports: list[str] | None) -> None:
    if cache_dir is not None and imports:
        raise ConfigError(
            "--cache-dir cannot be combined with --import",
            where=f"--cache-dir {cache_dir}",
            why="a change of the imported code would not be noticed",
            fix="leave out --cache-dir",
        )


def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="Exported folder, or a Hugging Face folder of a vision model.")],
    data: Annotated[str, typer.Option(help="Shards to evaluate on.")],
    train_data: Annotated[str | None, typer.Option(help="Training shards for kNN and the probes.")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            **choices(*_PROBES, "classifier", *_TEXT, "segmenter", "detector"),
            help="Evaluation to run; repeat for several. Default: all that the model supports.",
        ),
    ] = None,
    pool: Pooling = "mean",
    baseline: Annotated[
        str, typer.Option(**choices("none", "pixels"), help="Baseline for the probes: raw pixels.")
    ] = "none",
    exclude_group: Annotated[
        list[str] | None, typer.Option(metavar="GROUP", help="Skip samples of this group; repeat for several.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Zero-shot prompt with {} for the class name; several are averaged."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Images per forward pass. Default: 64, on CPUs 16; detector: 4; segmenter: 16 windows."
        ),
    ] = None,
    num_workers: Workers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache_dir: CacheDir = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            callback=writes_to,
            help="New folder for pictures of features, or of a segmenter's or detector's predictions.",
        ),
    ] = None,
    picture_count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of prediction pictures; default: 20.")
    ] = None,
    picture_samples: Annotated[
        str | None, typer.Option(metavar="KEYS", help="At most eight samples to show: shard.tar/key,shard.tar/key,…")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(callback=writes_to, help="JSON file to write or replace: RUN_DIR/evaluation.json for the report."),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate frozen features with kNN, few-shot, linear and dense probes, zero-shot classification and retrieval.

    The accuracy of a trained head is evaluated, too: top-1 and top-5, mIoU of a segmenter, AP of a detector. All
    results have bootstrap confidence intervals.
    """
    from m3i_scale.config.sections import import_given
    from m3i_scale.evaluation.commands import evaluate as run_evaluation
    from m3i_scale.evaluation.towers import TEMPLATES

    _check_cache(cache_dir, imports)
    import_given(imports)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(
            "--output must be a file in an existing folder", where=str(output), fix="use another --output"
        )
    with reading_bar() as progress:
        result = run_evaluation(
            model_dir,
            data,
            train_data=train_data,
            measures=tuple(measure) if measure else None,
            pool=cast(Any, pool),
            baseline=cast(Any, baseline),
            exclude_groups=tuple(exclude_group or ()),
            templates=tuple(template or TEMPLATES),
            batch_size=batch_size,
            num_workers=num_workers,
            dtype=cast(Any, dtype),
            device=device,
            cache_dir=cache_dir,
            pictures=pictures,
            picture_count=picture_count,
            picture_samples=picture_samples.split(",") if picture_samples is not None else None,
            progress=progress,
        )
    print_result(as_json, result, lambda: render(result))
    if output is not None:
        write_json(output, result)


def compare(
    before: Annotated[str, typer.Argument(help="First model: exported folder, Hugging Face folder, or Hub id.")],
    after: Annotated[str, typer.Argument(help="Second model.")],
    data: Annotated[str, typer.Option(help="Folder with shards in train and val.")],
    general: Annotated[str | None, typer.Option(help="A second dataset, to measure forgetting.")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(**choices(*_PROBES, *_TEXT), help="Evaluation to run; repeat for several. Default: all."),
    ] = None,
    pool: Pooling = "mean",
    batch_size: BatchSize = None,
    num_workers: Workers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache_dir: CacheDir = None,
    output: Annotated[
        Path | None,
        typer.Option(callback=writes_to, help="Also write an HTML page that shows both models' features."),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Compare the frozen features of two models on the same samples.

    Shows what training has improved and what it has forgotten, with confidence intervals of the differences.
    """
    from m3i_scale.config.sections import import_given
    from m3i_scale.evaluation.compare import compare as run_comparison
    from m3i_scale.report.html_file import check_page

    _check_cache(cache_dir, imports)
    import_given(imports)
    if output is not None:
        check_page(output)
    with reading_bar() as progress:
        result, pictures = run_comparison(
            before,
            after,
            data,
            general=general,
            measures=tuple(measure) if measure else None,
            pool=cast(Any, pool),
            batch_size=batch_size,
            num_workers=num_workers,
            dtype=cast(Any, dtype),
            device=device,
            cache_dir=cache_dir,
            draw=output is not None,
            progress=progress,
        )
    if output is not None:
        write_comparison(result, pictures, output)
    print_result(as_json, result, lambda: comparison_table(result))


def comparison_table(document: dict[str, Any]) -> RenderableType:
    """Return the document of `compare` as a table for each dataset, followed by notes."""
    parts: list[RenderableType] = [Text(line) for line in _models(document)]
    for name, of_set in document["sets"].items():
        table = Table(title=Text(_title(name, of_set)), title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column in ("metric", "change") else "right")
        for row in _rows(of_set):
            table.add_row(*row)
        parts += [table, *(Text(line) for line in _lines(document, of_set))]
    return Group(*parts)


def write_comparison(document: dict[str, Any], pictures: Mapping[str, Picture], page: Path) -> None:
    """Write a page with the tables of a comparison and its pictures by dataset."""
    from m3i_scale.evaluation.pictures.draw import jpeg
    from m3i_scale.report.html_file import rendered, write_page

    sets = [
        {
            "title": _title(name, of_set),
            "rows": list(_rows(of_set)),
            "lines": list(_lines(document, of_set)),
            "picture": pictures.get(name),
            "jpeg": base64.b64encode(jpeg(pictures[name].image)).decode() if name in pictures else None,
        }
        for name, of_set in document["sets"].items()
    ]
    text = rendered(
        "comparison.html.j2",
        title=f"{document['before']['name']} and {document['after']['name']}",
        models=list(_models(document)),
        columns=_COLUMNS,
        sets=sets,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )
    write_page(text, page)


def _title(name: str, of_set: dict[str, Any]) -> str:
    return without_secrets(f"{name}: {of_set['data']['shards']}  ·  {of_set['data']['samples']} samples")


def _models(document: dict[str, Any]) -> Iterator[str]:
    for role in ("before", "after"):
        model = document[role]
        size = model["image_size"]
        yield f"{role}: {model['path']} ({model['type']}, {size} × {size} pixels, pool {model['pool']})"


def _rows(of_set: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield metric, both values, their difference, its interval, and the direction of change."""
    for name, figures in of_set["measures"].items():
        before, after, difference = (figures[key] for key in ("before", "after", "difference"))
        yield (
            name.replace("_", " "),
            f"{before['value']:.3f}",
            f"{after['value']:.3f}",
            f"{difference['value']:+.3f}",
            f"{difference['low']:+.3f} … {difference['high']:+.3f}",
            figures["change"],
        )


def _lines(document: dict[str, Any], of_set: dict[str, Any]) -> Iterator[str]:
    data = of_set["data"]
    yield (
        f"{document['level']:.0%} intervals of differences by paired bootstrap over {data['clusters']} ×"
        f" {data['cluster_unit']}"
    )
    for name, reason in of_set["not_measured"].items():
        yield f"not measured: {name.replace('_', ' ')}: {reason}"
    if "not_shown" in of_set:
        yield f"not shown: dense features: {of_set['not_shown']}"
    yield from warning_lines(of_set)
