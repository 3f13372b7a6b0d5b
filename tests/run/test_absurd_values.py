"""Values that no one means, generated from the schema: each is an error with its key or a valid run, and neither a
traceback nor work without end."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from shapes import write_run
from tiny import DINOV2, DINOV3, MAPS
from torch import nn

from m3i_scale.config import RunConfig, Section, parse_section, run_values
from m3i_scale.config.sections import Kind
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe
from m3i_scale.run.check import errors_of
from m3i_scale.run.run_warnings import warnings_of

pytestmark = pytest.mark.slow

ABSURD = (-1, 0, 10**9, 10**30, float("nan"), float("inf"), "", [], {}, [10**9, 1], {"kind": []}, "x" * 1000, None)
AS_YAML = ("-1", "0", "1000000000", ".nan", ".inf", "''", "[]", "{}")
NOTHING_IS_BUILT_OF = {
    # Steps and passes are counted, not built.
    *("steps", "warmup_steps", "epochs", "every_steps", "keep_every_steps", "pictures_every_steps", "milestones"),
    # Limits: what there is less of is not made up to them.
    *("keep_latest", "count", "batches", "max_rewinds", "max_skipped_in_a_row", "window", "min_history", "patience"),
    *("max_image_pixels", "max_caption_bytes", "max_sample_bytes", "shuffle_shards", "max_read_attempts"),
}
"""Whole numbers without an upper limit."""


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def sections() -> list[type[Section]]:
    """All sections of a run file and of a recipe, and all kinds of them."""
    found: dict[type[Section], None] = {}
    waiting: list[type[Section]] = [RunConfig, Recipe]
    while waiting:
        section = waiting.pop()
        if section in found:
            continue
        found[section] = None
        parts = [part for field in section.model_fields.values() for part in types_in(field.annotation)]
        waiting += [part for part in parts if isinstance(part, type) and issubclass(part, Section)]
        if issubclass(section, Kind):
            kinds = [section.class_of(name) for name in section.choices()]
            waiting += [kind for kind in kinds if kind.__module__.startswith("m3i_scale.")]
    return list(found)


SECTIONS = sections()


def is_whole_number(annotation: Any) -> bool:
    """An `int`, also one that may be left out."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return int in parts


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_size_has_an_upper_limit(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        limited = any(hasattr(limit, "le") or hasattr(limit, "lt") for limit in field.metadata)
        if is_whole_number(field.annotation) and name not in NOTHING_IS_BUILT_OF:
            assert limited, f"{section.__name__}.{name}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_section_explains_what_it_does_not_take(section: type[Section]) -> None:
    for name in section.model_fields:
        for value in ABSURD:
            try:
                read = parse_section(section, {name: value}, where="here")
            except ConfigError:
                continue
            assert isinstance(read, BaseModel)


def numeric_keys(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numeric_keys(part, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from numeric_keys(part, f"{key}.{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key


@dataclass(frozen=True)
class Numbers:
    """Of a run on the tiny shards."""

    recipe: str
    below: str = ""
    overrides: tuple[str, ...] = ()


NUMBERS = {
    "all of m3i": Numbers("m3i"),
    **{f"recipe of {name}": Numbers(name, "recipe.") for name in ("capi", "moco", "coca", "ijepa")},
    "InternImage": Numbers("byol", "backbone.", MAPS),
    "DINOv2": Numbers("mae", "backbone.", DINOV2),
    "DINOv3": Numbers("mae", "backbone.", DINOV3),
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_check_explains_absurd_numbers_and_builds_no_more_for_them(
    numbers: Numbers, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = 0
    start = nn.Module.__init__

    def counted(module: nn.Module, *given: Any, **named: Any) -> None:
        nonlocal built
        built += 1
        start(module, *given, **named)

    run_file = str(write_run(tmp_path, shards, numbers.recipe, *numbers.overrides))
    run, parsed = load_run_and_recipe(run_file)
    values = {**run.model_dump(mode="json"), "recipe": parsed.model_dump(mode="json")}
    monkeypatch.setattr(nn.Module, "__init__", counted)
    assert errors_of(run_file) == []
    usual = built
    alike = {re.sub(r"\.\d+", "", key): key for key in numeric_keys(values, "") if key.startswith(numbers.below)}
    keys = alike.values()
    assert len(keys) > 4
    for key in keys:
        for text in AS_YAML:
            built = 0
            override = f"{key}={text}"
            for fault in errors_of(run_file, [override]):
                assert fault.where, override
            assert all(isinstance(warning, str) for warning in warnings_of(run_file, [override]))
            assert built <= 2 * usual, override


@pytest.mark.parametrize("written", ["[a]", "{a: 1}", "{kind: [a]}", "3", "null"])
@pytest.mark.parametrize(
    "key", ["recipe.targets.0.head", "recipe.targets.1.regularizer", "recipe.heads", "recipe.heads.global"]
)
def test_lists_and_mappings_for_names_are_told(key: str, written: str, shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    for fault in errors_of(run_file, [f"{key}={written}"]):
        assert fault.where is not None


def test_a_recipe_that_is_extended_may_have_lists_for_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("extends: m3i\nrecipe: {heads: [a], targets: [{name: old, modality: image, head: {a: 1}}]}\n")
    assert run_values(str(path))["recipe"]["heads"] == ["a"]
    assert errors_of(str(path))
