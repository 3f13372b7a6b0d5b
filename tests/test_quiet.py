"""What an evaluation does is shown on a terminal alone, and never on standard output."""

from __future__ import annotations

import logging

import pytest

from m3i_scale.options import reading_bar
from m3i_scale.output import quiet_loading


def show() -> None:
    with reading_bar() as tell:
        tell("data", 1280)
        print("{}")


def test_a_terminal_shows_it_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    show()
    out, err = capsys.readouterr()
    assert out == "{}\n"
    assert "data: 1,280 samples" in err


def test_a_file_has_nothing_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    show()
    assert capsys.readouterr() == ("{}\n", "")


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_models_load_without_messages() -> None:
    logger, kept = logging.getLogger("transformers.modeling_utils"), Messages()
    logger.addHandler(kept)
    try:
        with quiet_loading():
            logger.warning("while a model is loaded")
        logger.warning("later")
    finally:
        logger.removeHandler(kept)
    assert kept.texts == ["later"]
