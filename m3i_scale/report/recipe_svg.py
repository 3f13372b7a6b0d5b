"""A recipe's graph as an SVG file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from m3i_scale.errors import ConfigError
from m3i_scale.report.recipe_graph import Graph
from m3i_scale.report.recipe_layout import LINE, PADDING, TOP, Edge, layout


def write_svg(graph: Graph, path: Path) -> None:
    """Write the drawing of a graph; an existing file is replaced.

    Raises:
        ConfigError: the file cannot be written.
    """
    drawing = render_svg(graph)
    try:
        path.write_text(drawing, encoding="utf-8")
    except OSError as error:
        folder = path.absolute().parent
        fix = "give a file that can be written" if folder.is_dir() else f"make the folder first: mkdir -p '{folder}'"
        raise ConfigError(f"cannot write the drawing: {error.strerror}", where=str(path), fix=fix) from None


def render_svg(graph: Graph) -> str:
    """An SVG document. Its colours follow the reader's light or dark background; text of others is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["curve"] = _curve
    template = environment.get_template("recipe_graph.svg.j2")
    return template.render(graph=graph, drawing=layout(graph), line=LINE, padding=PADDING, top=TOP)


def _curve(edge: Edge) -> str:
    """Leaves and arrives level."""
    (x, y), (to_x, to_y) = edge.start, edge.end
    half = (x + to_x) / 2
    return f"M{x:.1f} {y:.1f}C{half:.1f} {y:.1f} {half:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
