"""Opens a page in headless Chromium, and says what a reader would stumble over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
MOST_MS = 300_000
"""Playwright waits so long for whatever has to happen: 30 s are few on a busy machine."""
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}

FAULTS = Path(__file__).with_name("faults.js").read_text(encoding="utf-8")


@dataclass
class Opened:
    """A page, and all that it has said and asked for."""

    page: Page
    size: str
    messages: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and errors that no script has caught."""
    addresses: list[str] = field(default_factory=list)
    """Requests to a network."""

    def drawn(self) -> None:
        """Wait until all charts that are shown are drawn."""
        self.page.wait_for_selector("body[data-drawn=true]")

    def faults(self) -> list[str]:
        """What is wrong with what is shown just now, in words."""
        found: list[str] = self.page.evaluate(FAULTS)
        return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's own Chromium. The test is skipped where there is none; under CI, which installs it, it fails."""
    path = shutil.which("chromium")
    if path is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS, timeout=MOST_MS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, size: str, scheme: str) -> Iterator[Opened]:
    """A file as a reader sees it on a `desktop` or a `phone`, `light` or `dark`, once its charts are drawn."""
    phone = size == "phone"
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme, has_touch=phone, is_mobile=phone)
    page.set_default_timeout(MOST_MS)
    seen = Opened(page, size)
    page.on("console", lambda said: seen.messages.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    page.on(
        "request",
        lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else seen.addresses.append(asked.url),
    )
    page.goto(file.as_uri())
    seen.drawn()
    yield seen
    page.close()
