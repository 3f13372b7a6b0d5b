"""Mermaid flowchart of a recipe's graph, which GitHub and most editors render."""

from __future__ import annotations

import re
from pathlib import Path

from m3i_scale.errors import ConfigError
from m3i_scale.report.recipe_graph import Graph, Node

_NOT_PLAIN = re.compile(r"[^\w ·.,:=+/()→-]")
"""Characters that may be special in Mermaid, Markdown or HTML; they are written as character codes."""
_LIST_MARK = re.compile(r"^(\d*)([.)+-])(?= )")
"""Prefix that starts a list in Markdown."""


def write_mermaid(graph: Graph, path: Path) -> None:
    """Write the flowchart of a graph, replacing an existing file. In `.md` files it is a Markdown code block."""
    chart = render_mermaid(graph)
    try:
        path.write_text(
            f"```mermaid\n{chart}```\n" if path.suffix.lower() in (".md", ".markdown") else chart, encoding="utf-8"
        )
    except OSError as error:
        folder = path.absolute().parent
        fix = "give a file that can be written" if folder.is_dir() else f"make the folder first: mkdir -p '{folder}'"
        raise ConfigError(f"cannot write the drawing: {error.strerror}", where=str(path), fix=fix) from None


def render_mermaid(graph: Graph) -> str:
    """Return the flowchart: x → f_θ → f_ψ → P̂ ← f_φ ← y; dotted: no gradient reaches the encoder."""
    inputs, decoders, encoders = (
        {name: f"{letter}{number}" for number, name in enumerate(nodes)}
        for letter, nodes in (("x", graph.inputs), ("d", graph.decoders), ("e", graph.encoders))
    )
    lines = ["flowchart LR", *(f"  {inputs[name]}{_box(node)}" for name, node in graph.inputs.items())]
    if graph.mix:
        lines = [lines[0], f'  subgraph mix["{_escaped(graph.mix)}"]', *(f"  {line}" for line in lines[1:]), "  end"]
    lines.append(f"  r{_box(Node(graph.name, graph.notes))}")
    lines.append(f"  f{_box(graph.backbone)}")
    lines += [f"  {decoders[name]}{_box(node)}" for name, node in graph.decoders.items()]
    lines += [f"  {encoders[name]}{_box(node)}" for name, node in graph.encoders.items()]
    lines += [f"  {source} --> f" for source in (["mix"] if graph.mix else inputs.values())]
    lines += [f"  f --> {decoder}" for decoder in decoders.values()]
    for number, link in enumerate(graph.links):
        names = [graph.inputs[name].title for name in link.inputs]
        origin = (f"from {', '.join(names)}",) if len(graph.inputs) > 1 else ()
        likelihood = Node(link.likelihood.title, (*link.likelihood.details, *origin))
        lines += [
            f"  p{number}([{_label(likelihood)}])",
            f"  y{number}{_box(link.target)}",
            f"  {decoders[link.decoder]} --> p{number}",
            f"  {encoders[link.encoder]} {'-.->' if link.stopped else '-->'} p{number}",
            f"  y{number} --> {encoders[link.encoder]}",
        ]
    return "\n".join(lines) + "\n"


def _box(node: Node) -> str:
    return f"[{_label(node)}]"


def _label(node: Node) -> str:
    return f'"{"<br>".join(_escaped(text) for text in (node.title, *node.details))}"'


def _escaped(text: str) -> str:
    coded = _NOT_PLAIN.sub(lambda letter: f"#{ord(letter.group())};", text)
    return _LIST_MARK.sub(lambda mark: f"{mark[1]}#{ord(mark[2])};", coded)
