"""Complete the site of docs/ while mkdocs builds it (see mkdocs.yml).

CONTRIBUTING.md and CHANGELOG.md become pages, reference pages are generated, and links to other files of the repository
lead to the repository.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import m3i_scale

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launchers"))

from _reference import PAGES  # noqa: E402  (next to this file, which mkdocs loads by its path)

TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages of the site for files at the top of the repository."""
PYTHON_API = {
    "Commands": ["train", "export", "evaluate", "embed", "list_recipes"],
    "Write a training loop": [
        *("load_run", "load_recipe", "open_stream", "build_objective", "load_backbone"),
        *("parameter_groups", "learning_rate", "update_ema", "merge_states"),
    ],
    "Classes": ["RunConfig", "Recipe", "TrainStream", "Batch", "Objective", "LoadedBackbone"],
    "Errors": ["UserError", "ConfigError", "DataError", "ExportError", "AggregateError"],
}
EXTENSIONS = {
    "Objective": [
        *("objective.targets.base.Target", "objective.distributions.Distribution", "objective.distributions.Loss"),
        *("objective.regularizers.Regularizer", "objective.masks.Mask", "objective.decoders.DecoderSpec"),
        "objective.balance.BalanceSpec",
    ],
    "Training": ["run.hooks.Hook", "run.callbacks.Callback"],
    "Models and data": ["backbones.base.Backbone", "backbones.sources.base.Source", "shards.records.Input"],
    "Launchers": ["launch.job.Job", "launch.description.Cluster"],
}
"""Base classes of the extension points in CONTRIBUTING.md."""
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the top of the repository, and the generated ones."""
    for name, page in TOP.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=_from_top((ROOT / name).read_text(encoding="utf-8"))))
    missing = set(m3i_scale.__all__) - {name for names in PYTHON_API.values() for name in names}
    if missing:
        raise ValueError(f"PYTHON_API lacks {', '.join(sorted(missing))}")
    pages = {name: render() for name, render in PAGES.items()}
    pages["reference/python-api.md"] = _from_docstrings("Python API", PYTHON_API)
    pages["reference/extensions.md"] = _from_docstrings("Extension points", EXTENSIONS)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to their page, or to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite_link(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        if not path.startswith("../"):
            return link[0]
        outside, anchor = path.removeprefix("../"), link[2] or ""
        if outside in TOP:
            return f"]({posixpath.relpath(TOP[outside], folder or '.')}{anchor})"
        return f"]({config.repo_url}/blob/main/{outside}{anchor})"

    return LINK.sub(rewrite_link, markdown)


def _from_top(text: str) -> str:
    """Return a page from the top of the repository, with its links relative to docs/."""
    return LINK.sub(lambda link: f"]({_in_docs(link[1])}{link[2] or ''})", text)


def _in_docs(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"


def _from_docstrings(title: str, parts: dict[str, list[str]]) -> str:
    lines = [f"# {title}"]
    for part, names in parts.items():
        lines += [f"## {part}", *(f"::: m3i_scale.{name}\n    options:\n      heading_level: 3" for name in names)]
    return "\n\n".join(lines)
