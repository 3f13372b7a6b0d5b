"""Generate the reference pages of the site: command line, config, recipes, backbones and protocols, as Markdown.

`python launchers/_reference.py OUTDIR` writes them below OUTDIR.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from m3i_scale.backbones import describe_presets
from m3i_scale.cli import PANELS, app
from m3i_scale.config import RunConfig, known_protocols, load_run
from m3i_scale.config.fields import SectionDoc, list_sections
from m3i_scale.objective.recipe import Recipe
from m3i_scale.report.recipe_table import built_in_rows, chooser_groups, formula_rows

_CELL_WORDS = 15


def cli_page() -> str:
    """Return the page of all commands: usage, description, options and an example."""
    root: Any = typer.main.get_command(app)
    parts = ["# Command line", _paragraph(root.help)]
    for panel, names in PANELS.items():
        parts.append(f"## {panel}")
        for name in names:
            if name in root.commands:
                parts += _command(root.commands[name], f"m3i-scale {name}")
    return _page(parts)


def config_page() -> str:
    """Return the page of all sections of a config file and their fields."""
    parts = [
        "# Config reference",
        "Every field can be set in a config file or on the command line as `section.field=value`. "
        "`m3i-scale config SECTION` prints the same tables.",
    ]
    docs = list_sections({"recipe": Recipe})
    # A class that occurs at several paths has fields only at the first one.
    first = {doc.summary: doc.path for doc in reversed(docs) if doc.fields}
    for doc in docs:
        parts += _section(doc, first)
    return _page(parts)


def recipes_page() -> str:
    """Return the page of the built-in recipes: a table to choose from, and formulas."""
    rows = built_in_rows()
    parts = [
        "# Recipes",
        "Start a recipe with `m3i-scale train NAME data.datasets.photos.path=/data/shards/train "
        "output_dir=/data/runs/NAME`. Differences from the papers: "
        "[recipe deviations](../explanation/recipe-deviations.md).",
    ]
    for group, recipes in chooser_groups(rows).items():
        parts += [f"## {group}", _table(("name", "needs", "method"), ((f"`{n}`", *others) for n, *others in recipes))]
    parts.append("## Formulas")
    for row in sorted(rows, key=lambda row: str(row["name"])):
        parts += [f"### `{row['name']}`", row["description"] + "."]
        columns, cells = formula_rows(row)
        parts.append(_table(columns, cells))
    return _page(parts)


def backbones_page() -> str:
    """Return the page of the backbone presets and their sizes."""
    columns = ("preset", "image size", "patch size", "tokens", "width", "layers", "parameters (M)", "GMAC")
    rows = (
        (
            f"`{row['name']}`",
            *(row[key] for key in ("image_size", "patch_size", "tokens", "width", "layers")),
            f"{row['parameters'] / 1e6:,.1f}",
            f"{row['gmac']:,.1f}",
        )
        for row in describe_presets([])
    )
    text = "Set one with `backbone.preset=NAME`. GMAC: billions of multiply-adds for one image."
    return _page(["# Backbones", text, _table(columns, rows)])


def protocols_page() -> str:
    """Return the page of the fine-tuning protocols: schedules, published results and deviations."""
    parts = ["# Fine-tuning protocols", "Select one with `m3i-scale finetune TASK EXPORT --protocol NAME`."]
    runs = {name: load_run(name) for name in known_protocols()}
    rows, details = [], []
    for name, run in runs.items():
        protocol, task = run.protocol, run.task
        if protocol is None or task is None:
            raise RuntimeError(f"{name} is no protocol")
        length = f"{protocol.epochs} epochs" if protocol.epochs else f"{protocol.steps:,} steps"
        published = "–"
        details.append(f"## `{name}`")
        if (found := protocol.published) is not None:
            masks = "" if found.mask_ap is None else f", mask AP {found.mask_ap:g}"
            published = f"{found.metric} {found.number:g}{masks}"
            details.append(f"Published: {published} with {found.model}. Source: {found.source}.")
        rows.append((f"[`{name}`](#{name})", task.kind, length, run.optim.batch_size, _learning_rate(run), published))
        title = "Deviations from the published setup:" if found else "Differences from the setup it is based on:"
        details += [title, "\n".join(f"- {text}" for text in protocol.deviations)]
    columns = ("protocol", "task", "length", "batch size", "learning rate", "published (%)")
    return _page([*parts, _table(columns, rows), *details])


def _learning_rate(run: RunConfig) -> str:
    """Return the learning rate; for SGD through AdamW, with an eps far above the second moment, the rate of SGD."""
    optim = run.optim
    if optim.momentum_correction:
        return f"{optim.lr:g}"
    sgd = optim.lr * (1 - optim.betas[0]) / optim.eps
    return f"[{sgd:g} (SGD)](../explanation/fine-tuning-deviations.md#linear-evaluation-on-a-frozen-backbone)"


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/config.md": config_page,
    "reference/recipes.md": recipes_page,
    "reference/backbones.md": backbones_page,
    "reference/protocols.md": protocols_page,
}
"""Functions that return the pages, by path in the site."""


# ------------------------------------------------------------------ commands


def _command(command: Any, path: str, level: int = 3) -> Iterator[str]:
    yield f"{'#' * level} {path}"
    yield from (_paragraph(text) for text in (command.help or "").split("\n\n"))
    if getattr(command, "commands", None):
        if command.params:
            yield from _options(command)
        for name, child in command.commands.items():
            yield from _command(child, f"{path} {name}", level + 1)
        return
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join([path, *(_argument(param) for param in arguments), "[OPTIONS]"])
    yield f"```console\n{usage}\n```"
    if arguments:
        yield _table(("argument", "meaning"), ((f"`{_argument(each)}`", each.help or "") for each in arguments))
    yield from _options(command)
    if command.epilog:
        yield f"```console\n{command.epilog.removeprefix('Example: ')}\n```"


def _options(command: Any) -> Iterator[str]:
    options = [param for param in command.params if param.param_type_name == "option" and "--help" not in param.opts]
    if options:
        rows = ((_names(each), _values(each), _default(each), _plain(each.help)) for each in options)
        yield _table(("option", "values", "default", "meaning"), rows)


def _argument(param: Any) -> str:
    name = (param.metavar or param.name).strip("[]").upper() + ("…" if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _names(param: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def _values(param: Any) -> str:
    if param.metavar:
        return _choices(param.metavar.replace("\n", "").strip("[]"))
    return "" if param.is_flag else f"`{param.name.removeprefix('as_').upper()}`"


def _default(param: Any) -> str:
    if param.required:
        return "required"
    return "" if param.default in (None, False, (), []) else f"`{param.default}`"


# ------------------------------------------------------------------ sections


def _section(doc: SectionDoc, first: Mapping[str, str]) -> Iterator[str]:
    """Yield a section. Kinds that are described at another path link to it; `first` has the paths by summary."""
    yield f"## {doc.path or 'top level'}"
    if doc.summary:
        yield doc.summary
    if doc.kinds:
        kinds = doc.kinds.items()
        rows = ((_kind(name, first.get(meaning, ""), doc.path), _sentence(meaning)) for name, meaning in kinds)
        yield _table(("kind", "meaning"), rows)
    if doc.fields:
        fields = (
            (f"`{f.name}`", _choices(f.type), f.default and f"`{f.default}`", _short(f.meaning)) for f in doc.fields
        )
        yield _table(("field", "type", "default", "meaning"), fields)
        yield "\n".join(f"- `{f.name}`: {f.meaning}" for f in doc.fields if _short(f.meaning) != f.meaning)


def _kind(name: str, described: str, path: str) -> str:
    anchor = re.sub(r"[^\w-]", "", described.lower())
    return f"[`{name}`](#{anchor})" if described not in ("", f"{path}.{name}") else f"`{name}`"


# ------------------------------------------------------------------ Markdown


def _choices(text: str) -> str:
    """Return `a|b|c` as code, with a place to break the line after each choice."""
    return ", ".join(f"`{choice}`" for choice in text.split("|"))


def _linked(text: str) -> str:
    """Return the text with links in place of paths such as docs/guides/export.md."""
    return re.sub(r"docs/([\w/-]+)\.md(#[\w-]+)?", lambda page: f"[{page[1]}](../{page[1]}.md{page[2] or ''})", text)


def _sentence(text: str) -> str:
    """Return the first sentence."""
    return text.partition(". ")[0].rstrip(".") + "."


def _short(text: str) -> str:
    """Return a text for a cell of a table, without links to pages; of a long one, the first sentence."""
    text = re.sub(r" \(docs/\S+?\)", "", text)
    return text if len(text.split()) <= _CELL_WORDS else _sentence(text)


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("\\[", "[").split())


def _paragraph(text: str | None) -> str:
    return _plain(text)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("][", "]\\[").replace("\n", " ")


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _page(parts: Iterable[str]) -> str:
    return _linked("\n\n".join(part for part in parts if part)) + "\n"


if __name__ == "__main__":
    for page, render in PAGES.items():
        target = Path(sys.argv[1]) / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(), encoding="utf-8")
