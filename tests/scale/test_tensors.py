"""Pieces of tensors in files: whatever ranks wrote them, any range comes back, and nothing that does not join."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from saved_tensors import write_as_ranks

from m3i_scale.checkpoint import stream
from m3i_scale.checkpoint.layout import read_meta
from m3i_scale.checkpoint.load import _restore_random_states
from m3i_scale.checkpoint.stream import Range, WrittenTensors, write_ranges, write_tensors
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.checkpoint_tools.documents import kinds_of
from m3i_scale.engine.device import split
from m3i_scale.errors import CheckpointError
from m3i_scale.files import sha256_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES_OF_BUFFERS = [torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


def pieces_of(key: str, tensor: torch.Tensor, cuts: list[int]) -> list[Range]:
    """One piece per rank, as cut; empty ones are left out by the caller."""
    flat, edges = tensor.flatten(), [0, *sorted(cuts), tensor.numel()]
    return [Range(key, a, (flat[a:b],)) for a, b in itertools.pairwise(edges)]


def write(
    folder: Path, values: dict[str, torch.Tensor], cuts: dict[str, list[int]], ranks: int
) -> list[WrittenTensors]:
    by_rank: list[list[Range]] = [[] for _ in range(ranks)]
    for key, tensor in values.items():
        for rank, piece in enumerate(pieces_of(key, tensor, cuts[key])):
            if piece.numel:
                by_rank[rank].append(piece)
    return write_as_ranks(folder, values, by_rank)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_comes_back_whoever_wrote_it(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    values, cuts = {}, {}
    for number in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
        dtype = data.draw(st.sampled_from(DTYPES))
        key = f"{data.draw(st.sampled_from(['weight', 'exp_avg']))}/p{number}"
        values[key] = torch.randn(shape).to(dtype)
        cuts[key] = data.draw(st.lists(st.integers(0, math.prod(shape)), min_size=ranks - 1, max_size=ranks - 1))
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "FILE_BYTES", data.draw(st.sampled_from([1, 20, 10**9])))
        folder = Path(name)
        written = write(folder, values, cuts, ranks)
        saved = SavedTensors(folder)
        assert saved.kinds() == sorted({key.partition("/")[0] for key in values})
        for key, tensor in values.items():
            assert torch.equal(saved.whole(key), tensor)
            assert saved.dtype(key) == tensor.dtype
            start = data.draw(st.integers(0, tensor.numel()))
            end = data.draw(st.integers(start, tensor.numel()))
            out = torch.empty(end - start, dtype=data.draw(st.sampled_from(DTYPES)))
            saved.read_into(key, start, out)
            assert torch.equal(out, tensor.flatten()[start:end].to(out.dtype))
        for one in written:
            for file, digest in one.digests.items():
                assert (digest.size, digest.sha256) == ((folder / file).stat().st_size, sha256_of(folder / file))
        assert saved.norms.keys() == values.keys()
        for key, norm in saved.norms.items():
            assert math.isclose(norm, float(values[key].double().norm()), rel_tol=1e-12)


def test_the_library_reads_the_files(tmp_path: Path) -> None:
    values = {"weight/a": torch.randn(4, 5), "average/b": torch.randn(7).bfloat16()}
    write(tmp_path, values, {"weight/a": [6], "average/b": [3]}, 2)
    parts = [load_file(tmp_path / "tensors" / f"rank-0000{rank}-00000.safetensors") for rank in (0, 1)]
    for key, tensor in values.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), tensor.flatten())


def test_a_piece_that_a_rank_forgot_is_noticed(tmp_path: Path) -> None:
    whole = {"weight/a": torch.ones(4)}
    half = pieces_of("weight/a", whole["weight/a"], [2])[0]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="'weight/a' make up 2 elements of 4"):
        write_as_ranks(tmp_path / "one", whole, [[half]])
    with pytest.raises(ValueError, match="do not join at element 2"):
        write_as_ranks(tmp_path / "two", whole, [[half], [half]])


def spoil(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda index: index["pieces"]["weight/a"].pop(), "'weight/a'"),
        (lambda index: index.pop("ranks"), "ranks"),
        (lambda index: index.update(ranks=0), "0"),
        (lambda index: index.update(ranks="many"), "many"),
        (lambda index: index["pieces"].update({"weight/x": []}), "'weight/x'"),
        (lambda index: index["shapes"].update({"weight/x": [1]}), "'weight/x'"),
        (lambda index: index["pieces"]["weight/a"][0].__setitem__(2, "../../elsewhere"), "'weight/a'"),
        (lambda index: index["shapes"].update({"weight/a": [-2, -2]}), "'weight/a'"),
        (
            lambda index: index["pieces"].update(
                {"weight/a": [[0, 9, "rank-00000-00000.safetensors"], [9, -5, "rank-00001-00000.safetensors"]]}
            ),
            "'weight/a'",
        ),
        (lambda index: index.pop("shapes"), "shapes"),
        (lambda index: index.__setitem__("pieces", [1]), "items"),
    ],
)
def test_an_index_that_was_edited_is_refused(tmp_path: Path, change: Any, named: str) -> None:
    write(tmp_path, {"weight/a": torch.ones(4)}, {"weight/a": [1]}, 2)
    spoil(tmp_path / "tensors" / "index.json", change)
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path)
    assert caught.value.where == str(tmp_path / "tensors" / "index.json")
    assert named in caught.value.what


def test_a_file_of_this_name_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """A rank of an earlier job may still be at it."""
    piece = pieces_of("weight/a", torch.ones(4), [])[0]
    write_ranges(tmp_path, [piece], 0)
    with pytest.raises(FileExistsError):
        write_ranges(tmp_path, [piece], 0)


def test_a_piece_is_not_read_on_into_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, {"weight/a": torch.ones(4), "weight/b": torch.zeros(4)}, {"weight/a": [], "weight/b": []}, 1)

    def stretch(index: dict[str, Any]) -> None:
        index["shapes"]["weight/a"] = [8]

    spoil(tmp_path / "tensors" / "index.json", stretch)
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path).whole("weight/a")
    assert caught.value.where == str(tmp_path / "tensors" / "rank-00000-00000.safetensors")
    assert "'weight/a'" in caught.value.what


def test_files_that_are_not_as_the_index_says(tmp_path: Path) -> None:
    write(tmp_path, {"weight/a": torch.ones(4), "weight/b": torch.ones(2)}, {"weight/a": [], "weight/b": []}, 1)
    file = tmp_path / "tensors" / "rank-00000-00000.safetensors"
    whole = file.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path).read_into("weight/a", 2, torch.empty(3))
    assert str(caught.value.where).endswith("/tensors/index.json")
    assert "2 to 5" in caught.value.what
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path).whole("weight/c")
    assert str(caught.value.where).endswith("/tensors/index.json")
    assert "'weight/c'" in caught.value.what
    file.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path).whole("weight/b")
    assert caught.value.where == str(file)
    file.write_bytes((1 << 40).to_bytes(8, "little") + whole[8:])
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path).whole("weight/a")
    assert caught.value.where == str(file)
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path).whole("weight/a")
    assert caught.value.where == str(file)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two tensors."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    write(folder, {"weight/a": torch.ones(4), "weight/b": torch.ones(2)}, {"weight/a": [2], "weight/b": []}, 2)
    return folder


def opened_before(folder: Path) -> Callable[[Path], object]:
    tensors = SavedTensors(folder)
    return lambda folder: tensors.whole("weight/a")


@pytest.mark.parametrize(
    "prepare",
    [
        opened_before,
        lambda folder: SavedTensors,
        lambda folder: read_meta,
        lambda folder: kinds_of,
        lambda folder: _restore_random_states,
    ],
    ids=["tensor", "index", "meta", "headers", "random states"],
)
def test_who_reads_what_a_run_removes_is_told_so(saved: Path, prepare: Callable[[Path], Callable[[Path], Any]]) -> None:
    read = prepare(saved)
    shutil.rmtree(saved)
    with pytest.raises(CheckpointError) as caught:
        read(saved)
    assert "has removed the checkpoint meanwhile" in (caught.value.why or "")


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_damaged_meta_file_of_a_checkpoint_that_is_there(saved: Path, content: str | None) -> None:
    if content is not None:
        (saved / "meta.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_meta(saved)
    assert caught.value.where == str(saved / "meta.json")
    assert caught.value.why is None


def test_an_index_without_norms_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"weight/a": torch.ones(4)}, {"weight/a": []}, 1)
    spoil(tmp_path / "tensors" / "index.json", lambda index: index["norms"].clear())
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path)
    assert str(caught.value.where).endswith("/tensors/index.json")
    assert "'weight/a'" in caught.value.what


def test_a_piece_in_two_halves_is_written_whole(tmp_path: Path) -> None:
    values = torch.randn(9)
    upper, lower = torch.empty(9, dtype=torch.bfloat16), torch.empty(9, dtype=torch.int16)
    split(values, upper, lower)
    write_as_ranks(tmp_path, {"average/a": values.view(3, 3)}, [[Range("average/a", 0, (upper, lower))]])
    assert torch.equal(SavedTensors(tmp_path).whole("average/a"), values.view(3, 3))


def test_tensors_of_all_types_come_back(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "half": torch.randn(3).bfloat16(),
        "none": torch.empty(0, 4),
        "across": torch.randn(3, 2).T,
        "numbers": torch.arange(4).view(2, 2),
        **{str(dtype): torch.tensor([1, 2], dtype=dtype) for dtype in DTYPES_OF_BUFFERS},
    }
    write_tensors(tmp_path / "some.safetensors", tensors, {"told": "so"})
    found = load_file(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_without_tensors_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(tmp_path)
    assert str(caught.value.where).endswith("/tensors/index.json")
