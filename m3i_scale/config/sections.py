"""Base classes, types and limits shared by all sections of a config file, and sections with several kinds."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializationInfo,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.files import local_path

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

# Upper limits of sizes are far above any real model, but low enough that a number with three extra zeros fails at once.
MAX_LAYERS = 1_000
"""Layers of a model or a head."""
MAX_VIEWS = 1_000
"""Crops of an image, masks of a crop, or blocks of a mask."""
MAX_HEADS = 1_024
"""Attention heads, or groups of channels."""
MAX_WIDTH = 2**18
"""Channels."""
MAX_SIDE = 2**14
"""Pixels, patches or cells along a side of an image."""
MAX_CANDIDATES = 2**24
"""Prototypes, clusters, queries, regions, or vectors in a queue."""
MAX_BATCH = 2**24
"""Samples in a step or a micro-batch."""
MAX_CAPTION_TOKENS = 2**16
"""Tokens of a caption."""
MAX_STREAMS = 2**20
"""Logical data shards."""
MAX_HELD_IMAGES = 10**6
"""Images kept in memory over all ranks."""
MAX_WORKERS = 1_024
"""Data loader processes per rank."""
MAX_WAIT_S = 1e9
"""Seconds; about 31 years, effectively no limit."""
MAX_ASPECT = 20.0
"""Aspect ratio (longer side / shorter side), or maximum factor by which scale jitter shrinks or enlarges an image."""


class FixableError(ValueError):
    """Raised when a config value violates a validation rule; carries a suggested fix.

    Args:
        what: description of the error.
        fix: `key=value`, or a sentence.
        conflicts_with: another field of the same section that the rule compares.
    """

    def __init__(self, what: str, fix: str, conflicts_with: str | None = None) -> None:
        super().__init__(what)
        self.fix, self.conflicts_with = fix, conflicts_with


class Section(BaseModel):
    """Base class of all sections: immutable, without unknown keys or non-finite numbers."""

    # Build schemas on first use to keep `--help` fast.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numbers: YAML reads `yes` and `on` as true, and pydantic reads true as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        types = set(_types_in(annotation))
        for key, leaf in _leaves(value):
            if isinstance(leaf, bool) and types & {int, float} and bool not in types:
                kind = "float_type" if float in types else "int_type"
                raise PydanticCustomError(kind, "is a boolean", {"key": key and f".{key}", "leaf": leaf})
        return value


SectionT = TypeVar("SectionT", bound=Section)


def is_stored(info: ValidationInfo) -> bool:
    """Return whether the values belong to a finished training. Its export skips range checks of training options."""
    return bool(info.context and info.context.get("stored"))


def may_import(info: ValidationInfo) -> bool:
    """Return whether user-defined modules may be imported: only those named in the user's config file."""
    return bool(info.context and info.context.get("imports"))


PathT = TypeVar("PathT", str, Path)


def _in_home(path: PathT) -> PathT:
    return type(path)(os.path.expanduser(path))


InHome = AfterValidator(_in_home)
"""Path with `~` expanded to the home directory, which shells do not do after `key=`."""


def _written(place: Any, info: ValidationInfo) -> Any:
    if not isinstance(place, str | Path):
        return place
    if is_stored(info):
        return os.path.expanduser(place)
    try:
        return local_path(place)
    except ConfigError as error:
        raise FixableError(f"{error.what}; {error.why}" if error.why else error.what, error.fix or "") from None


WrittenPath = Annotated[Path, BeforeValidator(_written)]
"""Path to write to; see `local_path`."""


def plain_values(value: Any) -> Any:
    """Return the explicitly set fields of a section; return any other value unchanged."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    for key, leaf in _leaves(fields):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"'{key}' is {leaf}, which nothing can be computed with")
    return fields


ModelFields = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Fields of a `transformers` configuration."""


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield key, value
        return
    for name, part in items:
        yield from _leaves(part, f"{key}.{name}" if key else str(name))


class Kind(Section):
    """Base class of sections with several kinds, where each kind is a class with separate fields.

    A family is a subclass of `Kind` with an empty `kinds`. Each of its subclasses with a `kind` is registered by that
    name:

        class Shape(Kind):
            kinds: ClassVar[dict[str, type[Kind]]] = {}

        class Circle(Shape):
            kind: ClassVar[str] = "circle"
            radius: float = 1.0

    An intermediate class that is not a kind itself also sets `kinds`, to its family's. A class with a `kind` but no
    family is a family of one: its fields accept no other kind, and `kind` is optional there.

    A field of type `Shape` then accepts `circle`, `{kind: circle, radius: 2}`, or
    `{kind: my_package.my_module.Square}`, the import path of a user-defined subclass of `Shape`. Such a class has no
    other name and does not set `kind`.
    """

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    """Classes of the family by name."""
    modules: ClassVar[dict[str, str]] = {}
    """Modules that define the kinds of a family, by kind. A module is imported when a config names its kind."""
    kind: ClassVar[str] = ""
    """Name of the class in config files. Default: its import path."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Register a class that sets `kind`: in a family, only this package may. Name any other class by its import
        path."""
        super().__pydantic_init_subclass__(**options)
        path = f"{cls.__module__}.{cls.__qualname__}"
        if "kind" not in cls.__dict__:
            cls.kind = path
        elif cls.kinds is Kind.kinds:
            cls.kinds = {cls.kind: cls}
        elif cls.kind in cls.kinds:
            raise TypeError(f"'{cls.kind}' is the name of {cls.kinds[cls.kind]} already; without `kind`, it is {path}")
        elif cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise TypeError(f"run files know {path} by its import path alone: leave out `kind`")
        else:
            cls.kinds[cls.kind] = cls

    @classmethod
    def choices(cls) -> list[str]:
        modules = cls.__dict__.get("modules", {})
        return [*(name for name, kind in cls.kinds.items() if issubclass(kind, cls) and name not in modules), *modules]

    @classmethod
    def class_of(cls, value: Any, *, imports: bool = False) -> type[Kind]:
        """Return the class that a config value names, as a string or in its `kind`. Raise ValueError if it is no
        subclass of this class. With `imports`, import the module of a user-defined class, which runs its code."""
        kind = value.get("kind") if isinstance(value, dict) else value
        if not isinstance(kind, str):
            raise FixableError("there is no `kind`", f"one of {', '.join(cls.choices())}")
        if kind in cls.choices():
            if kind not in cls.kinds:
                importlib.import_module(cls.modules[kind])
            return cls.kinds[kind]
        if _IMPORT_PATH.fullmatch(kind):
            return cls._import_class(kind, imports=imports)
        raise FixableError(f"no such kind: '{kind}'", did_you_mean(kind, cls.choices()))

    @classmethod
    def _import_class(cls, path: str, *, imports: bool) -> type[Kind]:
        module, _, name = path.rpartition(".")
        if imports:
            import_module(module)
        if module not in sys.modules:
            raise FixableError(
                f"'{path}' is a class of somebody's own, whose module is not imported: reading this file runs no code",
                f"where you trust it: --import {module}, or in Python `import {module}` before",
            )
        kind = vars(sys.modules[module]).get(name)  # not getattr: modules can compute attributes, which runs their code
        if not (isinstance(kind, type) and issubclass(kind, cls)):
            raise ValueError(f"'{path}' is no subclass of {cls.__module__}.{cls.__name__}")
        if missing := sorted(kind.__abstractmethods__):
            raise FixableError(f"'{path}' does not define {', '.join(missing)}", "define it in the class")
        return kind

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Any:
        """Validate the other fields with the class that `kind` names."""
        if isinstance(value, cls):
            return value
        named = isinstance(value, str) or (isinstance(value, dict) and "kind" in value)
        if not named and ("kinds" not in cls.__dict__ or cls.kinds.get(cls.kind) is cls):
            return handler(value)
        kind = cls.class_of(value, imports=may_import(info))
        fields = {key: field for key, field in value.items() if key != "kind"} if isinstance(value, dict) else {}
        return kind.model_validate(fields, context=info.context)

    @model_serializer
    def _with_kind(self, info: SerializationInfo) -> dict[str, Any]:
        names = [name for name in type(self).model_fields if not info.exclude_unset or name in self.model_fields_set]
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}


def import_module(module: str) -> None:
    """Import a module with user-defined classes, which runs its code. Raise FixableError if that fails."""
    try:
        importlib.import_module(module)
    except Exception as error:  # user code can raise anything
        raise FixableError(
            f"cannot import '{module}': {type(error).__name__}: {error}",
            "install the package, or put its folder on PYTHONPATH, on every host",
        ) from error


def import_given(modules: Sequence[str] | None) -> None:
    """Import the modules that a user names, which runs their code."""
    for module in modules or ():
        try:
            import_module(module)
        except FixableError as error:
            raise ConfigError(str(error), where="--import", fix=error.fix) from error
