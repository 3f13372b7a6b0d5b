"""A checkpoint of thousands of ranks, without its data: what is written down of it, and what one rank reads of that."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
import torch

from m3i_scale.checkpoint.layout import INDEX, TENSORS
from m3i_scale.checkpoint.manifest import Digest, read_manifest, write_manifest
from m3i_scale.checkpoint.stream import Range, write_ranges
from m3i_scale.checkpoint.tensors import Index, SavedTensors, even_piece

KINDS = ("weight", "exp_avg", "exp_avg_sq", "average")
MIB = 1 << 20


def shapes_of_a_billion() -> dict[str, tuple[int, ...]]:
    """1,300 parameters, 1.01 billion elements, of each kind."""
    of_layer = {"norm.weight": (1408,), "norm.bias": (1408,), "query.weight": (1408, 1408), "query.bias": (1408,)}
    of_layer |= {"fc1.weight": (6144, 1408), "fc1.bias": (6144,), "fc2.weight": (1408, 6144), "fc2.bias": (1408,)}
    of_layer |= {f"other.{number}.bias": (1408,) for number in range(18)}
    names = {f"student.model.layers.{layer}.{part}": of_layer[part] for layer in range(50) for part in of_layer}
    return {f"{kind}/{name}": shape for kind in KINDS for name, shape in names.items()}


def even_index(shapes: dict[str, tuple[int, ...]], ranks: int) -> Index:
    return Index(shapes, dict.fromkeys(shapes, 123.456789), ranks, {})


def cut_end_to_end(shapes: dict[str, tuple[int, ...]], ranks: int) -> Index:
    """As under ZeRO-1: tensors laid end to end, and the whole cut evenly."""
    listed: dict[str, list[tuple[int, int, str]]] = {}
    for kind in KINDS:
        of_kind = {key: math.prod(shape) for key, shape in shapes.items() if key.startswith(f"{kind}/")}
        share, at = math.ceil(sum(of_kind.values()) / ranks), 0
        for key, numel in of_kind.items():
            listed[key] = []
            start = 0
            while start < numel:
                rank = (at + start) // share
                count = min((rank + 1) * share - at, numel) - start
                listed[key].append((start, count, f"rank-{rank:05d}-00000.safetensors"))
                start += count
            at += numel
    return Index(shapes, dict.fromkeys(shapes, 123.456789), ranks, listed)


def test_an_index_does_not_grow_as_tensors_times_ranks(tmp_path: Path) -> None:
    shapes, even, listed = shapes_of_a_billion(), {}, {}
    for ranks in (64, 512, 4096):
        even_index(shapes, ranks).write(tmp_path / "even.json")
        cut_end_to_end(shapes, ranks).write(tmp_path / "listed.json")
        even[ranks] = (tmp_path / "even.json").stat().st_size
        listed[ranks] = (tmp_path / "listed.json").stat().st_size
    assert even[4096] - even[64] == len("4096") - len("64")
    assert even[4096] < MIB
    most_pieces = {ranks: len(shapes) + len(KINDS) * ranks for ranks in listed}
    assert all(size < 300 * most_pieces[ranks] for ranks, size in listed.items())


def test_a_manifest_of_4096_ranks_is_a_line_a_file(tmp_path: Path) -> None:
    folders = {
        "tensors": "rank-{:05d}-00000.safetensors",
        "random": "rank-{:05d}.safetensors",
        "data": "rank-{:05d}.json",
    }
    files = {
        f"{folder}/{name.format(rank)}": Digest(1 << 22, "0" * 64)
        for folder, name in folders.items()
        for rank in range(4096)
    }
    write_manifest(tmp_path, files, {"step": 1})
    assert read_manifest(tmp_path).files == files
    assert (tmp_path / "manifest.json").stat().st_size < 200 * len(files)


def test_a_rank_of_512_reads_its_part_of_what_4096_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, wrote, reads, rank = shapes_of_a_billion(), 4096, 512, 300
    (tmp_path / TENSORS).mkdir()
    even_index(shapes, wrote).write(tmp_path / TENSORS / INDEX)
    mine = {key: even_piece(math.prod(shape), rank, reads)[:2] for key, shape in shapes.items()}
    needed = {
        int(file.split("-")[1])
        for key, (start, numel) in mine.items()
        for _, _, file in even_index(shapes, wrote).pieces(key, start, start + numel)
    }
    assert len(needed) < 3 * wrote // reads  # small tensors have shares that are rounded up
    for writer in needed:
        shares = {key: even_piece(math.prod(shape), writer, wrote) for key, shape in shapes.items()}
        values = {numel: torch.full((numel,), float(writer)) for _, numel, _ in shares.values()}
        ranges = [Range(key, start, (values[numel],)) for key, (start, numel, _) in shares.items() if numel]
        write_ranges(tmp_path, ranges, writer)
    opened: list[str] = []

    def counted(path: Path, *arguments: object, **options: object) -> object:
        opened.append(path.name)
        return open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", counted)
    tracemalloc.start()
    saved = SavedTensors(tmp_path)
    for key, (start, numel) in mine.items():
        values_read = torch.empty(numel)
        saved.read_into(key, start, values_read)
        writers = torch.arange(start, start + numel) // math.ceil(math.prod(shapes[key]) / wrote)
        assert torch.equal(values_read, writers.float())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(opened) == {INDEX, *(f"rank-{writer:05d}-00000.safetensors" for writer in needed)}
    assert opened.count(INDEX) == 1
    assert peak < 32 * MIB
