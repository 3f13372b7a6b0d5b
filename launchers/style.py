"""Count marker words, which make sentences hard to read, per 1,000 words of pages, help texts, docstrings and comments.

    python launchers/style.py [--lines N] [PATH …]

Without PATH: README.md, CONTRIBUTING.md, docs/ and m3i_scale/. `--lines` also prints the N lines with the most markers.
Exit code 0 whatever it counts: some of the words have a plain meaning, too.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ("README.md", "CONTRIBUTING.md", "docs", "m3i_scale")
MARKERS = re.compile(
    r"\b(?:told|tells?|says|said|found|own|whose|anew|mend(?:s|ed)?|beside|stands?|lies|behind|(?:as|so) many|"
    r"go(?:es)? on|to the bit|has none|have none|where there (?:is|are)|what is|what was|by itself|by themselves|"
    r"figures?|refuses?|refused|whole|hidden|shown|average|averaged|first weights)\b"
    r"|(?:^|(?<=[.:] ))(?-i:What|Whatever|Whoever|Who)\b(?![^.]*\?)|\b(?:that|those) of\b",
    re.IGNORECASE,
)
"""Words and phrases that pages, help texts, docstrings and comments should not use."""
_CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<[^>]+>", re.DOTALL)


@dataclass
class Line:
    """A line of prose."""

    path: Path
    number: int
    text: str

    @property
    def markers(self) -> list[str]:
        return MARKERS.findall(self.text)


def page_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a Markdown page without code and link targets."""
    text = _CODE.sub(lambda match: "\n" * match[0].count("\n") or " ", path.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), 1):
        yield Line(path, number, line)


def module_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of docstrings (also of fields), comments and `help=` texts of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Expr | ast.keyword) else None
        if isinstance(node, ast.keyword) and node.arg != "help":
            continue
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            for number, line in enumerate(text.value.splitlines(), text.lineno):
                yield Line(path, number, _CODE.sub(" ", line))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#:", "# type:", "# noqa")):
            yield Line(path, token.start[0], _CODE.sub(" ", token.string.lstrip("# ")))


def display_path(path: Path) -> str:
    """Return the path below the repository, or the full path of another file."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def group_of(path: Path) -> str:
    """Return the page, or the package of a module."""
    parts = Path(display_path(path)).parts
    return str(Path(*parts[:2])) if path.suffix == ".py" and len(parts) > 2 else display_path(path)


def rate(lines: list[Line]) -> tuple[int, int, float]:
    """Return words, markers, and markers per 1,000 words."""
    words = sum(len(line.text.split()) for line in lines)
    markers = sum(len(line.markers) for line in lines)
    return words, markers, 1000 * markers / max(words, 1)


def main() -> None:
    """Print a row per page and package, worst first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="Files and folders.")
    parser.add_argument("--lines", type=int, default=0, metavar="N", help="Print the N worst lines.")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.paths] or [ROOT / name for name in DEFAULT]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    groups: dict[str, list[Line]] = defaultdict(list)
    for file in files:
        if file.suffix in (".md", ".py"):
            groups[group_of(file)] += page_lines(file) if file.suffix == ".md" else module_lines(file)
    rows = {name: rate(lines) for name, lines in groups.items()}
    pages = rate([line for name, lines in groups.items() if name.endswith(".md") for line in lines])
    modules = rate([line for name, lines in groups.items() if not name.endswith(".md") for line in lines])
    worst_first = sorted(rows.items(), key=lambda row: -row[1][2])
    for name, (words, markers, per_thousand) in [*worst_first, ("pages", pages), ("package", modules)]:
        print(f"{per_thousand:6.1f} per 1,000 words {markers:6,} of {words:7,} {name}")
    lines = [line for lines in groups.values() for line in lines if line.markers]
    for line in sorted(lines, key=lambda line: -len(line.markers))[: options.lines]:
        print(f"{display_path(line.path)}:{line.number}: {line.text.strip()}")


if __name__ == "__main__":
    main()
