"""Make the site of docs/ complete; mkdocs calls this while it builds (see mkdocs.yml).

The menu is docs/index.md. Pages and files beside docs/ that pages link to (../CONTRIBUTING.md) become pages and files
of the site, so that the same link works there and where the repository is browsed. Two pages come from docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import m3i_scale

ROOT = Path(__file__).resolve().parent.parent
TOP = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
"""Pages beside docs/, and what they are called in the site."""
API, EXTENSIONS = "api.md", "extensions.md"
FAMILIES = [
    "objective.regularizers.Regularizer",
    "objective.distributions.Distribution",
    "objective.distributions.Loss",
    "objective.masks.Mask",
    "objective.targets.base.Target",
    "objective.decoders.DecoderSpec",
    "objective.balance.BalanceSpec",
    "run.hooks.Hook",
    "run.callbacks.Callback",
    "backbones.base.Backbone",
    "shards.records.Input",
    "backbones.sources.base.Source",
    "launch.job.Job",
    "launch.description.Cluster",
]
"""What CONTRIBUTING.md says is extended by a class, or given to it."""
LINK_OUT = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the menu from docs/index.md: a section for every heading, an entry for every row."""
    menu: list[dict[str, str | list[dict[str, str]]]] = [{"Pages": "index.md"}, {"Overview": TOP["README.md"]}]
    for part in (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        rows = re.findall(r"^\| \[(.+?)\]\((\S+?)\)", part, re.MULTILINE)
        menu.append({part.splitlines()[0]: [{title: page} for title, page in rows]})
    reference = [{"Public interface": API}, {"Extension points": EXTENSIONS}]
    menu.append({"Reference": [*reference, {"Contributing": TOP["CONTRIBUTING.md"]}, {"Changes": TOP["CHANGELOG.md"]}]})
    config.nav = menu
    config.watch += [str(ROOT / name) for name in TOP]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, the files that pages link to, and the pages from docstrings."""
    for name, page in TOP.items():
        files.append(File.generated(config, page, content=_from_top((ROOT / name).read_text(encoding="utf-8"))))
    linked = {path for page in files.documentation_pages() for path in LINK_OUT.findall(page.content_string)}
    for path in linked - TOP.keys():
        if (ROOT / path).is_file():  # else the link is dead, and mkdocs says so
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    public = [f"m3i_scale.{name}" for name in m3i_scale.__all__]
    files.append(File.generated(config, API, content=_reference("Public interface", public)))
    families = [f"m3i_scale.{name}" for name in FAMILIES]
    files.append(File.generated(config, EXTENSIONS, content=_reference("Extension points", families)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ lead to the copies in the site."""
    return LINK_OUT.sub(lambda link: f"]({TOP.get(link[1], link[1])}", markdown)


def _from_top(text: str) -> str:
    """Return a page beside docs/ with links as a page in docs/ has them."""
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", lambda link: f"]({_moved(link[1])})", text)


def _moved(link: str) -> str:
    return link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"


def _reference(title: str, names: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
