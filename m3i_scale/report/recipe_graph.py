"""Mermaid flowchart of a recipe, x → f_θ → f_ψ ↔ f_φ ← y, which GitHub and most editors render."""

from __future__ import annotations

import re
from pathlib import Path

from m3i_scale.errors import ConfigError
from m3i_scale.objective.convolution import ConvolutionSpec
from m3i_scale.objective.decoders import DecoderSpec, LayeredSpec, TransformerSpec
from m3i_scale.objective.inputs import InputSpec
from m3i_scale.objective.recipe import Recipe
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


def write_mermaid(recipe: Recipe, path: Path) -> None:
    """Write the flowchart of a recipe, replacing an existing file. In `.md` files it is a Markdown code block."""
    chart = render_mermaid(recipe)
    try:
        path.write_text(
            f"```mermaid\n{chart}```\n" if path.suffix.lower() in (".md", ".markdown") else chart, encoding="utf-8"
        )
    except OSError as error:
        folder = path.absolute().parent
        fix = "use another file" if folder.is_dir() else f"run `mkdir -p '{folder}'`"
        raise ConfigError(f"cannot write the drawing: {error.strerror}", where=str(path), fix=fix) from None


def render_mermaid(recipe: Recipe) -> str:
    """Return the flowchart: x → f_θ → f_ψ → P̂ ← f_φ ← y; dotted: no gradient reaches the encoder."""
    balance = recipe.balance.kind
    weights = [f"weights: {word(balance)}"] if balance != "fixed" else []
    of_encoders = {_encoder_key(target): _encoder(recipe, target) for target in recipe.targets}
    inputs, decoders, encoders = (
        {name: f"{letter}{number}" for number, name in enumerate(names)}
        for letter, names in (("x", [spec.name for spec in recipe.inputs]), ("d", recipe.decoders), ("e", of_encoders))
    )
    lines = ["flowchart LR", *(f"  {inputs[spec.name]}{_box(*_input(spec))}" for spec in recipe.inputs)]
    if recipe.mix:
        mix = _label(f"mixed, {recipe.mix.form.kind} patches")
        lines = [lines[0], f"  subgraph mix[{mix}]", *(f"  {line}" for line in lines[1:]), "  end"]
    lines.append(f"  r{_box(printable(recipe.name), printable(recipe.family), *weights)}")
    lines.append(f"  f{_box('f_θ', 'backbone')}")
    lines += [f"  {decoders[name]}{_box(*_decoder(name, spec))}" for name, spec in recipe.decoders.items()]
    lines += [f"  {encoders[key]}{_box(*texts)}" for key, texts in of_encoders.items()]
    lines += [f"  {source} --> f" for source in (["mix"] if recipe.mix else inputs.values())]
    lines += [f"  f --> {decoder}" for decoder in decoders.values()]
    for number, target in enumerate(recipe.targets):
        encoder = encoders[_encoder_key(target)]
        lines += [
            f"  p{number}([{_label(*_likelihood(recipe, target))}])",
            f"  y{number}{_box(*_representation(recipe, target))}",
            f"  {decoders[target.decoder]} --> p{number}",
            f"  {encoder} {'-.->' if _is_stopped(target) else '-->'} p{number}",
            f"  y{number} --> {encoder}",
        ]
    return "\n".join(lines) + "\n"


def _input(spec: InputSpec) -> tuple[str, ...]:
    mask = (f"{spec.mask.form.kind} mask", f"hides {spec.mask.amount}") if spec.mask else ()
    tokens = ("by mask tokens",) if spec.mask and spec.mask.masked == "mask_token" else ()
    views = f"view {spec.view}" if spec.views == 1 else f"views {spec.view} to {spec.seen[-1]}"
    return printable(spec.name), views, *mask, *tokens


def _decoder(name: str, spec: DecoderSpec) -> tuple[str, ...]:
    if isinstance(spec, ConvolutionSpec):
        return printable(name), f"{word(spec.kind)} × {spec.depth}"
    if not isinstance(spec, LayeredSpec):
        return printable(name), word(spec.kind)
    positions = (f"{spec.position} positions",) if isinstance(spec, TransformerSpec) else ()
    return printable(name), f"{word(spec.kind)} × {spec.depth}", *positions


def _is_stopped(target: Target) -> bool:
    """Return whether f_φ gets no gradient."""
    return target.encoder in ("ema", "teacher") or (target.encoder == "online" and not target.regularizer.trains_target)


def _encoder_key(target: Target) -> str:
    key = target.encoder_key if isinstance(target, ImageTarget) else target.encoder
    return f"{key}, stopped" if _is_stopped(target) else key


def _encoder(recipe: Recipe, target: Target) -> tuple[str, ...]:
    details: tuple[str, ...] = ()
    if target.encoder == "ema" and recipe.ema:
        ends = dict.fromkeys(f"{m:.4g}" for m in (recipe.ema.start, recipe.ema.end))
        details = ("of f_θ", f"m {' → '.join(ends)}")
    elif isinstance(target, ImageTarget) and target.encoder == "teacher":
        spec = recipe.teachers[target.teacher]
        details = ("f_θ at the start",) if spec.is_start else (printable(spec.from_pretrained),)
    elif target.encoder == "online":
        details = ("f_θ itself", *(("stop gradient",) if _is_stopped(target) else ()))
    return word(target.encoder), *details


def _likelihood(recipe: Recipe, target: Target) -> tuple[str, ...]:
    distribution, kind = target.distribution, target.regularizer.kind
    forward = isinstance(distribution, BoltzmannPairs) and distribution.direction == "forward"
    direction = ("image → text",) if forward else ()
    head: tuple[str, ...] = ()
    if isinstance(target, HeadTarget):
        predictor = ("+ predictor",) if recipe.heads[target.head].predictor_depth else ()
        head = (f"head {printable(target.head)}", *predictor)
    origin = (f"from {', '.join(map(printable, target.inputs))}",) if len(recipe.inputs) > 1 else ()
    weight = f"w {weight_words(target.weight)}"
    return word(distribution.kind), _ALONE.get(kind, word(kind)), *direction, weight, *head, *origin


def _representation(recipe: Recipe, target: Target) -> tuple[str, ...]:
    summary = target.summary()
    representation = str(summary["representation"])
    modality = () if target.modality in representation else (target.modality,)  # avoids "text, text embedding"
    view = (f"view {summary['view']}",) if summary["view"] else ()
    tokens = (_TOKENS[summary["tokens"]],) if summary["tokens"] else ()
    online = isinstance(target, ImageTarget) and target.encoder == "online"
    shown_by = (f"input {printable(recipe.shows(summary['view']) or '')}",) if online else ()
    return printable(target.name), *modality, *view, *shown_by, *tokens, representation


def _box(*texts: str) -> str:
    return f"[{_label(*texts)}]"


def _label(*texts: str) -> str:
    return f'"{"<br>".join(map(_escaped, texts))}"'


def _escaped(text: str) -> str:
    coded = _NOT_PLAIN.sub(lambda letter: f"#{ord(letter.group())};", text)
    return _LIST_MARK.sub(lambda mark: f"{mark[1]}#{ord(mark[2])};", coded)
