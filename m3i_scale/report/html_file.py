"""Self-contained HTML pages: no network, no other files, and only embedded scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from m3i_scale.errors import ConfigError
from m3i_scale.files import replacing

TEMPLATES = Path(__file__).parent / "templates"


def check_page(page: Path) -> None:
    """Check that a page can be written to a path."""
    if not page.parent.is_dir():
        raise ConfigError(
            "the folder for the report does not exist", where=str(page.parent), fix=f"run `mkdir -p {page.parent}`"
        )
    if page.suffix != ".html" or page.is_dir():  # a typo must not overwrite a file of a run
        raise ConfigError(
            f"the name of a report must end in .html, got '{page.name}'", where=str(page), fix="use --output FILE.html"
        )


def rendered(template: str, **values: Any) -> str:
    """Render a template with the shared style; text is HTML-escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def write_page(text: str, page: Path) -> None:
    """Write a page atomically, replacing an existing one. Its path has passed `check_page`."""
    try:
        with replacing(page) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ConfigError(
            f"cannot write the report: {error.strerror}",
            where=str(page),
            fix="free space, or use another --output",
        ) from None
