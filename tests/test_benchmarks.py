"""Benchmarks keep standard output for their one JSON document."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from m3i_scale.config import known_recipes
from m3i_scale.objective.build import build_objective

pytestmark = pytest.mark.bench
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))


def test_what_libraries_print_goes_elsewhere():
    prints = "os.system('echo of a child'); print('of a library')"
    emits = " and ".join(f"{name}.emit is _common.emit" for name in SCRIPTS)
    script = f"import os, _common, {', '.join(SCRIPTS)}; {prints}; assert {emits}; step.emit(dict(a=1))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"a": 1}
    assert "of a library" in done.stderr


def test_a_benchmark_that_starts_itself_again_keeps_its_output():
    script = (
        "import os, sys, _common\n"
        "from m3i_scale.output import release_stdout\n"
        "if 'AGAIN' not in os.environ:\n"
        "    os.environ['AGAIN'] = '1'\n"
        "    release_stdout()\n"
        "    os.execv(sys.executable, [sys.executable, '-c', sys.argv[1], sys.argv[1]])\n"
        "_common.emit({'a': 1})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"a": 1}


def test_fused_attention_is_counted_with_its_backward_pass(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _cost import count_flop

    query = torch.randn(2, 3, 50, 32, requires_grad=True)

    def step():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    product = 2 * 2 * 3 * 50 * 50 * 32
    assert count_flop(step) == 6 * product  # two forward, four backward


@pytest.mark.parametrize("backbone", ["vit-g/14", "internimage-h"])
def test_the_billion_runs_leave_nothing_of_the_recipe_out(monkeypatch, tmp_path, backbone):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import billion

    from m3i_scale.config import load_run
    from m3i_scale.run.check import resolve_run

    shards = billion._make_shards(tmp_path)
    values = billion.run_values(tmp_path, shards, backbone, "zero3_cpu_lean")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    plan = resolve_run(load_run(str(tmp_path / "run.yaml")), billion.RANKS)
    assert (plan.recipe.uses_text, plan.recipe.uses_categories, plan.recipe.ema is not None) == (True, True, True)
    assert plan.run.text.config == {}  # BERT-Base
    assert plan.accumulation == 1


def test_engines_are_compared_on_two_ranks():
    small = ["--rounds", "1", "--steps", "1", "--batch", "4", "--image", "32", "--width", "64", "--depth", "2"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scale.py"), "--json", *small],
        env=kept | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    engines = {"ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero3", "ours_zero1", "ours_zero3"}
    assert engines | {"ratio_zero1", "ratio_zero3", "ema_share", "phases", "machine"} <= set(told)
    assert all(told[name] > 0 for name in engines)
    # One round, so the ratio of the medians is the median of the ratios.
    assert told["ratio_zero3"] == pytest.approx(told["ours_zero3"] / told["deepspeed_zero3"])
    for stage in ("zero1", "zero3"):
        assert sum(told["phases"][stage].values()) == pytest.approx(1.0)
        assert min(told["phases"][stage].values()) > 0
        assert told["ema_share"][stage] == told["phases"][stage]["ema"]


def test_the_figure_of_a_shuffle(monkeypatch):
    """One for uniform draws, the most for batches in stored order, and in between as the closed form has it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from clumping import batches_of, closeness, correlation

    sizes, random_numbers = [40] * 25, np.random.default_rng(0)
    uniform = closeness((random_numbers.permutation(1000)[:50] for _ in range(800)), sizes)
    assert uniform.clumping == pytest.approx(1, abs=0.06)
    assert uniform.own_shard == pytest.approx(39 / 999, abs=0.001)
    stored = closeness(np.arange(1000).reshape(-1, 40), sizes)
    assert (stored.own_shard, stored.clumping) == (1.0, pytest.approx(40 * 999 / 960))  # B (N − 1) / (N − B)
    assert closeness(np.arange(1000).reshape(25, 40).T, sizes).clumping == pytest.approx(0)
    ours = closeness(batches_of([250] * 128, 8, 4, 256, 0), [250] * 128)
    assert ours.clumping == pytest.approx(1 + 31 / 4 - 32 / 16, rel=0.1)
    order = random_numbers.permutation(5000)
    assert correlation(order, order[::-1]) == pytest.approx(-1)


def test_shuffles_are_compared_as_observed():
    """On shards of one class each: our streams mix them, a buffer of one shard does not."""
    small = ["--shards", "16", "--samples-per-shard", "40", "--shards-per-class", "1", "--batch-size", "32"]
    small += ["--streams", "4", "--ranks", "2", "--buffers", "40"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "shuffle.py"), "--json", *small],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    rows = {}
    for row in told["loaders"]:
        rows.setdefault((row["loader"], row["ranks"]), []).append(row)
    ours, one_rank, two_ranks = rows["ours", 1], rows["webdataset", 1], rows["webdataset", 2]
    assert [row["options"]["shuffle_shards"] for row in ours] == [1, 4, 8, 16, 4]
    assert all(row["held_samples"] == 0 and row["seen_in_one_pass"] == 1.0 for row in ours)
    # A stream's window of one shard gives a batch 8 samples each of 4 shards: of what is alike in a shard, 7 of 31.
    assert ours[0]["batch"]["own_shard"] == pytest.approx(7 / 31)
    assert ours[1]["batch"]["clumping"] < 1.5 < 2 < one_rank[1]["batch"]["clumping"]
    # The same batches on two ranks, and webdataset without detshuffle goes through the shards in the same order again.
    assert rows["ours", 2][0]["batch"] == ours[1]["batch"]
    assert one_rank[0]["epoch_correlation"] > 0.9 > abs(ours[1]["epoch_correlation"])
    assert two_ranks[0]["held_samples"] == 40
    if importlib.util.find_spec("megatron") is None:
        assert told["not_measured"]["megatron-energon"]["fix"] == "python -m pip install -e '.[peers]'"
        assert {loader for loader, _ in rows} == {"uniform", "ours", "webdataset"}
    else:
        assert told["not_measured"] == {}
        assert rows["energon", 1][0]["batch"]["clumping"] > 0


def test_a_billion_run_goes_through_on_a_small_backbone(monkeypatch, tmp_path):
    """Trained, resumed, exported, and what is printed of it; only the sizes are not those of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import billion

    full = billion.run_values

    def small(*given):
        tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        values = full(*given)
        values["backbone"]["config"] = sizes | {"image_size": 64}
        return values | {"text": {"config": tower}}

    monkeypatch.setattr(billion, "run_values", small)
    monkeypatch.setitem(os.environ, "PYTHONPATH", os.pathsep.join(sys.path))
    told = billion._demonstrate(tmp_path, "vit-ti/16", "zero3_cpu_lean")
    assert len(told["losses"]) == billion.STEPS
    assert told["resumed"]["from_step"] == billion.STEPS
    assert told["export"]["verified"]["largest_output_difference"]["vision"] == 0.0
    assert 0.5 < told["peak_gib_total"] / told["predicted_gib_total"] < 2
    assert told["seconds_per_step"] > 0


def pictures(folder, count=24, size=(80, 96)):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(count):
            buffer = io.BytesIO()
            Image.effect_noise(size, 10 + number).convert("RGB").save(buffer, "PNG")
            info = tarfile.TarInfo(f"k{number}.png")
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return folder


@pytest.mark.parametrize("images", ["png", "jpeg"])
def test_loaders_are_compared_on_the_same_samples(tmp_path, images):
    small = ["--samples", "320", "--batch", "16", "--repeats", "1", "--draw", "32", "--memory-s", "1"]
    peers = ["--workers", "0", "--workers", "1", "--only", "webdataset", "--only", "datasets"]
    command = [sys.executable, str(BENCHMARKS / "loaders.py"), "--json", "--data", str(pictures(tmp_path / "data"))]
    done = subprocess.run(
        [*command, "--images", images, *small, *peers],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    compared = {"m3i_scale", "webdataset", "datasets"}
    assert told["missing"] == {}
    assert set(told["workers"]) == {"0", "1"}
    for count, speeds in told["workers"].items():
        assert set(speeds) == compared
        fastest = max(speed for name, speed in speeds.items() if name != "m3i_scale")
        assert told["ratio_to_fastest"][count] == pytest.approx(speeds["m3i_scale"] / fastest)
    assert set(told["resume_s"]) == compared
    for name in ("m3i_scale", "webdataset"):  # the one knows where it was, the other reads it all again
        found = told["resume"][name]
        assert (found["lost"], found["repeated"], found["order_identical"]) == (0, 0, True)
        assert found["of"] == 32
        assert set(found["seconds"]) == {"0.1", "0.5", "0.9"}
    assert told["memory"]["samples"] > 0
    assert told["memory"]["peak_mib"] >= told["memory"]["last_mib"] > 0
    assert told["settings"]["samples"] == 320


def test_a_library_that_is_not_there_or_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _loaders_sides
    import loaders
    from _loaders import make_corpus
    from _loaders_process import Process

    def fails(corpus):
        raise RuntimeError("no room")

    monkeypatch.setitem(_loaders_sides.SIDES, "absent", _loaders_sides.Side("absent.module", None))
    monkeypatch.setitem(_loaders_sides.SIDES, "failing", _loaders_sides.Side("torch", None, "own", fails))
    corpus = make_corpus(pictures(tmp_path / "data"), tmp_path / "layouts", 64, "png", 64)
    missing = loaders._prepare(corpus, ["m3i_scale", "absent", "failing"])
    assert set(missing) == {"absent", "failing"}
    assert "no module 'absent.module'" in missing["absent"]
    assert "pip install" in missing["absent"]
    assert "no room" in missing["failing"]
    settings = {"folder": str(tmp_path), "samples": 64, "kind": "png", "batch": 8, "crop": 64, "decoder": "pillow"}
    side = Process("no such side", settings, tmp_path / "log")
    assert side.ask("open", workers=0) == {}
    assert "KeyError" in side.fault
    side.end()


def test_the_benchmark_tells_lost_and_repeated_samples_and_growing_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _loaders_process import _difference, slope

    same = _difference([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert same == {"lost": 0, "repeated": 0, "of": 4, "order_identical": True}
    other = _difference([[1, 2], [3, 4]], [[1, 7], [2, 2]])
    assert other == {"lost": 2, "repeated": 2, "of": 4, "order_identical": False}
    grown = slope([(at * 1_000, 300 + at * 0.5) for at in range(100)])
    assert grown["mib_per_100k_samples"] == pytest.approx(50)
    assert grown["first_mib"] == 310


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--images", "gif"], "--images"),
        (["--only", "webdatasets"], "webdataset"),
        (["--samples", "63"], "64"),
        (["--crop", "100"], "smaller than the crop"),
    ],
)
def test_what_cannot_be_compared_ends_with_a_reason(tmp_path, options, told):
    command = [sys.executable, str(BENCHMARKS / "loaders.py"), "--data", str(pictures(tmp_path / "data", 2)), *options]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_killed_twenty_times_loses_nothing():
    """Most of the kills lie inside of saves, loads, commits and retention; every run ends as if left alone."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "faults.py"), "--json", "--kills", "20"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = json.loads(done.stdout)
    assert told["kills"] == 20
    assert told["faults"] == []
    for nothing in ("lost_commits", "torn_checkpoints", "resumes_from_an_older_step", "non_identical"):
        assert told[nothing] == 0, nothing
    assert told["non_identical_on_other_ranks"] == 0
    assert told["torn_points_hit"] >= 5
    assert told["resumes"] >= 3


def test_the_report_of_a_long_run_is_measured(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--json", "--steps", "3000", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["steps"] == 3000
    assert measured["bytes"] == (tmp_path / "report.html").stat().st_size
    assert measured["run_bytes"] == (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert min(measured["seconds"], measured["peak_mib"]) > 0


def test_every_recipe_fits_the_sizes_that_recipes_are_measured_at(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recipes

    teacher = recipes._teacher(tmp_path)
    for name in known_recipes():
        run = recipes._run(name, 2, teacher)
        with torch.device("meta"):
            build_objective(run, recipes.LABEL_SETS, recipes.VOCABULARY)
