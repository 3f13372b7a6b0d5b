"""The oldest transformers that a model card promises loads every kind of export, and computes what was trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_export_backbones import BACKBONES

from m3i_scale.exports import fresh, verify
from m3i_scale.exports.card import OLDEST_TRANSFORMERS
from m3i_scale.exports.export import export
from m3i_scale.exports.write import FORMATS, TASKS, ExportContents

pytestmark = pytest.mark.slow

REQUIREMENTS = (f"transformers=={OLDEST_TRANSFORMERS}.0", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0")
"""As that version asks for them; all else is that of the environment."""

PROVES = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import fresh
fresh.block()
for line in sys.stdin:
    try:
        fresh.main(*map(Path, json.loads(line)))
        print("ok", flush=True)
    except Exception as error:
        print(repr(error).replace("\\n", " "), flush=True)
"""
CASES = (
    ("vit", "mean_pool", ExportContents()),
    ("vit", "mean_pool", ExportContents("classification")),
    ("vit", "class_token", ExportContents("classification")),
    ("vit", "mean_pool", ExportContents("zero_shot")),
    ("vit", "mean_pool", ExportContents("backbone")),
    ("vit", "mean_pool", ExportContents("features", "timm")),
    ("dinov2", "mean_pool", ExportContents(max_shard_size="20KB")),
    ("dinov2", "mean_pool", ExportContents("classification")),
    ("dinov2", "class_token", ExportContents("classification")),
    ("dinov2", "mean_pool", ExportContents("zero_shot")),
    ("dinov2", "mean_pool", ExportContents("backbone")),
    ("dinov2", "mean_pool", ExportContents("classification", "timm")),
    ("clip", "mean_pool", ExportContents()),
    ("clip", "class_token", ExportContents("zero_shot")),
    ("clip", "mean_pool", ExportContents("features", "timm")),
    ("internimage", "mean_pool", ExportContents()),
    ("internimage", "mean_pool", ExportContents("classification")),
    ("upernet", None, ExportContents("segmentation")),
    ("upernet", None, ExportContents()),
    ("eomt", None, ExportContents("segmentation")),
)


@pytest.fixture(scope="module")
def oldest():
    """A folder with that version, fetched once an environment."""
    folder = Path(sys.prefix) / f"transformers-{OLDEST_TRANSFORMERS}"
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        options = ["--quiet", "--no-deps", "--no-compile", "--target", str(partial)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *REQUIREMENTS],
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        if done.returncode and "CI" in os.environ:
            pytest.fail(done.stderr)
        if done.returncode:
            pytest.skip(f"no transformers {OLDEST_TRANSFORMERS} here, and no index to fetch it from")
        try:
            partial.rename(folder)
        except OSError:  # another run of the tests was first
            shutil.rmtree(partial)
    return folder


@pytest.fixture
def proven_there(oldest, tmp_path, monkeypatch):
    """The proof of exports runs in one process of that version."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    with subprocess.Popen(
        [sys.executable, "-I", "-c", PROVES, Path(fresh.__file__).parent, oldest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:

        def run(folder, work):
            process.stdin.write(json.dumps([str(folder), str(work)]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ok\n"
            return json.loads((work / "report.json").read_text())

        monkeypatch.setattr(verify, "_run", run)
        yield run
        process.stdin.close()


def test_every_kind_of_export(proven_there, make_run, tmp_path):
    assert {wanted.task for *_, wanted in CASES} == set(TASKS) - {"detection"}  # whose card asks for a later one
    assert {wanted.format for *_, wanted in CASES} == set(FORMATS) - {"onnx"}  # the files of transformers, and one more
    runs = {}
    for number, (kind, pool, wanted) in enumerate(CASES):
        if (kind, pool) not in runs:
            fields = {"backbone": BACKBONES.get(kind), "pool": pool} if pool else {"segments": kind}
            runs[kind, pool], _ = make_run(tmp_path / f"{kind}-{pool}", **fields)
        result = export(runs[kind, pool], tmp_path / str(number), wanted=wanted)
        assert max(result["verified"]["largest_output_difference"].values()) < 1e-4
        assert f"transformers {OLDEST_TRANSFORMERS} or later" in (tmp_path / str(number) / "README.md").read_text()
