"""The report of runs, without a browser: what stands in the page, and what it refuses."""

import errno
import io
import json
import os
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from run_folder import START, write_run
from typer.testing import CliRunner

from m3i_scale import files
from m3i_scale.cli import app
from m3i_scale.errors import ConfigError
from m3i_scale.files import json_line, write_json
from m3i_scale.host.output_dir import lock_directory
from m3i_scale.report import albums, page
from m3i_scale.report.about import differing_settings
from m3i_scale.report.charts import CHARTS, filled_charts
from m3i_scale.report.page import open_in_browser, script_safe, write_report
from m3i_scale.report.run_files import read_run
from m3i_scale.report.watch import RunSnapshot
from m3i_scale.report.watch import render_lines as watch_lines


class Page(HTMLParser):
    """What a browser would find in a page: elements with their attributes, and the text of each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""
        self._in = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id") or tag

    def handle_data(self, data):
        if self._in == "report-data":
            self.data += data
        elif self._in not in ("script", "style"):
            self.text += f"{data}\n"

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    @property
    def values(self):
        return json.loads(self.data)

    def chart(self, name):
        return next(chart for chart in self.values["charts"] if chart["id"] == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in run.rglob("*")}
    write_report([run], path)
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in run.rglob("*")} == before
    return Page(path)


def changed(run, **fields):
    """Change fields of the run file, at the top."""
    settings = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump(settings | fields))


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_curves_are_those_of_the_records(run, report):
    records = [line for line in lines_of(run) if line["kind"] == "train"]
    loss, groups = report.chart("loss")["series"], report.chart("group_loss")["series"]
    assert [one["x"] for one in loss] == [[record["step"] for record in records]]
    np.testing.assert_allclose(loss[0]["y"], [record["loss"] for record in records], rtol=1e-4)
    assert {one["name"] for one in groups} == {"intra", "inter", "text", "category"}
    assert [one["name"] for one in report.chart("nats")["series"]] == [*(one["name"] for one in groups), "information"]
    asked = [one for one in report.chart("mixture")["series"] if one["dashed"]]
    assert {(one["group"], one["y"][-1]) for one in asked} == {("photos", 0.75), ("birds", 0.25)}
    gradient = report.chart("grad_norm")["series"][0]
    assert 50 not in gradient["x"], "an infinite value is a gap"
    assert report.chart("evaluation_top_1")["series"][0]["x"][-1] == 2000


def test_every_chart_has_its_figure_and_its_words(report):
    drawn = {found["data-chart"] for found in report.all("figure") if "data-chart" in found}
    assert drawn == {chart["id"] for chart in report.values["charts"]}
    for chart in drawn:
        assert f"plot-{chart}" in {found.get("id") for found in report.all("div")}
    tabs = {found["aria-controls"] for found in report.all("button", role="tab")}
    assert tabs == {found["id"] for found in report.all("section", role="tabpanel")}
    assert all(found.get("alt") for found in report.all("img"))


def test_shares_are_in_percent(report):
    shares = {"mfu", "data_wait_share", "mixture", "evaluation_top_1"}
    assert {chart["id"] for chart in report.values["charts"] if chart["percent"]} == shares
    newest = report.chart("mfu")["series"][0]["y"][-1]
    assert f"Newest: {100 * newest:.3g} %" in report.text


def test_events_are_marks_with_words(report):
    marks = {mark["kind"]: mark for mark in report.values["marks"]}
    assert set(marks) == {"resumed", "rewound", "warning", "lost"}
    assert (marks["resumed"]["step"], marks["rewound"]["step"], marks["warning"]["step"]) == (500, 1000, 1250)
    assert "node1" in marks["lost"]["short"]
    assert "lower its weight" in report.text


def test_the_page_tells_data_checkpoints_results_and_pictures(report):
    for words in (
        "image cannot be decoded",
        "images-000000.tar / k0001",
        "step-00002000 (latest)",
        "best 1 of 1",
        "linear accuracy",
        "0.580 … 0.640",
    ):
        assert words in report.text, words
    places = [found["data-place"] for found in report.all("img") if "data-place" in found]
    assert sorted(places) == ["0", "0", "1", "1"]


def test_the_page_needs_nothing_else_and_runs_only_its_own_scripts(report, run, tmp_path):
    addresses = [value for _, found in report.elements for name, value in found.items() if name in ("src", "href")]
    assert addresses
    assert all(value.startswith("data:") for value in addresses)
    policy = next(found["content"] for found in report.all("meta") if "http-equiv" in found)
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert write_report([run], tmp_path / "report.html")["bytes"] < 10e6


def test_a_task_shows_its_score_first_and_no_information(run, tmp_path):
    folder = tmp_path / "segmenter"
    folder.mkdir()
    shutil.copy(run / "run.yaml", folder)
    head = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    records = [head]
    for step in (10, 20):
        records.append(head | {"kind": "train", "step": step, "loss": 2 / step, "information": 0.0})
        scores = {"segmentation/miou": step / 100, "segmentation/loss": 1.0, "segmentation/count": 4.0}
        measured = {f"evaluation/{name}": value for name, value in scores.items()}
        records.append(head | {"kind": "evaluation", "step": step, **measured})
    (folder / "metrics.jsonl").write_text("".join(map(json_line, records)), encoding="utf-8")
    write_report([folder], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "mIoU, newest evaluation" in page.text
    assert "20.0%" in page.text
    assert "information, nats" not in page.text
    names = [chart["id"] for chart in page.values["charts"] if chart["tab"] == "results"]
    assert names == ["evaluation_miou", "evaluation_loss", "evaluation_count"]
    assert page.chart("evaluation_miou")["percent"]
    watched = RunSnapshot(run=read_run(folder), holder=None, ranks=[], attempts=[], quarantine={}, failure=None)
    assert any("mIoU 20.0%" in line.plain for line in watch_lines(watched, 80, 24))


def test_several_runs_lie_over_each_other_and_differing_settings_are_listed(run, tmp_path):
    other = write_run(tmp_path / "other", name="second", lr=3e-3, seed=1)
    write_report([run, other], tmp_path / "report.html")
    both = Page(tmp_path / "report.html")
    assert both.values["runs"] == ["photos-vit-l", "second"]
    assert [one["run"] for one in both.chart("loss")["series"]] == [0, 1]
    differing = both.text.partition("Settings that differ")[2].partition("Config file")[0].split()
    assert differing == [
        "Setting",
        "photos-vit-l",
        "second",
        "name",
        '"photos-vit-l"',
        '"second"',
        "optim.lr",
        "0.001",
        "0.003",
        "output_dir",
        f'"{run}"',
        f'"{other}"',
    ]


def test_names_of_others_are_text(tmp_path):
    run = write_run(tmp_path / "run", steps=200)
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    changed(run, name=attack)
    last = lines_of(run)[-2]
    with (run / "metrics.jsonl").open("a") as file:
        for record in (
            {"kind": "warning", "group": attack, "what": attack, "why": attack, "fix": attack},
            {"kind": "train", f"loss/{attack}": 1.0, f"dataset/{attack}/share": 1.0},
        ):
            file.write(json_line({"step": 201, "time": last["time"], **record}))
    write_json(run / "evaluation.json", {"measures": {attack: {"value": 1, "low": 0, "high": 1}}, "warnings": [attack]})
    write_report([run], tmp_path / "report.html")
    hostile = Page(tmp_path / "report.html")
    assert len(hostile.all("script")) == 3
    assert not [name for _, found in hostile.elements for name in found if name.startswith("on")]
    assert attack in hostile.text
    assert attack in {one["name"] for one in hostile.chart("loss_term")["series"]}  # as its name has slashes


def test_json_in_a_script_cannot_end_it():
    texts = ["</script>", "<!--", "]]>", "&amp;"]
    assert not {"<", ">", "&"} & set(script_safe(texts))
    assert json.loads(script_safe(texts)) == texts


def test_secrets_are_hidden(tmp_path):
    run = write_run(tmp_path / "run", steps=200)
    source = {"path": "https://me:hunter2@host/x.tar?signature=abc", "weight": 1.0}
    weights = {"from_pretrained": "https://me:swordfish@host/weights"}
    changed(run, data={"datasets": {"main": source}, "api_key": "xyzzy"}, backbone=weights)
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    runs = [read_run(run), read_run(write_run(tmp_path / "other", steps=200))]
    for number, one in enumerate(runs):
        one.settings["api_keys"] = [f"plugh{number}"]
    text += str(differing_settings(runs))
    assert "api_keys" in text
    assert "plugh" not in text
    assert not [secret for secret in ("hunter2", "signature=abc", "xyzzy", "swordfish") if secret in text]


def test_long_curves_keep_their_spikes_and_stacks_add_up(tmp_path):
    run = write_run(tmp_path / "run", steps=200)
    lines = lines_of(run)
    with (run / "metrics.jsonl").open("w") as file:
        file.write(json_line(lines[0]))
        for step in range(1, 6001):
            loss = 99.0 if step == 3333 else 1.0
            file.write(
                json_line(
                    lines[1]
                    | {
                        "step": step,
                        "loss": loss,
                        "time/forward": 0.7 if step % 2 else 0.3,
                        "time/other": 0.3 if step % 2 else 0.7,
                    }
                )
            )
    charts = {chart["id"]: chart for chart in filled_charts([read_run(run)], ["a"], CHARTS)}
    loss = charts["loss"]["series"][0]
    assert len(loss["x"]) <= 2000
    assert (3333, 99.0) in zip(loss["x"], loss["y"], strict=True)
    phases = {one["name"]: one for one in charts["step_times"]["series"]}
    assert len({tuple(one["x"]) for one in phases.values()}) == 1
    assert np.allclose(np.add(phases["forward"]["y"], phases["other"]["y"]), 1.0)


def test_very_many_curves_of_any_size_are_drawn(run, monkeypatch):
    monkeypatch.setattr("m3i_scale.report.charts.ALL_POINTS", 1)
    whole = read_run(run)
    whole.figures["loss"][-1] = np.finfo(np.float64).max
    charts = {chart["id"]: chart["series"] for chart in filled_charts([whole], ["a"], CHARTS)}
    assert {len(one["x"]) for series in charts.values() for one in series} == {3}
    assert charts["loss"][0]["y"][-1] is None
    script_safe(charts)


def test_a_run_that_trains_has_time_left_and_one_that_has_just_begun_is_shown(tmp_path):
    run = write_run(tmp_path / "run", steps=1000)
    kept = [line for line in lines_of(run) if line["step"] <= 400 and line["kind"] != "end"]
    (run / "metrics.jsonl").write_text("".join(map(json_line, kept)))
    write_report([run], tmp_path / "report.html")
    stopped = Page(tmp_path / "report.html").text
    assert "step 400 of 1,000" in stopped
    assert "minutes left" not in stopped
    with lock_directory(run, trains=True):
        write_report([run], tmp_path / "report.html")
    assert re.search(r"1[89](\.\d)? minutes left", Page(tmp_path / "report.html").text)  # 600 steps of about 1.9 s
    (run / "metrics.jsonl").write_text(json_line(kept[0]))
    write_report([run], tmp_path / "report.html")
    assert Page(tmp_path / "report.html").values["charts"] == []


def test_a_garbage_file_of_a_run_is_told_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run", steps=200)
    (run / "attempts.json").write_text("{")
    (run / "run.yaml").write_text("- torn")
    (run / "evaluation.json").write_text("[]")
    (run / "pictures" / "step-00000200" / "pictures.json").write_text("null")
    (run / "pictures" / "step-00000100" / "pictures.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n")
    write_report([run], tmp_path / "report.html")
    garbage = Page(tmp_path / "report.html")
    for words in (
        "run.yaml: ",
        str(run / "attempts.json"),
        "1 lines of metrics.jsonl",
        "not an evaluation",
        "step-00000200: ",
    ):
        assert words in garbage.text, words
    assert garbage.chart("loss")["series"]


def an_image(size=(40, 30)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_that_are_too_many_leave_out_steps_between(tmp_path):
    run = write_run(tmp_path / "run", steps=200)
    for step in range(10, 100, 10):
        folder = run / "pictures" / f"step-{step:08d}"
        folder.mkdir(exist_ok=True)
        (folder / "views.png").write_bytes(an_image())
        listed = {"name": "views", "file": "views.png", "title": "Views", "alt": "Views"}
        outside = {"name": "key", "file": "../step-00000100/views.jpg", "title": "Key", "alt": "Key"}
        write_json(folder / "pictures.json", {"step": step, "pictures": [listed, outside]})
    (album,) = albums.albums_of([read_run(run)], [], room=40_000)
    assert album["steps"][0] == "10"
    assert album["steps"][-1] == "200"
    assert 2 < len(album["steps"]) < 10
    assert {picture["title"] for picture in album["pictures"]} <= {
        "Views",
        "Dense features, first three principal components",
        "The batch as the model sees it",
    }
    assert any("fit into this page" in note for note in album["notes"])


def test_pictures_are_files_of_their_folder_and_within_limits(tmp_path):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere.png"
    folder.mkdir()
    elsewhere.write_bytes(an_image())
    (folder / "good.png").write_bytes(an_image())
    (folder / "text.png").write_text("no picture")
    (folder / "link.png").symlink_to(elsewhere)
    (folder / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    names = ["good.png", "text.png", "link.png", "endless.png", "pipe.png", "..", "../elsewhere.png", str(elsewhere)]
    entries = [{"name": name, "file": name, "title": name, "alt": name} for name in names]
    write_json(folder / "pictures.json", {"step": 1, "pictures": entries})
    (album,) = albums.albums_of([], [folder], room=10**6)
    assert [picture["title"] for picture in album["pictures"]] == ["good.png"]
    assert len(album["notes"]) == len(names) - 1


def test_pictures_that_cannot_be_looked_for_are_named(tmp_path):
    run = write_run(tmp_path / "run", steps=200)
    shutil.rmtree(run / "pictures")
    (run / "pictures").write_text("no folder")
    write_report([run], tmp_path / "report.html")
    assert "the pictures cannot be read" in Page(tmp_path / "report.html").text


def test_overlays_that_are_huge_are_not_decoded(tmp_path):
    (tmp_path / "good.png").write_bytes(an_image())
    (tmp_path / "huge.png").write_bytes(a_huge_image())
    (album,) = albums.albums_of([], [tmp_path], room=10**6)
    assert [picture["title"] for picture in album["pictures"]] == ["good"]
    assert album["notes"]


def test_overlays_of_an_evaluation_are_shown_as_smaller_pictures(tmp_path):
    for name in ("0001-a", "0002-b"):
        (tmp_path / f"{name}.png").write_bytes(an_image((400, 300)))
    (tmp_path / "palette.json").write_text("[]")
    (album,) = albums.albums_of([], [tmp_path], room=10**6)
    assert [picture["title"] for picture in album["pictures"]] == ["0001-a", "0002-b"]
    assert all(picture["images"][0]["address"].startswith("data:image/jpeg") for picture in album["pictures"])


def a_huge_image(side=60_000):
    """A small PNG whose header says that it is huge."""
    image = bytearray(an_image())
    image[16:24] = side.to_bytes(4, "big") * 2
    image[29:33] = zlib.crc32(image[12:29]).to_bytes(4, "big")
    return bytes(image)


@pytest.mark.parametrize(
    "what", ["folder", "report folder", "report is a folder", "report is a file of the run", "evaluation", "pictures"]
)
def test_bad_input_is_refused_and_the_earlier_report_stays(what, run, tmp_path):
    to, given = tmp_path / "report.html", {}
    to.write_text("earlier")
    folder = run
    if what == "folder":
        folder = where = tmp_path
    elif what == "report folder":
        to = tmp_path / "missing" / "report.html"
        where = to.parent
    elif what == "report is a folder":
        to = where = tmp_path / "folder.html"
        to.mkdir()
    elif what == "report is a file of the run":
        to = where = tmp_path / "metrics.jsonl"
        to.write_text("earlier")
    else:
        where = tmp_path / "given"
        where.mkdir()
        if what == "evaluation":
            where = where / "evaluation.json"
            where.write_text('{"measures": 1}')
        given = {("evaluations" if what == "evaluation" else what): [where]}
    with pytest.raises(ConfigError) as error:
        write_report([folder], to, **given)
    assert str(where) in str(error.value)
    assert {
        path.read_text() for path in tmp_path.iterdir() if path.suffix in (".html", ".jsonl") and path.is_file()
    } == {"earlier"}


def test_a_disk_without_room_leaves_the_earlier_report(run, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    to = tmp_path / "report.html"
    to.write_text("earlier")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError) as caught:
        write_report([run], to)
    assert str(caught.value.where).endswith("/report.html")
    assert "No space left" in caught.value.what
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_without_a_browser_the_report_stays_and_says_so(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(page.webbrowser, "open", lambda address: bool(asked.append(address)))
    to = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--output", str(to), "--open", "--json"])
    assert isinstance(done.exception, ConfigError)
    assert json.loads(done.stdout)["bytes"] == to.stat().st_size
    assert asked == [to.as_uri()]
    monkeypatch.setattr(page.webbrowser, "open", lambda address: True)
    open_in_browser(to)


def test_times_are_those_of_the_records(report):
    assert START.strftime("%Y-%m-%d %H:%M:%S UTC") in report.text
