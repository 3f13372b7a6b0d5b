"""Where the boxes and edges of a recipe's graph lie in a drawing. All lengths are pixels, y runs downwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from m3i_scale.report.recipe_graph import Graph, Link, Node

LINE = 16
"""Height of a line of text."""
PADDING = 10
"""Between the border of a box and its text."""
TOP = 94
"""Where the boxes begin: below the title and the headings."""
MARGIN = 16
_LETTERS = {"input": 16, "backbone": 9, "decoder": 19, "likelihood": 20, "encoder": 20, "target": 18}
"""Letters per line of the boxes, by column from left to right."""
_HEADINGS = ("input x", "z_x = f_θ(x)", "decoder f_ψ", "P̂(z_y | ẑ_y)", "encoder f_φ", "target y")
_LETTER_WIDTH = 7.3
"""Of a monospaced font of 12 pixels; the usual ones are no wider."""
_TITLE_LETTERS, _NOTES_LETTERS = 100, 145
"""What goes over the whole width, in large and in small letters."""
_GAP_X = 46
_GAP_Y = 14
_MOST_LINES = 4
"""Of one text: a long name is cut here, and whole in the tooltip of its box."""

Point = tuple[float, float]


@dataclass
class Box:
    """A node, broken into lines."""

    column: str
    title: tuple[str, ...]
    details: tuple[str, ...]
    tooltip: str
    x: float
    width: float
    height: float
    y: float = 0.0
    """Of the upper side."""

    @property
    def middle(self) -> float:
        """Height at which edges arrive and leave."""
        return self.y + self.height / 2

    @property
    def into(self) -> Point:
        """Where edges from the left arrive."""
        return self.x, self.middle

    @property
    def out(self) -> Point:
        """Where edges to the right leave."""
        return self.x + self.width, self.middle


@dataclass(frozen=True)
class Edge:
    """A line between two points, with an arrowhead at its `end`, or at its start."""

    start: Point
    end: Point
    backwards: bool = False


@dataclass
class Drawing:
    """Everything with its place."""

    width: float
    height: float
    title: str
    notes: str
    headings: list[tuple[float, str]]
    """Middle of the column, and what stands above it."""
    boxes: list[Box] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    frame: Box | None = None
    """Around the inputs of a mix."""
    stops: list[Point] = field(default_factory=list)
    """Where edges without gradient begin."""


def layout(graph: Graph) -> Drawing:
    """Columns from x to y; one row per target, everything that targets share in the middle of its rows."""
    columns = _Columns(graph)
    height = columns.height(graph.mix is not None)
    columns.place(graph, height)
    drawing = Drawing(
        width=columns.target[-1].out[0] + MARGIN,
        height=TOP + height + MARGIN,
        title=_cut(graph.name, _TITLE_LETTERS),
        notes=_cut("  ·  ".join(graph.notes), _NOTES_LETTERS),
        headings=[(_left(column) + _width(column) / 2, text) for column, text in zip(_LETTERS, _HEADINGS, strict=True)],
        boxes=list(columns.boxes()),
        frame=_frame(list(columns.input.values()), graph.mix) if graph.mix else None,
        stops=[box.out for link, box in zip(graph.links, columns.likelihood, strict=True) if link.stopped],
    )
    drawing.edges = list(_edges(columns, graph.links, drawing.frame))
    return drawing


class _Columns:
    """The boxes of a graph by column."""

    def __init__(self, graph: Graph) -> None:
        self.input = {name: _box("input", node) for name, node in graph.inputs.items()}
        self.backbone = _box("backbone", graph.backbone)
        self.decoder = {name: _box("decoder", node) for name, node in graph.decoders.items()}
        self.likelihood = [_box("likelihood", _with_inputs(graph, link)) for link in graph.links]
        self.encoder = {name: _box("encoder", node) for name, node in graph.encoders.items()}
        self.target = [_box("target", link.target) for link in graph.links]

    def boxes(self) -> Iterator[Box]:
        """All of them, from left to right."""
        yield from (*self.input.values(), self.backbone, *self.decoder.values())
        yield from (*self.likelihood, *self.encoder.values(), *self.target)

    def height(self, framed: bool) -> float:
        """Of the highest column."""
        inputs = _stack(list(self.input.values())) + (_FRAME_ABOVE + PADDING if framed else 0)
        others = [_stack(list(column.values())) for column in (self.decoder, self.encoder)]
        return max(inputs, _stack(self._rows()), *others)

    def place(self, graph: Graph, height: float) -> None:
        """Give every box its y within `height`."""
        middle = TOP + height / 2
        inputs, rows = list(self.input.values()), self._rows()
        _put_below_each_other(inputs, middle + ((_FRAME_ABOVE - PADDING) / 2 if graph.mix else 0))
        self.backbone.y = middle - self.backbone.height / 2
        _put_below_each_other(rows, middle)
        for row, likelihood, target in zip(rows, self.likelihood, self.target, strict=True):
            for box in (likelihood, target):
                box.y = row.middle - box.height / 2
        for boxes, keys in (
            (self.decoder, [link.decoder for link in graph.links]),
            (self.encoder, [link.encoder for link in graph.links]),
        ):
            for name, box in boxes.items():
                users = [row.middle for row, key in zip(rows, keys, strict=True) if key == name]
                box.y = sum(users) / len(users) - box.height / 2
            _push_apart(list(boxes.values()), TOP + height)

    def _rows(self) -> list[Box]:
        """The higher box of every row, as a stand-in for it."""
        pairs = zip(self.likelihood, self.target, strict=True)
        return [max(pair, key=lambda box: box.height) for pair in pairs]


_FRAME_ABOVE = 2 * LINE + PADDING + 6
"""What a frame needs above its boxes."""


def _with_inputs(graph: Graph, link: Link) -> Node:
    """Which inputs predict it: the drawing has one backbone for all of them."""
    names = ", ".join(graph.inputs[name].title for name in link.inputs)
    come_from = (f"from {names}",) if len(graph.inputs) > 1 else ()
    return Node(link.likelihood.title, (*link.likelihood.details, *come_from))


def _box(column: str, node: Node) -> Box:
    title = _lines(node.title, _LETTERS[column])
    details = tuple(line for text in node.details for line in _lines(text, _LETTERS[column]))
    height = (len(title) + len(details)) * LINE + 2 * PADDING
    tooltip = "\n".join((node.title, *node.details))
    return Box(column, title, details, tooltip, x=_left(column), width=_width(column), height=height)


def _lines(text: str, letters: int) -> tuple[str, ...]:
    """`text` in lines of so many cells (a Chinese letter takes two), at most `_MOST_LINES`."""
    wrapped = Text(text).wrap(Console(width=letters), letters, overflow="fold")
    lines = [line.plain.rstrip() for line in wrapped]
    return tuple(lines) if len(lines) <= _MOST_LINES else (*lines[: _MOST_LINES - 1], "…")


def _cut(text: str, letters: int) -> str:
    cut = Text(text)
    cut.truncate(letters, overflow="ellipsis")
    return cut.plain


def _width(column: str) -> float:
    return _LETTERS[column] * _LETTER_WIDTH + 2 * PADDING


def _left(column: str) -> float:
    before = list(_LETTERS)[: list(_LETTERS).index(column)]
    return MARGIN + PADDING + sum(_width(name) + _GAP_X for name in before)


def _stack(boxes: Sequence[Box]) -> float:
    """Height of boxes below each other."""
    return sum(box.height + _GAP_Y for box in boxes) - _GAP_Y


def _put_below_each_other(boxes: Sequence[Box], middle: float) -> None:
    y = middle - _stack(boxes) / 2
    for box in boxes:
        box.y = y
        y += box.height + _GAP_Y


def _push_apart(boxes: list[Box], bottom: float) -> None:
    """Move boxes as little as is needed so that none overlap, and none lies outside; they fit, says `_stack`."""
    boxes.sort(key=lambda box: box.middle)
    free = float(TOP)
    for box in boxes:
        box.y = max(box.y, free)
        free = box.y + box.height + _GAP_Y
    for box in reversed(boxes):
        box.y = min(box.y, bottom - box.height)
        bottom = box.y - _GAP_Y


def _frame(inputs: Sequence[Box], label: str) -> Box:
    x, y = inputs[0].x - PADDING, inputs[0].y - _FRAME_ABOVE
    width, height = inputs[0].width + 2 * PADDING, _stack(inputs) + _FRAME_ABOVE + PADDING
    return Box("frame", (), _lines(label, _LETTERS["input"]), label, x=x, y=y, width=width, height=height)


def _edges(columns: _Columns, links: Sequence[Link], frame: Box | None) -> Iterator[Edge]:
    """x → f_θ → f_ψ ← P̂ → f_φ ← y."""
    for box in [frame] if frame else columns.input.values():
        yield Edge(box.out, columns.backbone.into)
    for box in columns.decoder.values():
        yield Edge(columns.backbone.out, box.into)
    for link, likelihood, target in zip(links, columns.likelihood, columns.target, strict=True):
        encoder = columns.encoder[link.encoder]
        yield Edge(columns.decoder[link.decoder].out, likelihood.into, backwards=True)
        yield Edge(likelihood.out, encoder.into)
        yield Edge(encoder.out, target.into, backwards=True)
