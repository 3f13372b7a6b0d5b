"""YAML parser for untrusted files: YAML 1.2 numbers, no duplicate keys, and a limit on alias expansion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from m3i_scale.errors import ConfigError
from m3i_scale.text import redact_text

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""Exceptions for invalid YAML: undecodable bytes, syntax errors, invalid dates (2024-13-01), or excessive nesting."""
MOST_VALUES = 100_000
"""Maximum number of values of a document after alias expansion. The largest built-in recipe has a few hundred."""
_LETTERS = 64
"""Characters of a long string that count as one additional value."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml is seven times as fast
    """YAML loader with the numbers of YAML 1.2. PyYAML follows 1.1, where `3:00` is 180 and `0300` is 192.

    Files written by PyYAML keep their values, because it quotes all strings that are YAML 1.1 numbers.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        text = str(self.construct_scalar(node))
        decimal = re.fullmatch(r"[-+]?[0-9_]+", text)
        return int(text.replace("_", "")) if decimal else text if ":" in text else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        text = str(self.construct_scalar(node))
        return text if ":" in text else super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, *NOT_YAML) as error:
        raise ConfigError(f"cannot read the run file: {redact_text(str(error))}", where=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("a run file is a YAML mapping", where=str(path), fix="see recipes/m3i.yaml")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML document. Raise YAMLError if invalid, ConfigError for duplicate keys or too many alias values."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node, where)
        repeated = dict(_repeated_keys(node, "", set()))
        if repeated:
            raise ConfigError(
                f"{' and '.join(repr(key) for key in repeated)} {'stands' if len(repeated) == 1 else 'stand'} twice",
                where="; ".join(f"{where}, lines {first} and {second}" for first, second in repeated.values()),
                why="of two values one would be dropped without a word",
                fix="leave one of them",
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_aliases(root: yaml.Node, where: str) -> None:
    """Reject documents with aliases that contain themselves or expand to fill the memory ("billion laughs")."""
    sizes: dict[int, int] = {}
    written = 0

    def size_of(node: yaml.Node) -> int:
        nonlocal written
        size = sizes.get(id(node))
        if size == 0:
            raise yaml.MarkedYAMLError(problem="an anchor holds itself", problem_mark=node.start_mark)
        if size is None:
            sizes[id(node)] = 0
            own = 1 if isinstance(node, yaml.CollectionNode) else 1 + len(node.value) // _LETTERS
            written += own
            size = sizes[id(node)] = own + sum(map(size_of, _parts_of(node)))
        return size

    total = size_of(root)
    if total > MOST_VALUES and total > written:
        raise ConfigError(
            f"the aliases of the YAML must stand for at most {MOST_VALUES:,} values, got more",
            where=where,
            why="a few lines would fill the memory",
            fix="write the values out",
        )


def _parts_of(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for entry in node.value for part in entry]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _repeated_keys(node: yaml.Node, above: str, seen: set[int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield dotted keys that occur twice in their mapping, with both line numbers counted from 1."""
    if id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for position, entry in enumerate(node.value if isinstance(node, yaml.CollectionNode) else ()):
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        name = str(position) if key is None else str(key.value)
        dotted = f"{above}.{name}" if above else name
        if isinstance(key, yaml.ScalarNode):
            same, line = (key.tag, key.value), key.start_mark.line + 1
            if same in lines:
                yield dotted, (lines[same], line)
            lines[same] = line
        yield from _repeated_keys(value, dotted, seen)
