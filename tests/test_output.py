"""Text of others does not steer the terminal: no control character but those of rich's own styles."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from m3i_scale.cli import main
from m3i_scale.output import print_line, wide_console
from m3i_scale.text import printable

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202e\r\x00\udc80b"


def is_clean(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_printable_is_what_any_terminal_takes() -> None:
    assert is_clean(printable(HOSTILE))
    assert printable("a\n\tb") == "a\\n\\tb"
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("données ▲") == "données ▲"


def test_tables_and_lines_of_a_console_are_clean() -> None:
    table = Table(HOSTILE)
    table.add_row(HOSTILE.replace("[", "("))
    table.add_row(Text(HOSTILE))
    for soft_wrap in (False, True):
        console = wide_console(file=io.StringIO(), soft_wrap=soft_wrap, width=70)
        console.print(table, HOSTILE, Text(HOSTILE))
        assert is_clean(console.file.getvalue())


def test_styles_remain() -> None:
    console = wide_console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text("a", style="red"))
    assert console.file.getvalue() == "\x1b[31ma\x1b[0m\n"


def test_lines_are_clean_on_both_streams(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(HOSTILE)
    print_line(f"{HOSTILE}\nb", stderr=True)
    written = capsys.readouterr()
    assert is_clean(written.out + written.err)
    assert (written.out.count("\n"), written.err.count("\n")) == (1, 2)


@pytest.mark.parametrize("words", [["config"], ["report"], ["checkpoint", "inspect"], ["shards", "check"]])
def test_errors_are_clean(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["m3i-scale", *words, f"/nowhere/{HOSTILE[:-3]}.yaml".replace("\x00", "")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert "error:" in text
    assert "\\x1b[2J" in text
    assert is_clean(text)
