"""Map names of a plain vision Transformer's parts between code bases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Renamed:
    """Target of a tensor: one parameter, or several that get equal parts along its first dimension."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class Unused:
    """A tensor that is not part of a backbone."""

    reason: str


@dataclass(frozen=True)
class NameMap:
    """Parameter names of one code base."""

    prefix: str
    """Prefix of the vision tower; other names are `outside`."""
    outside: str
    block: str
    """Prefix of layer numbers."""
    outer: Mapping[str, str]
    """Part (see `TokenFamily.parts`) by name or stem (name without .weight or .bias), outside of layers."""
    inner: Mapping[str, tuple[str, ...]]
    """Parts by name within a layer; several parts divide one tensor equally."""
    left_out: tuple[tuple[str, str], ...]
    """(pattern, reason) of tensors that are not part of a backbone; patterns match from the start of the name."""

    def place(self, name: str, ours: Mapping[str, str]) -> Renamed | Unused | None:
        """Return the target of a source tensor in the parts `ours` of a family, or None if its name is unknown."""
        if not name.startswith(self.prefix):
            return Unused(self.outside)
        name = name.removeprefix(self.prefix)
        for pattern, reason in self.left_out:
            if re.match(pattern, name):
                return Unused(reason)
        number, stem = "", name
        table: Mapping[str, tuple[str, ...]] = {key: (part,) for key, part in self.outer.items()}
        if match := re.fullmatch(re.escape(self.block) + r"(\d+)\.(.+)", name):
            (number, stem), table = match.groups(), self.inner
        for suffix in ("", ".weight", ".bias"):
            parts = table.get(stem.removesuffix(suffix)) if stem.endswith(suffix) else None
            if parts is not None:
                targets = [_spelt(part, number, ours, suffix) for part in parts]
                return None if None in targets else Renamed(tuple(target for target in targets if target))
        return None


def _spelt(part: str, number: str, ours: Mapping[str, str], suffix: str) -> str | None:
    """Return the name of a part in the stock model, or None: `q.bias`, 3 → layers.3.attention.q_proj.bias."""
    stem, dot, rest = part.partition(".")
    return None if stem not in ours else ours[stem].format(number) + dot + rest + suffix
