"""Commands and config files of the README and docs/ are valid, and links and generated pages are correct.

Conventions:

- The tests run ```bash blocks in order. `/data/` becomes a folder made for the page. It contains the output of
  `a_data_folder`, of the README's commands (except for the README), and of earlier commands of the page.
- Training commands run at test size: with two ranks, and with `AT_TEST_SIZE` after the page's overrides. Other commands
  are unchanged.
- ```console blocks contain commands that a test cannot run, such as those for other machines. Files in this repository
  that they name must exist.
- ```yaml blocks are config files, or parts of one (then of the `m3i` recipe). For a task, the page writes the file.
"""

import csv
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from _reference import PAGES as RENDERED
from image_text_models import write_model
from launch import free_port
from PIL import Image, ImageDraw
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from m3i_scale.config import load_run
from m3i_scale.objective.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {f"docs/{name}": render() for name, render in RENDERED.items()}
"""Reference pages that the site generates, except those from docstrings."""
FROM_DOCSTRINGS = {"docs/reference/python-api.md", "docs/reference/extensions.md"}
GUIDE_LINES = 150
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

BACKBONE_AT_TEST_SIZE = (
    "backbone.config={image_size: 32, patch_size: 8, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 128}"
)
MAPS_AT_TEST_SIZE = (
    "backbone.config={image_size: 64, channels: 16, depths: [1, 1, 1, 1], groups: [1, 2, 4, 8], fusion_width: 64}"
)
AT_TEST_SIZE = [
    "optim.batch_size=16",
    "optim.steps=4",
    "optim.warmup_steps=1",
    "checkpoint.every_steps=2",
    "evaluation.batches=1",
]
FINE_TUNING_AT_TEST_SIZE = [
    "optim.steps=4",
    "optim.batch_size=16",
    "optim.micro_batch_size=16",
    "deepspeed=zero1_cpu_fp32",
]
TEXT_AT_TEST_SIZE = (
    "text.config={hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 128}"
)
BLOCK_TIMEOUT_S = 1800


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of a page in one of `languages`, in order."""
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def at_test_size(line: str, port: int) -> str:
    """A command as the test runs it; only commands that train are changed."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["m3i-scale", "finetune"] and "--dry-run" not in words:
        return f"{line} {shlex.join(FINE_TUNING_AT_TEST_SIZE)}"
    verb = "train" if "train" in words else "launch"
    if verb not in words or "--dry-run" in words:
        return line
    run = words[words.index(verb) + 1]
    line, launches = re.subn(r"--(num_gpus|num_accelerators|nproc_per_node|ranks-per-node) \d+", r"--\1 2", line)
    if words[0] == "deepspeed":
        line = line.replace("deepspeed ", f"deepspeed --master_port {port} ", 1)
    elif verb == "launch":
        line = line.replace(" launch ", f" launch --master-port {port} ", 1)
    size = MAPS_AT_TEST_SIZE if "preset=internimage" in line else BACKBONE_AT_TEST_SIZE
    if run.startswith("/data/"):  # the page's own run file, which starts from weights: the shape is theirs
        size = "backbone.config.image_size=32"
    small = [size, *AT_TEST_SIZE, f"optim.micro_batch_size={8 if launches else 16}"]
    # A run file that the page itself has made trains a task, which reads no text.
    if not run.startswith("/data/") and parse_recipe(load_run(run).recipe).uses_text:
        small.append(TEXT_AT_TEST_SIZE)
    if not torch.cuda.is_available():
        small.append("deepspeed=zero3_cpu")
        line = line.replace("--num_gpus", "--num_accelerators")
    return f"{line} {shlex.join(small)}"


def script_of(block: str, data: Path, port: int) -> str:
    """A block as a shell script."""
    joined = re.sub(r"\\\n\s*", "", block)
    lines = [at_test_size(line, port) for line in joined.splitlines()]
    return "\n".join(lines).replace("/data/", f"{data}/")


def a_data_folder(folder: Path) -> None:
    """Pictures of three shapes, with captions, without, listed in a table, with masks; and weights to start from."""
    draw_one = random.Random(0)
    shapes = {"disc": "ellipse", "box": "rectangle", "star": "polygon"}
    rows = []
    for root, captioned in (("photos", True), ("birds", False)):
        for label, kind in shapes.items():
            (folder / root / label).mkdir(parents=True)
            for number in range(40):
                path = folder / root / label / f"{number:02d}.png"
                color = draw_one.choice(["red", "green", "blue", "orange"])
                image = Image.new("RGB", (40, 40), "white")
                edge = draw_one.randint(2, 12)
                points = [(edge, edge), (40 - edge, 40 - edge)]
                if kind == "polygon":
                    points = [(20, edge), (40 - edge, 30), (edge, 30)]
                getattr(ImageDraw.Draw(image), kind)(points, fill=color)
                image.putpixel((0, 0), (number, [*shapes].index(label), int(captioned)))  # no two files are the same
                image.save(path)
                if captioned:
                    path.with_suffix(".txt").write_text(f"a {color} {label}", encoding="utf-8")
                    rows.append({"path": path, "title": f"a {color} {label}", "label": label})
    with (folder / "photos.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["path", "title", "label"])
        writer.writeheader()
        writer.writerows(rows)
    boxes: dict[str, Any] = {name: {"images": [], "annotations": []} for name in ("train", "val")}
    for number in range(40):
        split = folder / "scenes" / ("train" if number < 32 else "val")
        corner = (draw_one.randint(2, 18), draw_one.randint(2, 18))
        for kind, mode, ground, color in (("images", "RGB", "white", "red"), ("masks", "L", 0, 1)):
            (split / kind).mkdir(parents=True, exist_ok=True)
            picture = Image.new(mode, (40, 40), ground)
            ImageDraw.Draw(picture).rectangle([corner, (corner[0] + 20, corner[1] + 20)], fill=color)
            picture.save(split / kind / f"{number:02d}.png")
        image = {"id": number, "file_name": f"{split.name}/images/{number:02d}.png", "width": 40, "height": 40}
        boxes[split.name]["images"].append(image)
        box = {"id": number, "image_id": number, "category_id": 7, "bbox": [*corner, 21, 21], "area": 441}
        boxes[split.name]["annotations"].append(box)
    (folder / "scenes" / "annotations").mkdir()
    for name, value in boxes.items():
        text = json.dumps(value | {"categories": [{"id": 7, "name": "box"}]})
        (folder / "scenes" / "annotations" / f"instances_{name}.json").write_text(text, encoding="utf-8")
    (folder / "scenes" / "mask_labels.json").write_text(json.dumps(["ground", "box"]), encoding="utf-8")
    # In place of published weights, which no test downloads: a model of their class, read as they are.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "models" / "dinov2-base")
    processor = BitImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 36})
    processor.save_pretrained(folder / "models" / "dinov2-base")
    write_model("clip", folder / "models" / "clip-base", positions=77, width=512)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_commands(page: Path, data: Path, *commands: Path) -> str | None:
    """Run a page in the folder beside `data`; return what went wrong. Folders `commands` come first on PATH."""
    port = free_port()
    environment = os.environ | {
        "PATH": os.pathsep.join(map(str, (*commands, Path(sys.executable).parent, os.environ["PATH"]))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for block in blocks(page, "bash"):
        script = script_of(block, data, port)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=data.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=BLOCK_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            return f"exit code {done.returncode}\n{script}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return None


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory):
    """Folder `data`, a copy of it as the README leaves it, and what went wrong there."""
    data = tmp_path_factory.mktemp("pages") / "data"
    a_data_folder(data)
    fault = run_commands(ROOT / "README.md", data)
    left = data.with_name("left")
    data.rename(left)
    return data, left, fault


def test_the_commands_of_the_readme_run(after_readme):
    assert after_readme[2] is None, after_readme[2]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "bash")], ids=name_of)
def test_the_commands_of_a_page_run(page, after_readme, forks):
    data, left, _ = after_readme
    # The same path for every page, because a run remembers where its data lie.
    shutil.copytree(left, data)
    try:
        fault = run_commands(page, data, forks.folder)
        assert fault is None, fault
    finally:
        shutil.rmtree(data)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_commands_that_are_not_run_exist(page):
    for block in blocks(page, "console"):
        for word in shlex.split(block, comments=True):
            if re.match(r"(launchers|benchmarks|examples|ds_configs|recipes|tests)/\w", word):
                assert (ROOT / word).exists(), f"{name_of(page)}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_run_files_are_valid(page, tmp_path):
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        run_file = tmp_path / "run.yaml"
        whole = {"recipe", "task"} & values.keys()
        run_file.write_text(yaml.safe_dump(({} if whole else {"extends": "m3i"}) | values))
        parse_recipe(load_run(str(run_file)).recipe)


def test_the_method_line_by_line_is_the_one_that_is_built_in():
    page = ROOT / "docs" / "guides" / "custom-recipe.md"
    (run_file,), (code,) = blocks(page, "yaml"), blocks(page, "python")
    assert yaml.safe_load(run_file) == yaml.safe_load((ROOT / "recipes" / "ijepa.yaml").read_text(encoding="utf-8"))
    assert code in (ROOT / "m3i_scale" / "objective" / "distributions.py").read_text(encoding="utf-8")


def text_of(path: str) -> str | None:
    """A page by its path in the repository, generated ones, too."""
    if path in GENERATED:
        return GENERATED[path]
    return (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else None


def anchors_of(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(BLOCK.sub("", text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = os.path.relpath((page.parent / path).resolve() if path else page, ROOT)
        if target in FROM_DOCSTRINGS:
            continue
        assert target in GENERATED or (ROOT / target).exists(), f"{name_of(page)}: {link}"
        if anchor and target.endswith(".md"):
            assert anchor in anchors_of(text_of(target) or ""), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "guides").glob("*.md")), ids=name_of)
def test_a_guide_is_short_and_shows_a_command(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= GUIDE_LINES
    assert re.match(r"# .+\n\n\w", text)
    assert blocks(page, "bash", "console", "python")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_finished(page):
    assert "TODO" not in page.read_text(encoding="utf-8")


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nplugins:")[0]
    listed = {f"docs/{page}" for page in re.findall(r": (\S+\.md)$", menu, re.MULTILINE)}
    pages = {name_of(page) for page in (ROOT / "docs").rglob("*.md")}
    assert pages | GENERATED.keys() | FROM_DOCSTRINGS | {"docs/contributing.md", "docs/changelog.md"} == listed


def test_only_training_is_made_small():
    for line in ("m3i-scale recipes --json", "m3i-scale launch m3i --with slurm --ranks-per-node 8 --dry-run"):
        assert at_test_size(line, 1) == line
    assert "launch --master-port 7 clip --with local --ranks-per-node 2" in at_test_size(
        "m3i-scale launch clip --with local --ranks-per-node 8", 7
    )
    small = at_test_size("deepspeed --num_gpus 8 --module m3i_scale train clip optim.lr=3e-4", 4321)
    assert "--master_port 4321" in small
    assert "optim.lr=3e-4" in small
    assert "text.config" in small
    assert "8 --module" not in small
    assert "text.config" not in at_test_size("m3i-scale train mae", 1)
    assert "hidden_size" not in at_test_size("m3i-scale train /data/run.yaml", 1)
