"""Command `m3i-scale compare`. Slow imports happen when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from m3i_scale.options import AsJson, Imports, reading_bar, writes_to
from m3i_scale.output import print_json, wide_console


def compare(
    before: Annotated[str, typer.Argument(help="An exported folder, any Hub folder of a vision model, or a Hub id.")],
    after: Annotated[str, typer.Argument(help="The other model, likewise.")],
    data: Annotated[str, typer.Option(help="A folder of shards with train and val, as `shards make` writes it.")],
    general: Annotated[str | None, typer.Option(help="Another one, for what may have been forgotten.")] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="knn, linear, dense, zero_shot, retrieval: all by default.")
    ] = None,
    pool: Annotated[str, typer.Option(help="mean, cls or both: the image vector of kNN and linear probe.")] = "mean",
    batch_size: Annotated[int | None, typer.Option(help="Images in one forward pass (64).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(callback=writes_to, help="Also write a page with dense features side by side: FILE.html."),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Show what a training has improved and what it has forgotten: compare the frozen features of two models on the
    same samples, with confidence intervals of the differences."""
    from m3i_scale.config.kinds import import_given
    from m3i_scale.evaluate.compare import compare as run_comparison
    from m3i_scale.report.comparison import comparison_table, write_comparison
    from m3i_scale.report.html_file import check_page

    import_given(imports)
    if output is not None:
        check_page(output, "--output")
    with reading_bar() as progress:
        result, pictures = run_comparison(
            before,
            after,
            data,
            general=general,
            measures=tuple(measure) if measure else None,
            pool=cast(Any, pool),
            batch_size=batch_size,
            device=device,
            draw=output is not None,
            progress=progress,
        )
    if output is not None:
        write_comparison(result, pictures, output)
    if as_json:
        print_json(result)
    else:
        wide_console().print(comparison_table(result))
