"""Pieces become whole tensors: the same values, in files that stock readers read, with little memory, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import TESTS, environment, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_tensors import write_as_ranks
from typer.testing import CliRunner

from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.stream import Range
from m3i_scale.checkpoint_tools.consolidate import consolidate
from m3i_scale.cli import app
from m3i_scale.errors import CheckpointError

pytestmark = pytest.mark.slow

MIB = 1 << 20
NAMES = {"momentum.a": "student.a"}


def ranges(key: str, tensor: torch.Tensor, cut: int) -> list[Range]:
    flat = tensor.flatten()
    return [
        Range(key, start, (flat[start:end],))
        for start, end in ((0, cut), (cut, flat.numel()))
        if end > start or not flat.numel()
    ]


def checkpoint(
    root: Path,
    tensors: dict[str, torch.Tensor],
    averages: dict[str, str] | None = None,
    buffers: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Committed, as two ranks would; keys are `kind/name`."""
    final = root / "checkpoints" / "step-00000007"
    temporary = begin(final)
    pieces = [piece for key, tensor in tensors.items() for piece in ranges(key, tensor, tensor.numel() // 3)]
    write_as_ranks(temporary, tensors, [pieces[rank::2] for rank in range(2)])
    counters = {"global_steps": 7, "global_samples": 28, "skipped_steps": 0, "optimizer_steps": 7}
    meta = {"step": 7, "world_size": 2, "engine": counters, "averages": averages or {}}
    (temporary / "meta.json").write_text(json.dumps(meta))
    save_file(buffers or {}, temporary / "buffers.safetensors")
    commit(final, temporary, meta)
    return final


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight/student.a": torch.randn(40, 50),
        "weight/student.b": torch.randn(30),
        "weight/student.c": torch.randn(()),
        "average/momentum.a": torch.randn(40, 50),
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


# ---------------------------------------------------------------- safetensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["student", "ema"])
def test_values_come_back(tmp_path, tensors, monkeypatch, weights, dtype) -> None:
    monkeypatch.setattr("m3i_scale.checkpoint_tools.consolidate.BLOCK_ELEMENTS", 64)
    source = checkpoint(tmp_path, tensors, NAMES)
    told = consolidate(source, tmp_path / "whole", weights=weights, dtype=dtype)
    assert list(told["files"]) == ["model.safetensors"]  # one file needs no index, as on the Hub
    wanted = {key.removeprefix("weight/"): value for key, value in tensors.items() if key.startswith("weight/")}
    if weights == "ema":
        wanted["student.a"] = tensors["average/momentum.a"]
    found = read(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(getattr(torch, dtype))), name
    assert told["parameters"] == 40 * 50 + 30 + 1
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "checkpoint": "step-00000007", "weights": weights}


def test_statistics_of_heads_are_those_of_the_trained_weights(tmp_path, tensors) -> None:
    statistics = {"heads.x.running_mean": torch.randn(5), "text.position": torch.randn(2)}
    source = checkpoint(tmp_path, tensors, NAMES, statistics)
    found = {}
    for weights in ("student", "ema"):
        consolidate(source, tmp_path / weights, weights=weights)
        found[weights] = read(tmp_path / weights)
    assert found["student"].keys() - found["ema"].keys() == {"heads.x.running_mean"}
    assert torch.equal(found["student"]["heads.x.running_mean"], statistics["heads.x.running_mean"])


def test_shards_are_named_as_on_the_hub_and_their_index_names_every_tensor(tmp_path, tensors) -> None:
    source = checkpoint(tmp_path, tensors, NAMES)
    told = consolidate(source, tmp_path / "whole", max_shard_size="1KB")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(told["files"]) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * told["parameters"]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "whole" / file)
    assert index["weight_map"].keys() == read(tmp_path / "whole").keys()


def test_a_run_stands_for_its_newest_good_checkpoint(tmp_path, tensors) -> None:
    checkpoint(tmp_path, tensors)
    result = CliRunner().invoke(
        app, ["checkpoint", "consolidate", str(tmp_path), "--output", str(tmp_path / "whole"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["step"] == 7


MEASURED = """
import resource, sys
from pathlib import Path
from m3i_scale.checkpoint_tools.consolidate import consolidate
told = consolidate(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size=sys.argv[3], dtype="bfloat16")
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(int(peak.split()[1]) * 1024, max(told["files"].values()))
"""


def test_memory_is_that_of_a_shard(tmp_path) -> None:
    """Six tensors of 64 MiB, written in files of which none is larger than 70 MB: all at once would be too much."""
    one = torch.ones(16 * MIB)
    source = checkpoint(tmp_path, {f"weight/student.{number}": one for number in range(6)})
    del one
    arguments = [str(source), str(tmp_path / "whole"), "70MB"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    peak, largest = map(int, done.stdout.split())
    assert largest <= 71_000_000
    assert peak <= 1.3 * largest + 500 * 10**6, (peak, largest)


# ---------------------------------------------------------------- any engine


def test_a_plain_engine_saves_and_its_weights_come_back(tmp_path: Path) -> None:
    """Under ZeRO-3 on two ranks, with shards that have padding."""
    job = start_ranks([str(TESTS / "scale" / "plain_engine.py"), str(tmp_path)], 2, tmp_path / "logs")
    assert job.wait() == [0, 0], job.text()[-4000:]
    consolidate(tmp_path, tmp_path / "whole")
    found, wanted = read(tmp_path / "whole"), load_file(tmp_path / "saved.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weights": "teacher"}, "'teacher'"),
        ({"dtype": "float16"}, "'float16'"),
        ({"max_shard_size": "five"}, "'five'"),
        ({"max_shard_size": "0GB"}, "'0GB'"),
        ({"weights": "ema"}, "EMA"),
    ],
)
def test_options_that_cannot_be_had_leave_nothing(tmp_path, tensors, options, named) -> None:
    source = checkpoint(tmp_path, {key: value for key, value in tensors.items() if key.startswith("weight")})
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, tmp_path / "whole", **options)
    assert named in caught.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_not_touched(tmp_path, tensors, kind) -> None:
    source, target = checkpoint(tmp_path, tensors), tmp_path / "whole"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, target)
    assert caught.value.where == str(target)
    assert os.path.lexists(target)


def test_a_changed_byte_is_refused(tmp_path, tensors) -> None:
    source = checkpoint(tmp_path, tensors)
    path = source / "tensors" / "rank-00000-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, tmp_path / "whole")
    assert caught.value.where == str(source)
    with pytest.raises(CheckpointError) as caught:
        consolidate(tmp_path, tmp_path / "whole")
    assert caught.value.where == str(source.parent)
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, tensors, value) -> None:
    tensors["weight/student.b"][17] = value
    source = checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, tmp_path / "whole")
    assert "'student.b'" in caught.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_an_empty_tensor_is_refused_by_name(tmp_path, tensors) -> None:
    tensors["weight/student.z"] = torch.empty(0, 4)
    source = checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, tmp_path / "whole")
    assert caught.value.where == str(source)
    assert "'student.z'" in caught.value.what


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, tensors, monkeypatch) -> None:
    source = checkpoint(tmp_path, tensors)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, tmp_path / "whole")
    assert caught.value.where == str(tmp_path)
    assert "1000 bytes free" in caught.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_a_disk_that_fills_up_is_explained(tmp_path, tensors, monkeypatch, small_disk) -> None:
    tensors["weight/student.big"] = torch.zeros(MIB)
    source = checkpoint(tmp_path, tensors)
    usage = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as caught:
        consolidate(source, small_disk / "whole")
    assert "the checkpoint is unchanged" in str(caught.value)
    assert list(small_disk.iterdir()) == []
