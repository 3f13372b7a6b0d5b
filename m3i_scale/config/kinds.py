"""Define sections of which there are several kinds, each a class of its own with its own fields.

A family is a class below `Kind` with an empty `kinds`; every class below it that has a `kind` is known by that name:

    class Shape(Kind):
        kinds: ClassVar[dict[str, type[Kind]]] = {}

    class Circle(Shape):
        kind: ClassVar[str] = "circle"
        radius: float = 1.0

`kinds` is also set, to that of its family, by a class between the two that is no kind itself. A class with a `kind`
and no family is one of its own: nothing else may stand in its fields, and `kind` may be left out there.

A field of type `Shape` then reads `circle`, `{kind: circle, radius: 2}`, or `{kind: my_package.my_module.Square}`, the
import path of a class of the user's own below `Shape`. Such a class has no name but that path: it states no `kind`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import ModelWrapValidatorHandler, SerializationInfo, ValidationInfo, model_serializer, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import FixableError, Section, may_import
from m3i_scale.errors import ConfigError, did_you_mean

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Kind(Section):
    """Gives families and their kinds a common base."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    """The classes of a family by name."""
    kind: ClassVar[str] = ""
    """The name of the class in run files: by default its import path."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Register a class that has a name; give others their import path for one.

        Raises:
            TypeError: the name is another class's, or that of a class outside of this package.
        """
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
        """Return the names of the kinds below this class."""
        return [name for name, kind in cls.kinds.items() if issubclass(kind, cls)]

    @classmethod
    def class_of(cls, value: Any, *, imports: bool = False) -> type[Kind]:
        """Return the class that a value of a run file names, by itself or by its `kind`.

        Args:
            value: of the run file.
            imports: whether to import the module of a class of the user's own, which runs its code.

        Raises:
            ValueError: it names none below this one.
        """
        kind = value.get("kind") if isinstance(value, dict) else value
        if not isinstance(kind, str):
            raise FixableError("there is no `kind`", f"one of {', '.join(cls.choices())}")
        if kind in cls.choices():
            return cls.kinds[kind]
        if _IMPORT_PATH.fullmatch(kind):
            return cls._own_class(kind, imports=imports)
        raise FixableError(f"no such kind: '{kind}'", did_you_mean(kind, cls.choices()))

    @classmethod
    def _own_class(cls, path: str, *, imports: bool) -> type[Kind]:
        """Return a class of the user's own."""
        module, _, name = path.rpartition(".")
        if imports:
            import_module(module)
        if module not in sys.modules:
            raise FixableError(
                f"'{path}' is a class of somebody's own, whose module is not imported: reading this file runs no code",
                f"where you trust it: --import {module}, or in Python `import {module}` before",
            )
        kind = vars(sys.modules[module]).get(name)  # no attribute: a module may compute those, which runs its code
        if not (isinstance(kind, type) and issubclass(kind, cls)):
            raise ValueError(f"'{path}' is no subclass of {cls.__module__}.{cls.__name__}")
        if missing := kind.missing_methods():
            raise FixableError(f"'{path}' does not define {', '.join(missing)}", "define it in the class")
        return kind

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Return the methods that a class must define to be used, and does not define."""
        return sorted(cls.__abstractmethods__)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Any:
        """Let the class that `kind` names read the other fields."""
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
    """Import a module with classes of the user's own, which runs its code.

    Raises:
        FixableError: it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # a module of the user's own may raise anything
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
