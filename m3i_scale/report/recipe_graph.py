"""Graph of a recipe: x → f_θ → f_ψ ↔ f_φ ← y, and its Mermaid flowchart, which GitHub and most editors render."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from m3i_scale.errors import ConfigError
from m3i_scale.objective.convolution import ConvolutionSpec
from m3i_scale.objective.decoders import DecoderSpec, LayeredSpec, TransformerSpec
from m3i_scale.objective.inputs import InputSpec
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe
from m3i_scale.objective.targets.base import HeadTarget, ImageTarget, Target
from m3i_scale.objective.targets.text import BoltzmannPairs
from m3i_scale.report.recipe_table import weight_words, word
from m3i_scale.text import printable

_ALONE = {"none": "no regularizer"}
"""Words that need context without a heading."""
_TOKENS = {
    "masked": "hidden patches",
    "blocks": "hidden blocks",
    "shown": "patches of the input",
    "all": "all patches",
    "pooled": "whole view",
}
_NOT_PLAIN = re.compile(r"[^\w ·.,:=+/()→-]")
"""Characters that may be special in Mermaid, Markdown or HTML; they are written as character codes."""
_LIST_MARK = re.compile(r"^(\d*)([.)+-])(?= )")
"""Prefix that starts a list in Markdown."""


@dataclass(frozen=True)
class Node:
    """Box of the graph, with a title and details below it."""

    title: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """Link by P̂ between the prediction and the representation of a target."""

    inputs: tuple[str, ...]
    decoder: str
    encoder: str
    """Key in `Graph.encoders`."""
    likelihood: Node
    target: Node
    stopped: bool
    """Whether f_φ receives no gradient."""


@dataclass(frozen=True)
class Graph:
    """Recipe as boxes and the links between them; all text is printable."""

    name: str
    notes: tuple[str, ...]
    """Family, and the loss weighting unless it is fixed."""
    mix: str | None
    inputs: dict[str, Node]
    backbone: Node
    decoders: dict[str, Node]
    encoders: dict[str, Node]
    links: tuple[Link, ...]


def read_recipe(name_or_path: str) -> Recipe:
    """Return the recipe of a config file, by built-in name or path."""
    return load_run_and_recipe(name_or_path)[1]


def graph_of(recipe: Recipe) -> Graph:
    """Return the boxes and links of a recipe."""
    balance = recipe.balance.kind
    return Graph(
        name=printable(recipe.name),
        notes=(printable(recipe.family), *([f"weights: {word(balance)}"] if balance != "fixed" else [])),
        mix=f"mixed, {recipe.mix.form.kind} patches" if recipe.mix else None,
        inputs={spec.name: _input(spec) for spec in recipe.inputs},
        backbone=Node("f_θ", ("backbone",)),
        decoders={name: _decoder(name, spec) for name, spec in recipe.decoders.items()},
        encoders={_encoder_key(target): _encoder(recipe, target) for target in recipe.targets},
        links=tuple(_link(recipe, target) for target in recipe.targets),
    )


def _input(spec: InputSpec) -> Node:
    mask = (f"{spec.mask.form.kind} mask", f"hides {spec.mask.amount}") if spec.mask else ()
    tokens = ("by mask tokens",) if spec.mask and spec.mask.masked == "mask_token" else ()
    views = f"view {spec.view}" if spec.views == 1 else f"views {spec.view} to {spec.seen[-1]}"
    return Node(printable(spec.name), (views, *mask, *tokens))


def _decoder(name: str, spec: DecoderSpec) -> Node:
    if isinstance(spec, ConvolutionSpec):
        return Node(printable(name), (f"{word(spec.kind)} × {spec.depth}",))
    if not isinstance(spec, LayeredSpec):
        return Node(printable(name), (word(spec.kind),))
    positions = (f"{spec.position} positions",) if isinstance(spec, TransformerSpec) else ()
    return Node(printable(name), (f"{word(spec.kind)} × {spec.depth}", *positions))


def _encoder_key(target: Target) -> str:
    key = target.encoder_key if isinstance(target, ImageTarget) else target.encoder
    return f"{key}, stopped" if target.stopped else key


def _encoder(recipe: Recipe, target: Target) -> Node:
    details: tuple[str, ...] = ()
    if target.encoder == "ema" and recipe.ema:
        ends = dict.fromkeys(f"{m:.4g}" for m in (recipe.ema.start, recipe.ema.end))
        details = ("of f_θ", f"m {' → '.join(ends)}")
    elif isinstance(target, ImageTarget) and target.encoder == "teacher":
        spec = recipe.teachers[target.teacher]
        details = ("f_θ at the start",) if spec.is_start else (printable(spec.from_pretrained),)
    elif target.encoder == "online":
        details = ("f_θ itself", *(("stop gradient",) if target.stopped else ()))
    return Node(word(target.encoder), details)


def _link(recipe: Recipe, target: Target) -> Link:
    told = target.summary()
    representation = str(told["representation"])
    modality = () if target.modality in representation else (target.modality,)  # avoids "text, text embedding"
    view = (f"view {told['view']}",) if told["view"] else ()
    tokens = (_TOKENS[told["tokens"]],) if told["tokens"] else ()
    online = isinstance(target, ImageTarget) and target.encoder == "online"
    shown_by = (f"input {printable(recipe.shows(told['view']) or '')}",) if online else ()
    distribution = target.distribution
    forward = isinstance(distribution, BoltzmannPairs) and distribution.direction == "forward"
    direction = ("image → text",) if forward else ()
    kind = target.regularizer.kind
    regularizer = _ALONE.get(kind, word(kind))
    return Link(
        inputs=tuple(target.inputs),
        decoder=target.decoder,
        encoder=_encoder_key(target),
        likelihood=Node(
            word(distribution.kind),
            (regularizer, *direction, f"w {weight_words(target.weight)}", *_head(recipe, target)),
        ),
        target=Node(printable(target.name), (*modality, *view, *shown_by, *tokens, representation)),
        stopped=target.stopped,
    )


def _head(recipe: Recipe, target: Target) -> tuple[str, ...]:
    if not isinstance(target, HeadTarget):
        return ()
    predictor = ("+ predictor",) if recipe.heads[target.head].predictor_depth else ()
    return (f"head {printable(target.head)}", *predictor)


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
