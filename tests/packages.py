"""The packages of `packages.toml`: which module belongs where, what imports what, and how large each package is.

`python tests/packages.py` prints lines and files.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it too

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "m3i_scale"


@dataclass(frozen=True)
class Size:
    """Lines and files."""

    lines: int = 0
    files: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.lines + other.lines, self.files + other.files)


def read_toml(name: str) -> dict[str, Any]:
    return tomllib.loads((TESTS / name).read_text(encoding="utf-8"))


LAYOUT = read_toml("packages.toml")
_OWNERS = {
    prefix: name for part in ("core", "extensions") for name, prefixes in LAYOUT[part].items() for prefix in prefixes
}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def package_of(module: str) -> str:
    """`scale.checkpoint.saver` → checkpoint. Raises KeyError where no package has it."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(_OWNERS[prefix] for prefix in prefixes if prefix in _OWNERS)


def imported_modules(source: str) -> set[str]:
    """Return the modules of this package that a file imports, at any depth of it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("m3i_scale.") for name in names if name.startswith("m3i_scale.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside} & set(MODULES)


def is_allowed(importer: str, imported: str) -> bool:
    """Return whether a package may import another one."""
    if importer == imported or importer == "entry" or imported in set(LAYOUT["core"]) - {"entry"}:
        return True
    return imported in LAYOUT["extension_imports"].get(importer, ())


def forbidden_imports() -> dict[str, list[str]]:
    """Return by module what it imports and its package may not."""
    found = {}
    for module, path in MODULES.items():
        package = package_of(module)
        imported = imported_modules(path.read_text(encoding="utf-8"))
        if names := sorted(name for name in imported if not is_allowed(package, package_of(name))):
            found[module] = names
    return found


def sizes() -> dict[str, Size]:
    """Return the size of every package, of the `core`, and of all."""
    found: dict[str, Size] = {}
    for module, path in MODULES.items():
        package = package_of(module)
        size = Size(len(path.read_text(encoding="utf-8").splitlines()), 1)
        for name in (package, *(["core"] if package in LAYOUT["core"] else []), "all"):
            found[name] = found.get(name, Size()) + size
    return found


def main() -> None:
    for name, size in sorted(sizes().items(), key=lambda item: -item[1].lines):
        print(f"{name:<16} {size.lines:>7,} lines {size.files:>4} files")


if __name__ == "__main__":
    main()
