"""A look at the batch that comes next leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_scale.errors import DataError


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_written_down_once(tools: Any, tmp_path: Path, workers: int) -> None:
    def holes(number: int, members: dict[str, bytes]) -> dict[str, bytes]:
        return members | ({"png": b"no image"} if number % 5 == 0 else {})

    folder = tools.write_folder(tmp_path / "shards", [10] * 4, change=holes)
    path = tmp_path / "quarantine.jsonl"
    loader = tools.make_loader(
        {"holes": folder}, tmp_path / "cache", streams=4, quarantine=path, max_corrupt_fraction=0.5, workers=workers
    )
    before = loader.state_dict()
    peeked = loader.peek()
    assert not path.exists()
    assert loader.quarantined == {}
    assert loader.state_dict() == before
    batches = iter(loader)
    first = next(batches)
    batches.close()
    assert first.keys == peeked.keys
    assert torch.equal(first.images_VBCHW, peeked.images_VBCHW)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(entries) == len({entry["key"] for entry in entries}) == sum(loader.quarantined.values()) > 0


def test_sources_without_a_whole_batch_say_so(tools: Any, tmp_path: Path) -> None:
    folder = tools.write_folder(tmp_path / "shards", [1] * 4)
    loader = tools.make_loader({"few": folder}, tmp_path / "cache", streams=4, epochs={"few": 1})
    with pytest.raises(DataError) as caught:
        loader.peek()
    assert "epochs" in caught.value.fix


def test_several_batches_come_as_one_and_come_again(tools: Any, tmp_path: Path) -> None:
    folder = tools.write_folder(tmp_path / "shards", [10] * 4)
    loader = tools.make_loader({"some": folder}, tmp_path / "cache", streams=4)
    peeked = loader.peek(3)
    batches = iter(loader)
    assert peeked.keys == [key for _ in range(3) for key in next(batches).keys]
    batches.close()
