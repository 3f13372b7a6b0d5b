"""The reference pages of the site name every command, option, field, recipe, preset and protocol."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from m3i_scale.backbones import describe_presets
from m3i_scale.cli import app
from m3i_scale.config import known_protocols, known_recipes
from m3i_scale.config.fields import list_sections
from m3i_scale.objective.recipe import Recipe

FILE = Path(__file__).resolve().parents[2] / "launchers" / "_reference.py"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("reference", FILE)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {path: render() for path, render in module.PAGES.items()}


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


def test_every_command_and_option_has_its_place(pages: dict[str, str]) -> None:
    sections = dict(re.findall(r"^#+ (m3i-scale [^\n]*)\n(.*?)(?=^#+ |\Z)", pages["reference/cli.md"], re.M | re.S))
    found = dict(commands(typer.main.get_command(app), "m3i-scale"))
    del found["m3i-scale"]
    assert sections.keys() == found.keys()
    for path, command in found.items():
        for param in command.params:
            if param.param_type_name == "option" and "--help" not in param.opts:
                assert f"`{param.opts[0]}`" in sections[path], (path, param.opts)


def test_every_field_has_its_place(pages: dict[str, str]) -> None:
    text = pages["reference/config.md"]
    for doc in list_sections({"recipe": Recipe}):
        section = text.split(f"## {doc.path or 'top level'}\n")[1].split("\n## ")[0]
        for name in (*(field.name for field in doc.fields), *doc.kinds):
            assert re.search(rf"^\| \[?`{re.escape(name)}`[\] ]", section, re.M), (doc.path, name)


def test_kinds_lead_to_their_fields(pages: dict[str, str]) -> None:
    text = pages["reference/config.md"]
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    with_fields = {re.sub(r"[^\w-]", "", path.lower()) for path, text in sections.items() if "| field |" in text}
    assert "[`gaussian`](#" in sections["recipe.targets.pooled.distribution"]
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= with_fields


def test_recipes_presets_and_protocols_are_named(pages: dict[str, str]) -> None:
    assert all(f"### `{name}`" in pages["reference/recipes.md"] for name in known_recipes())
    assert all(f"| `{row['name']}` |" in pages["reference/backbones.md"] for row in describe_presets([]))
    assert all(f"## `{name}`" in pages["reference/protocols.md"] for name in known_protocols())


def test_pages_name_no_path_of_another_page(pages: dict[str, str]) -> None:
    for path, text in pages.items():
        assert not re.search(r"\bdocs/\S+\.md", text), path


def test_tables_are_whole_and_their_cells_short(pages: dict[str, str]) -> None:
    for path, text in pages.items():
        width = 0
        for line in text.splitlines():
            if not line.startswith("|"):
                width = 0
                continue
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            assert width in (0, len(cells)), (path, line)
            width = len(cells)
            assert all(len(cell.split()) <= 25 for cell in cells), (path, line)
