"""Command-line options that are defined once: a set shared by several commands, or the fields of a model.

A command declares one parameter for the object built from the options, such as `options: ShardOptions`. The decorated
function has the options in place of this parameter, and typer inspects that signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from m3i_scale.files import local_path
from m3i_scale.text import wrapped_choices

if TYPE_CHECKING:
    from pydantic import BaseModel

Command = Callable[..., None]
Imports = Annotated[
    list[str] | None, typer.Option("--import", help="Module with custom classes of the recipe. This runs its code.")
]
RunFile = Annotated[str, typer.Argument(help="Config file, or the name of a built-in config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as section.key=value; `m3i-scale config` lists them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
_CHOICES_WIDTH = 15
"""Characters of the type column in `--help`, of which 80 leave little for the texts."""
Parts = Mapping[str, tuple[Any, Any]]
"""Type and default of every option, by parameter name; `inspect.Parameter.empty` means no default."""


def choices(*names: str) -> dict[str, Any]:
    """Return arguments of `typer.Option` for a closed set: `--help` shows `[a|b|c]`, and shells complete the values.
    The function behind the command validates the value and names the closest choice."""
    return {
        "metavar": "\n".join(wrapped_choices(f"[{'|'.join(names)}]", _CHOICES_WIDTH)),
        "autocompletion": lambda incomplete: [name for name in names if name.startswith(incomplete)],
    }


def writes_to(parameter: typer.CallbackParam, place: Path | None) -> Path | None:
    """Validate an option for an output file or folder; the `callback` of every such option."""
    return None if place is None else local_path(place, f"{parameter.opts[0]} {place}")


def expanded(command: Command, parameter: str, parts: Parts, build: Callable[..., object]) -> Command:
    """Return the command with `parameter` replaced by the options `parts`, from which `build` makes its value."""
    signature = inspect.signature(command, eval_str=True)
    named: list[inspect.Parameter] = []
    for known in signature.parameters.values():
        keyword = known.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        named += (
            [keyword]
            if known.name != parameter
            else [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for name, (kind, default) in parts.items()
            ]
        )

    @functools.wraps(command)
    def call(**given: Any) -> None:
        made = build(**{name: given.pop(name) for name in parts})
        command(**given, **{parameter: made})

    call.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    call.__annotations__ = {known.name: known.annotation for known in named}
    return call


def field_options(
    model: type[BaseModel], fields: Iterable[str], names: Mapping[str, str], panel_of: Callable[[str], str | None]
) -> Parts:
    """Return an option for each of these fields of a model, with its docstring (`use_attribute_docstrings`) as help.
    The default is None. `names` are option names that differ from the field names; `panel_of` returns the panel of
    `--help` for a help text."""
    parts = {}
    for name in fields:
        field = model.model_fields[name]
        text = escape(" ".join((field.description or "").split()))
        words = [names[name]] if name in names else []
        known = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        option = typer.Option(*words, help=text, rich_help_panel=panel_of(text), **(choices(*known) if known else {}))
        parts[name] = (Annotated[_option_type(field.annotation) | None, option], None)
    return parts


def _option_type(annotation: Any) -> Any:
    """Return the type for typer: a plain type or a list, without None and constraints, which the model validates."""
    origin, inner = get_origin(annotation), [kind for kind in get_args(annotation) if kind is not NoneType]
    if origin is Literal:
        return str
    if origin is tuple:
        return list[_option_type(inner[0])]  # type: ignore[misc]
    return _option_type(inner[0]) if inner else annotation


@contextmanager
def reading_bar() -> Iterator[Callable[[str, int], None]]:
    """Show the activity and number of samples read of an evaluation, on terminals only."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    console = Console(stderr=True)
    # Standard output is not redirected to the bar's console.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("loading", total=None)

        def tell(what: str, samples: int) -> None:
            bar.update(task, description=f"{what}: {samples:,} samples" if samples else what)

        yield tell
