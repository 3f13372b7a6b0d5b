"""`m3i-scale shards`: its commands, and the index.

What takes long to import is imported by the command that needs it: help has to come at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from m3i_scale.data.make.commands import make_app
from m3i_scale.data.options import AsJson, print_summary
from m3i_scale.data.tools import commands as tools

shards_app = typer.Typer(
    no_args_is_help=True, help="Make WebDataset shards; look at, mend and rearrange those you have."
)
shards_app.add_typer(make_app, name="make")
shards_app.command(epilog="Example: m3i-scale shards check '/data/cc12m/{00000..01242}.tar'")(tools.check)
shards_app.command(epilog="Example: m3i-scale shards stats /data/shards/train --json")(tools.stats)
shards_app.command("peek", epilog="Example: m3i-scale shards peek /data/shards/train --output /data/sheet")(tools.look)
shards_app.command(epilog="Example: m3i-scale shards split /data/cc12m --output /data/c --shares train=0.99,val=0.01")(
    tools.split
)
shards_app.command(epilog="Example: m3i-scale shards merge /data/a /data/b --output /data/both")(tools.merge)


@shards_app.command(epilog="Example: m3i-scale shards index '/data/cc12m/{00000..01242}.tar'")
def index(
    shards: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single shards.")],
    as_json: AsJson = False,
) -> None:
    """Scan shards and write `index/` beside them. Training does it where it is missing, but into its own cache."""
    from m3i_scale.data.index import build_index
    from m3i_scale.data.shards import local_shards

    indices = []
    for pattern in shards:
        paths = local_shards(pattern)
        for folder in sorted({path.parent for path in paths}):
            indices += build_index([path for path in paths if path.parent == folder], folder / "index")
    summary = {"shards": len(indices), "samples": sum(map(len, indices)), "bytes": sum(item.size for item in indices)}
    print_summary(summary, as_json, f"{summary['shards']} shards, {summary['samples']} samples")
