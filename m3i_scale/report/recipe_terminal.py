"""Drawing of a recipe's graph in a terminal with 80 columns: one row of boxes per target."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from m3i_scale.report.recipe_graph import Graph, Link, Node

_COLUMNS = (
    ("input x", 13),
    ("", 1),
    ("", 5),
    ("", 1),
    ("decoder f_ψ", 17),
    ("P̂(z_y | ẑ_y)", 13),
    ("encoder f_φ", 14),
    ("", 1),
    ("target y", 14),
)
"""Heading and width in cells: 79 in total, because some terminals wrap the last column."""
_ARROW_WIDTH = 13
_SIGN = "//"
"""Label of an arrow without gradient."""


def render_terminal(graph: Graph) -> RenderableType:
    """Return boxes for a console. Names are printed literally, without markup."""
    grid = Table.grid()
    for heading, width in _COLUMNS:
        grid.add_column(Text(heading, style="dim"), width=width, vertical="middle", justify="center")
    grid.show_header = True
    seen: set[str] = set()
    for link in graph.links:
        grid.add_row(*_row(graph, link, again=link.decoder in seen))
        seen.add(link.decoder)
    lines = []
    if len(graph.links) > 1:
        lines.append(Text("f_θ is the same backbone in every row; so is a decoder of the same name.", style="dim"))
    if any(link.stopped for link in graph.links):
        lines.append(Text(f"{_SIGN} no gradient reaches the encoder", style="dim"))
    title = Text.assemble((graph.name, "bold"), *(f"  ·  {note}" for note in graph.notes))
    return Group(title, Text(), grid, *lines)


def _row(graph: Graph, link: Link, *, again: bool) -> list[RenderableType]:
    decoder = graph.decoders[link.decoder]
    return [
        _inputs(graph, link),
        Text("→"),
        _box(Node("f_θ"), "blue"),
        Text("→"),
        _box(Node(decoder.title, ("the same",)) if again else decoder, "magenta"),
        _likelihood(link),
        _box(graph.encoders[link.encoder], "yellow"),
        Text("←"),
        _box(link.target, "green"),
    ]


def _inputs(graph: Graph, link: Link) -> RenderableType:
    nodes = [graph.inputs[name] for name in link.inputs]
    lines = [*map(_text, nodes), *([Text(graph.mix, style="italic")] if graph.mix else [])]
    return Panel(_below_each_other(lines), box=box.ROUNDED, padding=0, style="cyan")


def _box(node: Node, style: str) -> RenderableType:
    return Panel(_text(node), box=box.ROUNDED, padding=0, style=style)


def _text(node: Node) -> Text:
    return _below_each_other([Text(node.title, style="bold"), *map(Text, node.details)])


def _below_each_other(lines: list[Text]) -> Text:
    return Text("\n", justify="center", overflow="fold").join(lines)


def _likelihood(link: Link) -> RenderableType:
    """Return distribution and regularizer above the arrow, weight and head below: the arrow is level with the boxes."""
    end = f"{_SIGN}─▶" if link.stopped else "─▶"
    arrow = "◀" + end.rjust(_ARROW_WIDTH - 1, "─")
    regularizer, *others = link.likelihood.details
    lines = [Text(link.likelihood.title, style="bold"), *map(Text, (regularizer, arrow, *others))]
    return _below_each_other(lines)
