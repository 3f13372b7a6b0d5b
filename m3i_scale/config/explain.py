"""Convert pydantic validation errors into config errors that name the key and suggest a fix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from m3i_scale.config.sections import Kind, Section, SectionT
from m3i_scale.errors import AggregateError, ConfigError, did_you_mean
from m3i_scale.text import redact_text
from m3i_scale.upgrade import KEYS

KeyPath = tuple[int | str, ...]
WhereOf = Callable[[KeyPath], str]
_BRANCHES = ("float", "int", "str", "constrained-float")
"""Path components that pydantic adds for the members of a union, as if they were keys."""

_INTEGER, _NUMBER, _LIST = "must be an integer", "must be a number", "must be a list"
_RULES = {
    "int_type": _INTEGER,
    "int_parsing": _INTEGER,
    "int_from_float": _INTEGER,
    "int_parsing_size": "must be a smaller integer",
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "path_type": "must be a path",
    "list_type": _LIST,
    "tuple_type": _LIST,
    "dict_type": "must be a section",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
}
"""Rules by pydantic's type of error; for other types, its message is used."""

HINTS = {
    "epochs": "optim.steps (samples × epochs / optim.batch_size); of one dataset: data.datasets.NAME.epochs",
    "max_steps": "optim.steps",
    "learning_rate": "optim.lr",
    "per_device_train_batch_size": "optim.micro_batch_size",
    "gradient_accumulation_steps": "optim.batch_size: it is micro_batch_size × accumulation × ranks",
    "warmup_epochs": "optim.warmup_steps",
    "clip_grad": "optim.clip_grad_norm",
    "model": "backbone.preset",
    "pretrained": "backbone.from_pretrained",
    "img_size": "backbone.config.image_size",
    "image_size": "backbone.config.image_size",
    "gradient_checkpointing": "backbone.activation_checkpointing",
    "dataset": "data.datasets.NAME.path",
    "precision": "deepspeed, the name or path of a DeepSpeed JSON, e.g. zero3_bf16",
    "bf16": "deepspeed, the name or path of a DeepSpeed JSON, e.g. zero3_bf16",
    "resume_from": "checkpoint.resume",
    "ema_decay": "recipe.ema.start",
}
"""Current key by name: common names in other code bases that are not similar to it, and old names here."""
HINTS |= {
    path.rpartition(".")[2]: f"{path.rpartition('.')[0]}.{name}".lstrip(".")
    for path, name in KEYS.items()
    if "*" not in path and not path.startswith("recipe.")
}


def parse_section(
    kind: type[SectionT],
    values: Any,
    *,
    where: str | WhereOf,
    below: str = "",
    stored: bool = False,
    imports: bool = False,
) -> SectionT:
    """Parse `values` as a `kind`; validation errors become ConfigErrors with the key and its closest known name.
    `where` is the location for error messages, or a function that returns the location of a key of the section. `below`
    is the key of the section in the config file. `stored` and `imports`: see `is_stored` and `may_import`."""
    try:
        return kind.model_validate(values, context={"stored": stored, "imports": imports})
    except ValidationError as error:
        config_error = validation_error(kind, error, where if callable(where) else lambda place: where, values, below)
    raise config_error


def validation_error(
    kind: type[Section], error: ValidationError, where_of: WhereOf, values: Any, below: str = ""
) -> ConfigError:
    """Convert a ValidationError of `values` into a ConfigError, with one error per key. `where_of` returns where a key
    was written. `below` is the key of the section in the config file."""
    error_of: dict[str, ConfigError] = {}
    for detail in error.errors():
        key = ".".join(map(str, _without_branches(detail["loc"])))
        error_of.setdefault(key, _explain(kind, values, detail, _places(detail, where_of), below))
    # Of the members of a union, the one that was parsed furthest has the most useful error.
    errors = [found for key, found in error_of.items() if not any(other.startswith(f"{key}.") for other in error_of)]
    return errors[0] if len(errors) == 1 else AggregateError(errors)


def _places(detail: Any, where_of: WhereOf) -> str:
    """Return where the key of an error was written. If a rule compares it with another key and no override sets it,
    also return where that key was written."""
    here = where_of(detail["loc"])
    other = getattr(detail.get("ctx", {}).get("error"), "conflicts_with", None)
    if other is None or here.startswith("override"):
        return here
    there = where_of((*detail["loc"][:-1], other))
    return here if here == there else f"{there}; {here}: {detail['loc'][-1]}"


def reason_of(error: OSError | ValidationError) -> str:
    """Return a short reason why a JSON file cannot be read: the OS error, or its first invalid field."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"'{place}': {first['msg']}" if place else first["msg"]


def origin(place: KeyPath, overrides: Sequence[str], path: Path) -> str:
    """Return where a key was set: the last override of it or of a section around it, else all overrides below it
    (secrets redacted), else the config file."""
    parts = [str(part) for part in place]
    keys = {override: override.partition("=")[0].split(".") for override in overrides}
    around = [override for override, key in keys.items() if parts[: len(key)] == key]
    below = [override for override, key in keys.items() if parts and key[: len(parts)] == parts]
    found = around[-1:] or below
    return "; ".join(f"override {redact_text(override)}" for override in found) or str(path)


def _without_branches(place: KeyPath) -> list[int | str]:
    return [part for part in place if part not in _BRANCHES and "[" not in str(part)]  # tuple[float, float]


def _section_at(kind: type[BaseModel], values: Any, path: KeyPath) -> type[BaseModel]:
    """Return the section at `path` in `kind`, or the last typed section if the path leaves the typed part."""
    here, value = kind, values
    for part in path:
        field = here.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        here = sections[0] if sections else here
        value = _part_of(value, part)
        if issubclass(here, Kind) and isinstance(value, str | dict) and part != "kind":
            try:
                here = here.class_of(value)
            except ValueError:  # reported for the key `kind` itself
                continue
    return here


def _part_of(value: Any, part: int | str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _explain(kind: type[BaseModel], values: Any, detail: Any, where: str, below: str) -> ConfigError:
    loc = _without_branches(detail["loc"])
    key = ".".join([*([below] if below and loc else []), *map(str, loc)])
    if detail["type"] == "extra_forbidden":
        return ConfigError(f"unknown key '{key}'", where=where, fix=_nearest(kind, values, detail["loc"]))
    usual = _usual_value(kind, values, detail["loc"], key)
    if detail["type"] == "missing":
        return ConfigError(f"'{key}' is missing", where=where, fix=usual or f"set {key}")
    if detail["type"] == "model_type":
        section = _section_at(kind, values, detail["loc"])
        required = [name for name, field in section.model_fields.items() if field.is_required()]
        keys = " or ".join(f"{key}.{name}=…" for name in required or [*section.model_fields][:3])
        return ConfigError(f"'{key}' must be a section, got {_got(detail['input'])}", where=where, fix=f"set {keys}")
    if detail["type"] == "value_error":  # one of our rules: its message is complete
        rule = detail["ctx"]["error"]
        return ConfigError(f"'{key}': {rule}" if key else str(rule), where=where, fix=getattr(rule, "fix", None))
    context = detail.get("ctx", {})
    rule = _RULES[detail["type"]].format(**context) if detail["type"] in _RULES else f"is invalid: {detail['msg']}"
    value = context.get("leaf", detail["input"])
    fix = usual or f"correct the value of {key}"
    if detail["type"] == "list_type" and isinstance(value, dict) and value:
        item = f"{key}.{next(iter(value))}.NAME=VALUE"
        fix = f"write the complete list, or set a key of one item on the command line: {item}"
    if detail["type"] == "literal_error":
        rule = rule.replace("True", "true").replace("False", "false")  # as in YAML
        fix = _nearest_choice(key, value, context["expected"], fix)
    return ConfigError(f"'{key}{context.get('key', '')}' {rule}, got {_got(value)}", where=where, fix=fix)


def _got(value: Any) -> str:
    if isinstance(value, bool):
        return "true (YAML reads on, yes as true)" if value else "false (YAML reads off, no as false)"
    return "null" if value is None else redact_text(repr(value))


def _nearest_choice(key: str, value: Any, expected: str, fix: str) -> str:
    """Suggest one of the `expected` words: what YAML has read as a boolean, in quotes, or a similar word."""
    choices, word = re.findall(r"'([^']+)'", expected), "on" if value else "off"
    if isinstance(value, bool) and word in choices:
        return f"quote the value, e.g. '{key}=\"{word}\"'"
    return did_you_mean(value, choices, fix) if isinstance(value, str) and value.lower() != "none" else fix


def _nearest(kind: type[BaseModel], values: Any, path: KeyPath) -> str:
    """Suggest a replacement for an unknown key: a synonym, the same name in another section, or a similar name."""
    name = str(path[-1])
    meant = HINTS.get(name.casefold())
    if meant is not None and re.split(r"[ ,.:]", meant)[0] in kind.model_fields:
        return f"did you mean {meant}?"
    elsewhere = sorted(key for key in _keys_of(kind) if key.rpartition(".")[2] == name)
    if elsewhere:
        return "did you mean " + " or ".join(f"'{key}'" for key in elsewhere) + "?"
    here = _section_at(kind, values, path[:-1])
    known = [*here.model_fields, *(["kind"] if issubclass(here, Kind) else [])]
    if not known:
        return "leave it out: there is nothing to set here"
    hint = did_you_mean(name, known, otherwise="")
    if not hint and (near := get_close_matches(name.casefold(), HINTS, n=1, cutoff=0.8)):  # learning_rte
        return _nearest(kind, values, (*path[:-1], near[0]))
    return hint or did_you_mean(name, known)


def _keys_of(kind: type[BaseModel], above: str = "") -> list[str]:
    """Return all dotted keys of a section and its subsections, excluding user-defined names such as datasets."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(f"{above}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys_of(field.annotation, f"{above}{name}.")
    return keys


def _usual_value(kind: type[BaseModel], values: Any, path: KeyPath, key: str) -> str | None:
    """Suggest a value for a key: the allowed values of its field, the kinds of its section, or the default. Return None
    if there are none."""
    loc = _without_branches(path)
    while loc and isinstance(loc[-1], int):  # an item of a list
        loc.pop()
    field = _section_at(kind, values, tuple(loc[:-1])).model_fields.get(str(loc[-1])) if loc else None
    if field is None:
        return None
    choices: Sequence[Any] = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Kind):
        choices = field.annotation.choices()
    if choices:
        return f"use one of: {', '.join(map(str, choices))}".replace("True", "true").replace("False", "false")
    default = json.dumps(field.default, separators=(",", ":"), default=lambda _: "null").strip('"')
    return None if default in ("", "null") else f"{re.sub(r'([.][0-9]+)+$', '', key)}={default} (the default)"
