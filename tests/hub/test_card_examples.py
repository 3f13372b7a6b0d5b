"""The example "How to load" of a model card runs as written, for every kind of export."""

import re

import pytest
from PIL import Image
from scenes_of_shapes import NAMES, shards_of, write_set
from test_detector_measured import VIT, run_of
from test_export_backbones import BACKBONES

from m3i_scale.exports.export import export
from m3i_scale.exports.write import TASKS, ExportContents

CASES = {
    "features": (None, ExportContents(), "feature"),
    "maps": ("internimage", ExportContents(), "feature"),
    "timm": (None, ExportContents("features", "timm"), "feature"),
    "classification": (None, ExportContents("classification"), None),
    "zero_shot": (None, ExportContents("zero_shot"), None),
    "backbone": ("dinov2", ExportContents("backbone"), "maps"),
    "segmentation": ("upernet", ExportContents("segmentation"), None),
    "queries": ("eomt", ExportContents("segmentation"), None),
}
"""Backbone or segmentation head, export, and the result that the example names."""
RFDETR = {"kind": "rfdetr", "channels": 32, "queries": 8, "groups": 2, "decoder_layers": 2, "decoder_width": 64}


def run_example(run, wanted, tmp_path, monkeypatch):
    """Export, run the example of the card, and return its names."""
    folder = tmp_path / "path/of/this/folder"
    folder.parent.mkdir(parents=True)
    export(run, folder, wanted=wanted)
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names: dict[str, object] = {}
    exec(example, names)
    return names


@pytest.mark.parametrize("case", CASES)
def test_the_example_runs_as_written(make_run, same_process, tmp_path, monkeypatch, case):
    kind, wanted, result = CASES[case]
    fields = {"segments": kind} if wanted.task == "segmentation" else {"backbone": BACKBONES.get(kind)}
    run, _ = make_run(tmp_path / "run", **fields)
    names = run_example(run, wanted, tmp_path, monkeypatch)
    assert result is None or len(names[result]) == 1  # one image


@pytest.mark.parametrize("masks", [False, True])
def test_the_example_of_a_detector_with_queries(make_run, same_process, tmp_path, monkeypatch, masks):
    data = shards_of(write_set(tmp_path / "coco", 2), tmp_path / "shards")
    values = run_of(data, tmp_path / "run", VIT, RFDETR | {"masks": masks})
    data_section = values.data.model_copy(update={"augment": values.data.augment.model_copy(update={"stretch": True})})
    values = values.model_copy(update={"data": data_section})
    run, _ = make_run(tmp_path / "run", label_sets={"shapes": NAMES}, run=values)
    assert ("masks" in run_example(run, ExportContents("detection"), tmp_path, monkeypatch)) is masks


def test_every_task_has_an_example():
    tasks = {wanted.task for _, wanted, _ in CASES.values()}
    assert tasks | {"detection"} == set(TASKS)  # that of Mask R-CNN is in test_detector_exported.py
