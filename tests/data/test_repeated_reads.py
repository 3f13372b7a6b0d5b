"""A loader whose source has repeats: every pass as its factors say, the same on any ranks, and exact after a resume."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from m3i_scale.config import DataConfig
from m3i_scale.data.categories import CATEGORIES, categories_file, load_categories
from m3i_scale.data.state import merge_states
from m3i_scale.errors import DataError
from m3i_scale.shards.folder import index_folder

SIZES = [5, 8, 3, 7, 9, 4]
RARE, EMPTY = {4, 17, 30}, {2, 9, 28, 35}
THRESHOLD = 0.6
"""Of 32 samples with objects 3 have category 1: √(0.6 / (3 / 32)) = 2.53 reads of each of those."""


def instances(number):
    categories = [] if number in EMPTY else [0, 1] if number in RARE else [0]
    rows = [
        {"id": 10 * number + place, "category": category, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
        for place, category in enumerate(categories)
    ]
    if number % 2:  # crowds count as no object
        rows.append({"id": 10 * number + 9, "category": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 1})
    return {"image_id": number, "width": 20, "height": 16, "annotations": rows}


@pytest.fixture(scope="module")
def boxes(tools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    with_boxes = lambda number, members: members | {"instances.json": json.dumps(instances(number)).encode()}  # noqa: E731
    tools.write_folder(folder, SIZES, change=with_boxes)
    names = [{"id": 3, "name": "common"}, {"id": 8, "name": "rare"}]
    (folder / CATEGORIES).write_text(json.dumps({"format": "coco", "categories": names}))
    index_folder(folder, sorted(folder.glob("*.tar")))
    return folder


def loader(tools, folder, cache, threshold=THRESHOLD, **options):
    options = {"streams": 4, "micro": 4, "shuffle_shards": 2} | options
    return tools.make_loader({"boxes": folder}, cache, settings={"boxes": {"repeat_threshold": threshold}}, **options)


def number_of(key):
    return int(key.rpartition("k")[2])


def test_passes_have_as_many_reads_and_of_each_sample_as_its_factor_says(tools, boxes, cache):
    whole = loader(tools, boxes, cache, epochs={"boxes": 40}, micro=4)
    # 29 of once, 3 of 2.53: 36.6, rounded up to 37
    assert whole.samples_at_most == 40 * 37 // 4 * 4
    keys, pixels = [], []
    for batch in whole:
        keys += batch.keys
        pixels += list(batch.images_VBCHW[0])
    counts = Counter(map(number_of, keys))
    assert set(counts) == {*range(36)} - EMPTY
    assert all(39 <= counts[number] <= 44 for number in set(counts) - RARE)
    factor = (THRESHOLD * 32 / 3) ** 0.5
    assert all(40 * 2 <= counts[number] <= 40 * 3 for number in RARE)
    once = sum(counts[number] for number in set(counts) - RARE) / 29
    assert sum(counts[number] for number in RARE) / 3 / once == pytest.approx(factor, abs=0.1)
    first = [torch.as_tensor(view) for key, view in zip(keys[:37], pixels[:37], strict=True) if number_of(key) == 4]
    assert len(first) >= 2
    assert not torch.equal(first[0], first[1])  # another crop each time


def test_the_same_batches_on_any_ranks_and_after_a_resume_in_the_middle_of_a_pass(tools, boxes, cache):
    def batches(world, steps, state=None):
        loaders = [loader(tools, boxes, cache, world=world, rank=rank, micro=8 // world) for rank in range(world)]
        for of_rank in loaders:
            if state is not None:
                of_rank.load_state_dict(state)
        running = [iter(of_rank) for of_rank in loaders]
        found = []
        for _ in range(steps):
            parts = [next(of_rank) for of_rank in running]
            pixels = torch.cat([part.images_VBCHW for part in parts], dim=1)
            found.append(([key for part in parts for key in part.keys], pixels))
        for of_rank in running:
            of_rank.close()
        return found, merge_states([json.loads(json.dumps(of_rank.state_dict())) for of_rank in loaders])

    whole, _ = batches(1, 15)
    before, state = batches(2, 3)
    middle, state = batches(4, 5, state)
    after, _ = batches(1, 7, state)
    for one, other in zip(whole, before + middle + after, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_0_leaves_out_samples_without_objects_and_reads_others_once(tools, boxes, cache):
    keys = [key for batch in loader(tools, boxes, cache, 0.0, epochs={"boxes": 1}) for key in batch.keys]
    assert sorted(map(number_of, keys)) == sorted({*range(36)} - EMPTY)


def test_a_state_knows_how_often_samples_were_read(tools, boxes, cache, tmp_path):
    state = loader(tools, boxes, cache).state_dict()
    for threshold in (None, 0.5):
        with pytest.raises(DataError):
            loader(tools, boxes, cache, threshold).load_state_dict(state)
    plain = loader(tools, boxes, cache, None).state_dict()["sources"]["boxes"]
    assert "repeats" not in plain
    assert "repeat_threshold" not in plain["settings"]


def test_without_an_index_of_categories_or_with_one_of_other_shards_nothing_is_repeated(tools, boxes, cache, tmp_path):
    folder = tmp_path / "shards"
    tools.write_folder(folder, SIZES)
    index_folder(folder, sorted(folder.glob("*.tar")))
    with pytest.raises(DataError) as caught:
        loader(tools, folder, cache)
    assert "shards index" in caught.value.fix
    for path in boxes.glob("index/*.categories.npz"):
        (folder / "index" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError):
        loader(tools, folder, cache)
    (folder / "index" / categories_file("s-000.tar")).write_bytes(b"PK")
    with pytest.raises(DataError):
        loader(tools, folder, cache)


def test_malformed_instances_have_no_categories(tools, tmp_path):
    values = [b"{", b"[]", b'{"annotations": 3}', b'{"annotations": [{"category": [1]}]}', b"[" * 100_000]
    values += [b'{"annotations": [{"category": 7}]}', b'{"annotations": [{"category": 1}, {"category": 0}]}']
    change = lambda number, members: members | {"instances.json": values[number]}  # noqa: E731
    folder = tools.write_folder(tmp_path / "shards", [len(values)], change=change)
    names = [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}]
    (folder / CATEGORIES).write_text(json.dumps({"format": "coco", "categories": names}))
    (index,) = index_folder(folder, sorted(folder.glob("*.tar")))
    found = load_categories(index)
    assert found.counts_N.tolist() == [0] * 6 + [2]
    assert np.array_equal(found.categories_M, [0, 1])


def test_evaluation_reads_every_sample_once():
    with pytest.raises(ValueError, match="repeat_threshold"):
        DataConfig(validation={"v": {"path": "/data/v", "repeat_threshold": 0.001}})
