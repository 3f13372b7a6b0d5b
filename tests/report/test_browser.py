"""The report of a run in a real browser: on a desktop and a phone, light and dark."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import MOST_MS, SIZES, Opened, chromium, opened
from playwright.sync_api import Browser, Locator
from run_folder import PICTURES, write_run

from m3i_scale.evaluation.command_line import write_comparison

BAD_PAGE = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><title>Bad</title>
<body data-drawn="true" style="background: white">
<h1>All that is wrong</h1> <h3>A level is left out</h3>
<p style="color: #999">Too pale</p> <p style="opacity: 0.3">Too thin</p> <p style="font-size: 9px">Too small</p>
<div style="background: #000"><p style="color: white">Good</p><svg><text y="20" fill="#333">Too dark</text></svg></div>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="> <div style="width: 2000px">Wide</div>
<figure data-chart="loss"><svg width="50" height="50"><path d="M0,0 L9,9"/></svg></figure>
<script src="http://127.0.0.1:9/none.js"></script><script>console.warn("said"); throw new Error("thrown")</script>
"""
WAIT_S = 300.0
FAULTS_OF_IT = ["contrast", "contrast", "font", "contrast", "width", "no alt text", "h3 after h1", "empty chart"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "first"), write_run(folder / "second", name="twice-the-rate", lr=2e-3, seed=1)]


def make_report(*runs: Path) -> Path:
    target = runs[0].parent / f"{len(runs)}.html"
    command = [sys.executable, "-m", "m3i_scale", "report", *map(str, runs), "--output", str(target)]
    subprocess.run(command, check=True, timeout=900)
    return target


@pytest.fixture(scope="module")
def of_one_run(runs: list[Path]) -> Path:
    return make_report(runs[0])


@pytest.fixture(scope="module")
def of_two_runs(runs: list[Path]) -> Path:
    return make_report(*runs)


@pytest.fixture(
    scope="module",
    params=[(size, scheme) for size in ("desktop", "phone") for scheme in ("light", "dark")],
    ids="-".join,
)
def report(request: pytest.FixtureRequest, browser: Browser, of_one_run: Path) -> Iterator[Opened]:
    with opened(browser, of_one_run, *request.param) as shown:
        yield shown


def tabs(report: Opened) -> list[Locator]:
    return report.page.get_by_role("tab").all()


def show(report: Opened, name: str) -> None:
    report.page.get_by_role("tab", name=name).click()
    report.drawn()


def curves(report: Opened, chart: str) -> list[str]:
    """The paths of its curves, without the lines that mark events."""
    selector = f"figure[data-chart={chart}] .overplot > .xy .trace path.js-line"
    return [str(line.get_attribute("d")) for line in report.page.locator(selector).all()]


def wait_until(report: Opened, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        report.page.wait_for_timeout(20)


def repeat_until(report: Opened, act: Callable[[], None], holds: Callable[[], bool]) -> None:
    """Act again every second: on a loaded machine the page may see the halves of a gesture too far apart."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        act()
        for _ in range(50):
            report.page.wait_for_timeout(20)
            if holds():
                return


def assert_flawless(report: Opened) -> None:
    faults = []
    for tab in tabs(report):
        tab.click()
        report.drawn()
        faults += [f"{tab.inner_text()}: {fault}" for fault in report.faults()]
    assert faults == []
    assert report.messages == []
    assert report.addresses == []


def test_what_is_wrong_with_a_page_is_found(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD_PAGE)
    with opened(browser, tmp_path / "bad.html", "phone", "light") as bad:
        assert len(bad.faults()) == len(FAULTS_OF_IT)
        assert all(fault.startswith(kind) for fault, kind in zip(bad.faults(), FAULTS_OF_IT, strict=True))
        assert bad.addresses == ["http://127.0.0.1:9/none.js"]
        assert [message.split()[0] for message in bad.messages] == ["Failed", "said", "thrown"]


def test_every_tab_is_drawn_readable_and_silent(report: Opened) -> None:
    assert_flawless(report)


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_so_are_runs_over_each_other(browser: Browser, of_two_runs: Path, size: str, scheme: str) -> None:
    with opened(browser, of_two_runs, size, scheme) as both:
        assert len(curves(both, "loss")) == 2
        assert_flawless(both)


def test_tabs_answer_clicks_and_keys(report: Opened) -> None:
    first, second, *_, last = tabs(report)
    for act, chosen in [
        (second.click, second),
        (first.click, first),
        (lambda: first.press("ArrowRight"), second),
        (lambda: second.press("End"), last),
    ]:
        act()
        report.drawn()
        assert [tab.get_attribute("aria-selected") for tab in tabs(report)].count("true") == 1
        assert chosen.get_attribute("aria-selected") == "true"
        panels = report.page.get_by_role("tabpanel").all()  # only those that are shown
        assert [panel.get_attribute("id") for panel in panels] == [chosen.get_attribute("aria-controls")]


def test_legends_answer_clicks_and_keys(report: Opened) -> None:
    show(report, "Losses")
    chart = report.page.locator("figure[data-chart]", has=report.page.get_by_role("button", name="category")).first
    name = str(chart.get_attribute("data-chart"))
    button = chart.get_by_role("button", name="category")
    before = curves(report, name)
    for act, count in [(button.click, len(before) - 1), (lambda: button.press("Enter"), len(before))]:
        act()
        report.drawn()
        assert len(curves(report, name)) == count
        assert button.get_attribute("aria-pressed") == str(count == len(before)).lower()


def test_log_scale_and_smoothing_change_what_is_drawn(report: Opened) -> None:
    show(report, "Overview")
    linear = curves(report, "loss")
    log_scale, smoothing = report.page.get_by_role("button", name="Log scale"), report.page.get_by_label("Smoothing")
    log_scale.click()
    report.drawn()
    assert curves(report, "loss") != linear
    log_scale.press("Enter")
    report.drawn()
    assert curves(report, "loss") == linear
    smoothing.fill("0.9")
    report.drawn()
    assert curves(report, "loss")[-1] not in linear
    assert "0.9" in report.page.locator("#toolbar").inner_text()
    smoothing.fill("0")
    report.drawn()
    assert curves(report, "loss") == linear


def test_a_constant_stays_one_when_smoothed(report: Opened) -> None:
    show(report, "Data")
    report.page.get_by_label("Smoothing").fill("0.97")
    report.drawn()
    curves_of_shares = report.page.evaluate("document.getElementById('plot-mixture').data")
    report.page.get_by_label("Smoothing").fill("0")
    report.drawn()
    asked = [
        curve["y"]
        for curve in curves_of_shares
        if curve["line"]["dash"] == "dot" and curve["name"].endswith("(target)")
    ]
    assert {value for values in asked for value in values} == {0.25, 0.75}


def test_the_axis_of_a_constant_stays_near_it(report: Opened) -> None:
    show(report, "Health")
    low, high = report.page.evaluate("document.getElementById('plot-count').layout.yaxis.range")
    assert (low, high) == pytest.approx((460.8, 563.2))


def test_verdicts_of_a_comparison_are_on_the_screen_of_a_phone(browser: Browser, tmp_path: Path) -> None:
    model = {"name": "a model", "path": "/data/export", "type": "vit", "image_size": 224, "pool": "mean"}
    figure = {"value": 0.25, "low": -0.125, "high": 0.125}
    row = {"before": figure, "after": figure, "difference": figure, "change": "no difference shown"}
    data = {"shards": "/data/shards/val", "samples": 9, "clusters": 9, "cluster_unit": "sample"}
    of_set = {"data": data, "train_data": None, "measures": {"mean_average_precision": row}, "not_measured": {}}
    document = {"before": model, "after": model, "level": 0.95, "sets": {"data": of_set | {"warnings": []}}}
    write_comparison(document, {}, tmp_path / "page.html")
    page = browser.new_page(viewport=SIZES["phone"], has_touch=True, is_mobile=True)
    page.set_default_timeout(MOST_MS)
    page.goto((tmp_path / "page.html").as_uri())
    box = page.get_by_text("no difference shown").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= SIZES["phone"]["width"]
    page.close()


def test_no_button_sends_anything(report: Opened) -> None:
    show(report, "Overview")
    titles = report.page.locator("figure[data-chart=loss] [data-title]").evaluate_all(
        "(buttons) => buttons.map((button) => button.dataset.title)"
    )
    allowed = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    assert set(titles) <= allowed
    assert bool(titles) == (report.size == "desktop")


def test_a_pointer_over_a_curve_shows_its_value_and_step(report: Opened) -> None:
    show(report, "Overview")
    report.page.locator("figure[data-chart=loss] .nsewdrag").first.hover()
    shown = report.page.locator("figure[data-chart=loss] .hoverlayer text")
    shown.first.wait_for()
    values = [float(word.replace(",", "")) for word in re.findall(r"[\d,.]+\d", " ".join(shown.all_text_contents()))]
    assert any(900 < value < 1100 for value in values)  # the step in the middle
    assert any(4 < value < 6 for value in values)  # the loss there


def test_a_drag_zooms_in_where_there_is_a_mouse(report: Opened) -> None:
    show(report, "Overview")
    plot = report.page.locator("figure[data-chart=loss] .nsewdrag").first
    before = curves(report, "loss")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None

    def drag() -> None:
        report.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
        report.page.mouse.down()
        report.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=4)
        report.page.mouse.up()

    if report.size == "desktop":
        repeat_until(report, drag, lambda: curves(report, "loss") != before)
        repeat_until(report, plot.dblclick, lambda: curves(report, "loss") == before)
    else:
        drag()
        report.page.wait_for_timeout(400)
        assert curves(report, "loss") == before


def test_pictures_follow_their_slider(report: Opened) -> None:
    show(report, "Pictures")
    images = report.page.locator("[role=tabpanel]:not([hidden]) img")

    def shown() -> list[str | None]:
        return [image.get_attribute("src") for image in images.all() if image.is_visible()]

    newest = shown()
    slider = report.page.get_by_role("slider", name="Step")
    slider.press("ArrowLeft")
    assert len(shown()) == len(newest) == len(PICTURES)
    assert not set(shown()) & set(newest)
    slider.press("ArrowRight")
    assert shown() == newest


def test_a_picture_grows_and_shrinks(report: Opened) -> None:
    show(report, "Pictures")
    figure = report.page.locator("[role=tabpanel]:not([hidden]) figure").first
    image = figure.locator("img:visible")

    def width() -> float:
        box = image.bounding_box()
        assert box is not None
        return box["width"]

    before = width()
    figure.get_by_role("button", name="Size of").press("Enter")
    assert width() > 1.5 * before
    figure.get_by_role("button", name="Size of").click()
    assert width() == before
