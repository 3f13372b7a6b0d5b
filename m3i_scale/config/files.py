"""Config files as written: locate them, parse their YAML, resolve `extends` and apply `key=value` overrides.

The YAML parser is for untrusted files: YAML 1.2 numbers, no duplicate keys, and a limit on alias expansion.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from m3i_scale.errors import ConfigError, ErrorCollector, did_you_mean, error_prefix
from m3i_scale.files import similar_path
from m3i_scale.text import redact_text
from m3i_scale.upgrade import upgrade_config

_PACKAGE = Path(__file__).resolve().parent.parent
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""Exceptions for invalid YAML: undecodable bytes, syntax errors, invalid dates (2024-13-01), or excessive nesting."""

MAX_VALUES = 100_000
"""Maximum number of values of a document after alias expansion. The largest built-in recipe has a few hundred."""
_LETTERS = 64
"""Characters of a long string that count as one additional value."""


def resource_folder(name: Literal["recipes", "protocols", "ds_configs"]) -> Path:
    """Return the folder of built-in files: next to the package in a checkout, inside it in an installed wheel."""
    checkout = _PACKAGE.parent / name
    return checkout if checkout.is_dir() else _PACKAGE / f"_{name}"


def known_runs() -> dict[str, Path]:
    """Return built-in config files by name: recipes, their model sizes, and protocols of tasks."""
    return _recipe_files() | known_protocols()


def known_protocols() -> dict[str, Path]:
    """Return built-in config files that train a task with a published protocol."""
    return {path.stem: path for path in sorted(resource_folder("protocols").glob("*.yaml"))}


def _recipe_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(resource_folder("recipes").glob("*.yaml"))}


def known_recipes() -> dict[str, Path]:
    """Return built-in config files that define a recipe. Files that extend another one only change its model size."""
    return {name: path for name, path in _recipe_files().items() if "extends" not in read_yaml(path)}


def find_run_file(name_or_path: str) -> Path:
    """Return the path of a built-in config file (`m3i`) or of a file. A built-in name has priority."""
    built_in = known_runs()
    path = built_in.get(name_or_path, Path(name_or_path))
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            "a folder is not a config file",
            where=str(path.absolute()),
            fix=f"`m3i-scale init {shlex.quote(name_or_path)}` writes a config file for a folder of images",
        )
    what = f"no config file '{redact_text(name_or_path)}', and no built-in config of that name"
    if re.match(r"[A-Za-z_][\w.-]*=", name_or_path):
        raise ConfigError(what, fix="put the config file first, then settings, e.g. `run.yaml optim.lr=3e-4`")
    fix = did_you_mean(name_or_path, built_in, similar_path(path, "check the path."))
    raise ConfigError(what, where=str(path.absolute()), fix=f"{fix} `m3i-scale recipes` lists the built-in recipes")


def run_values(
    name_or_path: str, overrides: list[str] | None = None, errors: ErrorCollector | None = None
) -> dict[str, Any]:
    """Return the values of a config file with `extends` and `key=value` overrides applied, without validation. With
    `errors`, invalid overrides are collected there and left out, so that the rest can be validated."""
    if isinstance(overrides, str):  # a string would be read as one override per letter
        raise ConfigError(
            f"overrides must be a list, got '{redact_text(overrides)}'",
            where="load_run",
            fix=f'use ["{redact_text(overrides)}"]',
        )
    path = find_run_file(name_or_path)
    values = _read_with_base(path, ())
    collected = ErrorCollector() if errors is None else errors
    for override in overrides or []:
        collected.collect(_apply_override, values, override)
    if errors is None:
        collected.raise_any()
    return values


def values_beyond_built_in(name_or_path: str, overrides: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Return the built-in config that a run is or extends (None: it extends none), and the values that the user's
    config files and overrides set beyond it."""
    built_in = {path.resolve(): name for name, path in known_runs().items()}
    path, values = find_run_file(name_or_path).resolve(), dict[str, Any]()
    while path not in built_in:
        here = upgrade_config(read_yaml(path))
        base = here.pop("extends", None)
        values = _merge(here, values)
        if base is None:
            break
        path = _base_path(path, base).resolve()
    for override in overrides:
        _apply_override(values, override)
    return built_in.get(path), values


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(
            "config files must not extend each other in a circle",
            where=" → ".join(map(str, [*seen, path])),
            fix="remove `extends` from one of them",
        )
    values = upgrade_config(read_yaml(path))
    base = values.pop("extends", None)
    if base is None:
        return values
    return _merge(_read_with_base(_base_path(path, base), (*seen, path)), values)


def _base_path(path: Path, base: Any) -> Path:
    """Return the file that the config file at `path` extends: a built-in one, or one next to it."""
    sibling = path.parent / str(base)
    return sibling if sibling.is_file() and str(base) not in known_runs() else find_run_file(str(base))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    with error_prefix(f"override {redact_text(override)}"):
        _set(values, override)


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"'{redact_text(override)}' is not an override", fix="write section.key=value, e.g. optim.lr=3e-4"
        )
    if not text.strip():
        raise ConfigError(
            f"'{key}' must have a value, got none",
            why="a shell gives this for a variable that is not set",
            fix="set the variable, or leave the override out",
        )
    try:
        value = parse_yaml(text, f"'{key}'")
    except NOT_YAML as error:
        raise ConfigError(
            f"the value of '{key}' is not YAML: {redact_text(str(getattr(error, 'problem', None) or error))}",
            fix=f"quote the value, e.g. '{key}=\"VALUE\"'",
        ) from None
    if isinstance(value, str) and text.strip() == value and _is_number(value):
        value = float(value)  # YAML 1.1 reads 3e-4 as text, which is never intended unless it is quoted
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(
            f"'{key}' must name a key of a section, but '{part}' is below a single value",
            fix=f"remove '{part}' and what follows, or set the section",
        )


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ConfigError(
            f"'{key}' must name a key of a section, but a part of it is a single value",
            fix="remove the last part of the key, or set the section",
        )
    if node.get(part) is None:
        node[part] = {}
    elif isinstance(node[part], str) and key.startswith("recipe."):  # a section given only by its kind
        node[part] = {"kind": node[part]}
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        names = [
            f"{number} {item['name']}" for number, item in enumerate(node) if isinstance(item, dict) and "name" in item
        ]
        fix = "count from 0" + (f": {', '.join(names)}" if names else "")
        raise ConfigError(f"'{part}' in '{key}' must be an index from 0 to {len(node) - 1}", fix=fix)
    return int(part)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return any(character.isdigit() for character in text)


# ------------------------------------------------------------------ YAML


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
        raise ConfigError(
            f"cannot read the config file: {redact_text(str(error)).replace('<unicode string>', str(path))}",
            where=str(path),
            fix="correct the YAML, or make the file readable",
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            "a config file must be a YAML mapping",
            where=str(path),
            fix="write `section: …` lines, as in recipes/m3i.yaml",
        )
    return values


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML document. Raise YAMLError if invalid, ConfigError for duplicate keys or too many alias values."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node, where)
        _check_keys(node, where, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_aliases(root: yaml.Node, where: str) -> None:
    """Reject documents with aliases that contain themselves or expand to fill the memory ("billion laughs")."""
    expanded: dict[int, int] = {}
    written = 0

    def size_of(node: yaml.Node) -> int:
        nonlocal written
        if (size := expanded.get(id(node))) is not None:
            if size == 0:
                raise yaml.MarkedYAMLError(problem="an anchor contains itself", problem_mark=node.start_mark)
            return size
        expanded[id(node)] = 0
        parts = [part for entry in node.value for part in entry] if isinstance(node, yaml.MappingNode) else node.value
        own = 1 if isinstance(node, yaml.CollectionNode) else 1 + len(node.value) // _LETTERS
        written += own
        expanded[id(node)] = own + (sum(map(size_of, parts)) if isinstance(node, yaml.CollectionNode) else 0)
        return expanded[id(node)]

    if (total := size_of(root)) > MAX_VALUES and total > written:
        raise ConfigError(
            f"aliases in the YAML must expand to at most {MAX_VALUES:,} values",
            where=where,
            why="a few lines would fill the memory",
            fix="write the values out",
        )


def _check_keys(node: yaml.Node, where: str, seen: set[int], above: str = "") -> None:
    """Raise ConfigError for a key that occurs twice in its mapping. `above` is the dotted prefix of the keys."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_keys(item, where, seen, f"{above}{number}.")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            same, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if same in lines:
                raise ConfigError(
                    f"'{above}{key.value}' is set twice",
                    where=f"{where}, lines {lines[same]} and {line}",
                    why="only the last value would be used",
                    fix="remove one of them",
                )
            lines[same] = line
            _check_keys(value, where, seen, f"{above}{key.value}.")
