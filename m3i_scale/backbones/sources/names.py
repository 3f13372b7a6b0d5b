"""Translate the names of the parts of a plain vision Transformer between code bases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Placed:
    """Says where a tensor goes: to one parameter, or in equal parts along its first dimension to several."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """Marks a tensor that is no part of a backbone."""

    reason: str


@dataclass(frozen=True)
class NameMap:
    """Holds the names of one code base."""

    prefix: str
    """Of the vision tower; what does not have it is `outside`."""
    outside: str
    """What lies outside the tower, in words."""
    block: str
    """Before the number of a layer."""
    outer: Mapping[str, str]
    """Part (see `TokenFamily.parts`) by name or stem (name without .weight or .bias), outside of layers."""
    inner: Mapping[str, tuple[str, ...]]
    """The same within a layer; several parts share one tensor in equal shares."""
    left_out: tuple[tuple[str, str], ...]
    """(pattern, reason) of what is no part of a backbone; patterns match from the start of the name."""

    def place(self, name: str, ours: Mapping[str, str]) -> Placed | LeftOut | None:
        """Return what becomes of a tensor; None where nothing is known of it.

        Args:
            name: in the file.
            ours: the parts of a family.
        """
        if not name.startswith(self.prefix):
            return LeftOut(self.outside)
        name = name.removeprefix(self.prefix)
        for pattern, reason in self.left_out:
            if re.match(pattern, name):
                return LeftOut(reason)
        number, stem = "", name
        table: Mapping[str, tuple[str, ...]] = {key: (part,) for key, part in self.outer.items()}
        if match := re.fullmatch(re.escape(self.block) + r"(\d+)\.(.+)", name):
            (number, stem), table = match.groups(), self.inner
        for suffix in ("", ".weight", ".bias"):
            parts = table.get(stem.removesuffix(suffix)) if stem.endswith(suffix) else None
            if parts is not None:
                targets = [_spelt(part, number, ours, suffix) for part in parts]
                return None if None in targets else Placed(tuple(target for target in targets if target))
        return None


def _spelt(part: str, number: str, ours: Mapping[str, str], suffix: str) -> str | None:
    """Return our name of a part: `q.bias`, 3 → layers.3.attention.q_proj.bias; None where our model has none."""
    stem, dot, rest = part.partition(".")
    return None if stem not in ours else ours[stem].format(number) + dot + rest + suffix
