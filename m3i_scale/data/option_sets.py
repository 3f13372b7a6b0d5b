"""Sets of options that several commands take, defined once: a command asks for the object that they make.

A function with a parameter `options: ShardOptions` becomes one with the options of the command line in its place, which
is what typer looks at.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from m3i_scale.data.cut import Cut, ShardOptions
from m3i_scale.data.options import DEFAULTS, MaxMb, MultipleOf, PerShard, SkipBad, Vocabulary, Workers
from m3i_scale.data.tools.parallel import DEFAULT_WORKERS

Command = Callable[..., None]
Parts = Mapping[str, tuple[Any, Any]]
"""Type and default of every option, by name."""

_SIZES: Parts = {
    "samples_per_shard": (PerShard, DEFAULTS.samples_per_shard),
    "max_mb": (MaxMb, DEFAULTS.max_mb),
    "multiple_of": (MultipleOf, DEFAULTS.multiple_of),
}
_WORKERS: Parts = {"workers": (Workers, DEFAULT_WORKERS)}
_MAKE: Parts = {
    **_SIZES,
    "vocabulary": (Vocabulary, DEFAULTS.vocabulary),
    "skip_bad": (SkipBad, DEFAULTS.skip_bad),
    **_WORKERS,
}
_CUT: Parts = {
    "shard_count": (
        Annotated[int | None, typer.Option("--shards", min=1, help="Exactly so many shards, of every split.")],
        None,
    ),
    **_SIZES,
    "keep_order": (
        Annotated[
            bool, typer.Option("--keep-order", help="Fill shards in order of the input, not by a hash of the key.")
        ],
        False,
    ),
    **_WORKERS,
}


def takes_shard_options(command: Command) -> Command:
    """Options of everything that makes shards, in place of the parameter `options`."""
    return _expanded(command, "options", _MAKE, ShardOptions)


def takes_cut(command: Command) -> Command:
    """Options of everything that cuts shards anew, in place of the parameter `cut`."""
    return _expanded(command, "cut", _CUT, _cut)


def _cut(shard_count: int | None, keep_order: bool, **sizes: Any) -> Cut:
    return Cut(ShardOptions(**sizes), shard_count, keep_order)


def _expanded(command: Command, parameter: str, parts: Parts, build: Callable[..., object]) -> Command:
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
