import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.retrieval import RetrievalHitRate

from m3i_scale.evaluation.towers import distinct_captions, rank


def unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_equal_captions_are_one_item():
    captions, number = distinct_captions(["b", "a", "b"])
    assert captions == ["a", "b"]
    assert number.tolist() == [1, 0, 1]
    images = unit([[1, 0.1], [0, 1], [0.1, 1]])  # the third one looks like the caption of the second
    found = rank(images, unit([[0, 1], [1, 0]]), number)
    assert found.image_to_text.tolist() == [0, 0, 1]
    # "b" finds its first image at once, and that its second one comes last does not matter
    assert found.text_to_image.tolist() == [0, 0]


def test_ties_count_against_the_model():
    number = np.arange(4)
    collapsed = unit(np.ones((4, 3)))
    found = rank(collapsed, collapsed, number)
    assert found.image_to_text.tolist() == [3, 3, 3, 3]
    assert found.text_to_image.tolist() == [3, 3, 3, 3]


@given(seed=st.integers(0, 2**32 - 1), kinds=st.integers(2, 9), depth=st.sampled_from([1, 5, 10]))
def test_equals_torchmetrics(seed, kinds, depth):
    generator = np.random.default_rng(seed)
    texts = [f"t{kind}" for kind in [*range(kinds), *generator.integers(0, kinds, 12)]]
    captions, number = distinct_captions(texts)
    images = unit(generator.normal(size=(len(texts), 8)))
    words = unit(generator.normal(size=(len(captions), 8)))
    found = rank(images, words, number)
    scores = torch.from_numpy(images @ words.T)
    right = torch.from_numpy(number[:, None] == np.arange(len(captions)))
    for ranks, score, hit in ((found.image_to_text, scores, right), (found.text_to_image, scores.T, right.T)):
        queries = torch.arange(score.shape[0])[:, None].expand(score.shape)
        rate = RetrievalHitRate(top_k=min(depth, score.shape[1]))
        wanted = rate(score.flatten(), hit.flatten(), indexes=queries.flatten())
        assert (ranks < depth).mean() == pytest.approx(wanted.item())


def test_chance_is_what_random_orders_reach():
    captions, number = distinct_captions(["a"] * 3 + ["b"] * 2 + list("cdefgh"))
    generator = np.random.default_rng(0)
    hits = {("image_to_text", 1): [], ("image_to_text", 5): [], ("text_to_image", 1): [], ("text_to_image", 5): []}
    for _ in range(2_000):
        found = rank(unit(generator.normal(size=(11, 6))), unit(generator.normal(size=(len(captions), 6))), number)
        for (direction, depth), values in hits.items():
            values.append((getattr(found, direction) < depth).mean())
    for (direction, depth), values in hits.items():
        assert found.chance(direction, depth) == pytest.approx(np.mean(values), abs=0.015)
    assert found.chance("image_to_text", 10) == 1
    assert found.chance("text_to_image", 50) == 1
