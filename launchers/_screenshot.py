"""Take the picture of a report that stands in the README.

python launchers/_screenshot.py REPORT.html docs/img/report-overview.png
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def main(report: Path, target: Path) -> None:
    """Write what Chromium shows of `report` on a desktop, its curves of the objective, into `target`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 740})
        page.goto(report.resolve().as_uri())
        page.get_by_role("tab", name="Losses").click()
        page.wait_for_selector("body[data-drawn=true]")
        content = page.screenshot()
        browser.close()
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB").quantize(256).save(target, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
