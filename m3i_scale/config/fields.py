"""Describe the sections of a config file and their fields, for `m3i-scale config` and the reference pages."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Group
from rich.table import Table
from rich.text import Text

from m3i_scale.config import RunConfig
from m3i_scale.config.sections import Kind, Section
from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.text import wrapped_choices

_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LARGEST_LIMIT = 10_000
"""Upper limits above it only catch slips, so they are not printed."""
_PRINTED_KINDS = 4
_TYPE_WIDTH = 16
_TYPES = {NoneType: "null", Path: "path", Any: "any"}
Sections = Mapping[str, type[Section]]
"""Sections whose fields `RunConfig` does not declare, by name: `recipe`, whose classes need torch."""


@dataclass(frozen=True)
class FieldDoc:
    """A field of a section, for people."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class SectionDoc:
    """A section of a config file, for people."""

    path: str
    """Key in config files; NAME stands for a name that users choose."""
    summary: str
    fields: tuple[FieldDoc, ...]
    kinds: dict[str, str]
    """Values of `kind` and their meanings, if the section has several kinds."""

    def document(self) -> dict[str, Any]:
        """Return the section as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Node:
    """A section class at a path; `chosen` if its kind is fixed."""

    path: str
    cls: type[Section]
    chosen: bool = False

    @property
    def kinds(self) -> dict[str, type[Kind]]:
        if self.chosen or not issubclass(self.cls, Kind) or self.cls.kinds.get(self.cls.kind) is self.cls:
            return {}
        return {name: self.cls.class_of(name) for name in self.cls.choices()}

    def children(self, more: Sections) -> dict[str, list[_Node]]:
        """Return the sections below by name: those of fields and of kinds."""
        below: dict[str, list[_Node]] = {}
        for name, field in self.cls.model_fields.items():
            path = f"{self.path}.{name}".lstrip(".") + (".NAME" if _is_map(field.annotation) else "")
            classes = [more[name]] if not self.path and name in more else list(_sections_in(field.annotation))
            below[name] = [_Node(path.removesuffix(".NAME") if name in more else path, each) for each in classes]
        for name, kind in self.kinds.items():
            below.setdefault(name, []).append(_Node(f"{self.path}.{name}", kind, chosen=True))
        return {name: nodes for name, nodes in below.items() if nodes}


def describe_section(path: str, more: Sections) -> list[SectionDoc]:
    """Describe the section at a dotted path, such as `data.augment` or `recipe.targets.dense`. A field that accepts
    classes of several families has several descriptions. The path of a single field describes that field only."""
    nodes, done = [_Node("", RunConfig)], ""
    names = [name for name in path.split(".") if name != "NAME"]
    for number, name in enumerate(names):
        below: dict[str, list[_Node]] = {}
        for node in nodes:
            for child, found in node.children(more).items():
                below.setdefault(child, []).extend(found)
        owner = next((node for node in nodes if name in node.cls.model_fields), None)
        if name in below:
            nodes, done = below[name], f"{done}.{name}".lstrip(".")
        elif owner is not None and number == len(names) - 1:
            return [SectionDoc(f"{owner.path}.{name}".lstrip("."), "", (_field(owner.cls, name, more),), {})]
        else:
            known = {*below, *(field for node in nodes for field in node.cls.model_fields)}
            fix = did_you_mean(name, known)
            raise ConfigError(f"no config section '{path}'", fix=f"in {done}: {fix}" if done else fix)
    return [_describe(node, more) for node in nodes]


def list_sections(more: Sections) -> list[SectionDoc]:
    """Describe all sections, including every kind; a class that occurs at several paths only at the first one."""
    return list(_walk(_Node("", RunConfig), more, set(), None))


def top_sections() -> list[tuple[str, str]]:
    """Return path and meaning of each top-level field, and of the sections below `data`, `checkpoint` and others."""
    rows = []
    for name, meaning in field_docstrings(RunConfig).items():
        rows.append((name, _first_sentence(meaning)))
        node = _Node("", RunConfig).children({}).get(name, [])
        for below in node:
            if not issubclass(below.cls, Kind):
                rows += [
                    (f"{below.path}.{child}", _first_sentence(field_docstrings(below.cls).get(child, "")))
                    for child, nodes in below.children({}).items()
                    if nodes[0].path.count(".") and child in below.cls.model_fields
                ]
    return rows


def section_tables(docs: Sequence[SectionDoc]) -> Group:
    """Return tables of kinds and fields for the terminal."""
    parts: list[Any] = []
    for doc in docs:
        parts.append(Text(f"{doc.path}: {doc.summary}" if doc.summary else doc.path, style="bold"))
        if doc.kinds:
            table = _table("KIND", "MEANING")
            for name, meaning in doc.kinds.items():
                table.add_row(Text(name, "bold"), Text(meaning))
            parts += [table, Text(f"Fields of a kind: m3i-scale config {doc.path.replace('.NAME', '')}.KIND\n")]
        if doc.fields:
            table = _table("NAME", "TYPE", "DEFAULT", "MEANING")
            for field in doc.fields:
                kind = "\n".join(wrapped_choices(field.type, _TYPE_WIDTH))
                table.add_row(Text(field.name, "bold"), Text(kind), Text(field.default), Text(field.meaning))
            parts.append(table)
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        width = {"TYPE": _TYPE_WIDTH, "DEFAULT": 14}.get(name)
        table.add_column(name, header_style="dim", max_width=width, overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _walk(node: _Node, more: Sections, seen: set[type], family: type[Section] | None) -> Iterator[SectionDoc]:
    if node.cls in seen:
        return
    seen.add(node.cls)
    yield _describe(node, more, beyond=family)
    for nodes in node.children(more).values():
        for child in nodes:
            yield from _walk(child, more, seen, node.cls if child.chosen else None)


def _describe(node: _Node, more: Sections, beyond: type[Section] | None = None) -> SectionDoc:
    """Describe one class, without the fields that it has unchanged from the class `beyond`."""
    known = {} if beyond is None else {name: _field(beyond, name, more) for name in beyond.model_fields}
    fields = (_field(node.cls, name, more if not node.path else {}) for name in node.cls.model_fields)
    kinds = {name: _summary(kind) for name, kind in node.kinds.items()}
    return SectionDoc(
        node.path, _summary(node.cls), tuple(field for field in fields if known.get(field.name) != field), kinds
    )


def _field(cls: type[Section], name: str, more: Sections) -> FieldDoc:
    field = cls.model_fields[name]
    type_name = "section" if cls is RunConfig and name in more else type_words(field.annotation, field.metadata)
    return FieldDoc(name, type_name, _default(field), field_docstrings(cls).get(name, ""))


@cache
def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings of the fields of a class and its bases, read from the source. pydantic could read them, too
    (`use_attribute_docstrings`), but for all classes at import, which `--help` would wait for."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not (issubclass(base, Section) and base is not Section):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for line, after in pairwise(lines):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                found[line.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return {name: found[name] for name in getattr(cls, "model_fields", {}) if name in found}


def type_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type for people: `int > 0`, `a|b|c`, `list of float`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words = type_words(inner[0], [*inner[1:], *metadata])
    elif origin is Literal:
        words = "|".join(map(_value, inner))
    elif origin in (Union, UnionType):
        words = " or ".join(dict.fromkeys(type_words(each, metadata) for each in inner if each is not NoneType))
    elif origin is tuple and inner[-1] is not Ellipsis:
        words = f"[{', '.join(type_words(_plain(each)) for each in inner)}]"
    elif origin in (list, tuple, Sequence):
        words = f"list of {type_words(inner[0])}"
    elif origin is dict:
        words = "map" if inner[1] is Any else f"map of {type_words(inner[1])}"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        words = _section_words(annotation)
    else:
        words = f"{_TYPES.get(annotation) or getattr(annotation, '__name__', 'any')} {_limits(metadata)}".strip()
    return words


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _section_words(cls: type[Section]) -> str:
    if not issubclass(cls, Kind):
        return "section"
    return "|".join(cls.choices()) if len(cls.choices()) <= _PRINTED_KINDS else "kind"


def _limits(metadata: Sequence[Any]) -> str:
    parts = [each for item in metadata for each in (item.metadata if isinstance(item, FieldInfo) else (item,))]
    limits = [(sign, getattr(part, name)) for part in parts for name, sign in _LIMITS.items() if hasattr(part, name)]
    return ", ".join(f"{sign} {value:g}" for sign, value in limits if value <= _LARGEST_LIMIT)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _value(field.get_default(call_default_factory=True, validated_data={}))


def _value(value: Any) -> str:
    if isinstance(value, Kind):
        return value.kind
    if isinstance(value, Section):
        return ""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _summary(cls: type[Section]) -> str:
    own = cls.__doc__ if "__doc__" in cls.__dict__ else None
    return " ".join((own or "").split("\n\n")[0].split())


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".") + "." if text else ""


def _is_map(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(map(_is_map, get_args(annotation)))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
