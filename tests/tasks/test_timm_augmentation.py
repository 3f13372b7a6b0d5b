"""RandAugment and random erasing are timm's for a seed, and neither draws from nor moves the process's generators."""

from __future__ import annotations

import importlib.util
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import png, write_shards
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from tiny import first_weights, random_batch
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import AugmentConfig, DataConfig, DatasetConfig, RunConfig, load_run
from m3i_scale.data.augment import RandAugment, random_crop
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.inputs import PixelNorm, normalize
from m3i_scale.tasks.classification.timm_augmentation import Erasing

SIDE = 32
RAND = "rand-m9-mstd0.5-inc1"
MEAN, STD = AugmentConfig().mean, AugmentConfig().std
PLAIN = {"color_jitter_p": 0.0, "grayscale": 0.0}
COLORS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """The generators of the process are after this as before."""
    seed_all(5)
    yield
    after = drawn()
    seed_all(5)
    assert after == drawn()


def published(size: int = SIDE) -> Any:
    """The transform of MAE's fine-tuning, of an image that is cropped already."""
    whole = create_transform(
        size,
        is_training=True,
        auto_augment=RAND,
        color_jitter=None,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )
    _, flip, rand_augment, tensor, normalize, erasing = whole.transforms
    assert isinstance(flip, RandomHorizontalFlip)
    assert isinstance(normalize, Normalize)
    assert isinstance(erasing, RandomErasing)
    return rand_augment, Compose([tensor, normalize]), erasing


def test_a_view_and_what_is_erased_of_it_are_those_of_timms_transform_for_a_seed() -> None:
    rand_augment, normalized, erasing = published()
    erase = Erasing(0.25, PixelNorm(MEAN, STD))
    changed = erased = 0
    for seed in range(40):
        rng = random.Random(seed)
        plain = ViewMaker(AugmentConfig(**PLAIN), views=1, image_size=SIDE, augment=True)(COLORS, seed)
        rng.random()  # whether it is flipped
        random_crop(48, 40, (0.08, 1.0), (0.75, 4 / 3), rng)
        seed_all(rng.getrandbits(64))
        wanted = rand_augment(Image.fromarray(plain.pixels_VCHW[0].transpose(1, 2, 0)))
        with nothing_drawn():
            made = ViewMaker(AugmentConfig(**PLAIN, rand_augment=RAND), views=1, image_size=SIDE, augment=True)
            views = made(COLORS, seed)
        assert views.crops == plain.crops
        assert np.array_equal(views.pixels_VCHW[0].transpose(1, 2, 0), np.asarray(wanted))
        changed += not np.array_equal(views.pixels_VCHW, plain.pixels_VCHW)
        # Of a micro-batch every image is erased by its own seed, wherever it stands.
        batch = random_batch(3, seed=seed, image=SIDE)
        batch.images_VBCHW[0, seed % 3] = torch.from_numpy(views.pixels_VCHW[0])
        batch.seeds_B[seed % 3] = 2**61 + seed
        with nothing_drawn():
            ours = normalize(erase(batch).images_VBCHW[0], MEAN, STD)[seed % 3]
        seed_all(2**61 + seed)
        before = normalized(wanted)
        after = erasing(before.clone())
        torch.testing.assert_close(ours, after, rtol=1e-4, atol=1e-4)
        erased += not torch.equal(before, after)
    assert changed > 20
    assert 2 < erased < 22


def test_what_is_not_erased_keeps_its_values_and_masks_and_labels_stay() -> None:
    batch = random_batch(4, image=SIDE)
    after = Erasing(1.0, PixelNorm(MEAN, STD))(batch)
    same = (after.images_VBCHW[0] - batch.images_VBCHW[0]).abs() < 1e-3
    assert 0.5 < float(same.float().mean()) < 0.98
    assert torch.equal(after.labels_B, batch.labels_B)
    assert batch.images_VBCHW.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode_are_augmented(mode: str) -> None:
    made = ViewMaker(AugmentConfig(rand_augment=RAND), views=2, image_size=SIDE, augment=True)(COLORS.convert(mode), 1)
    assert made.pixels_VCHW.shape == (2, 3, SIDE, SIDE)


def test_an_evaluation_is_not_augmented() -> None:
    one, two = (
        ViewMaker(AugmentConfig(rand_augment=kind), views=1, image_size=SIDE, augment=False)(COLORS, 1)
        for kind in (RAND, None)
    )
    assert np.array_equal(one.pixels_VCHW, two.pixels_VCHW)


def test_another_strength_and_another_size_are_timms_too() -> None:
    ours = RandAugment("rand-m4-n3-mstd1.0-p0.9", 64, (1, 2, 3))
    hparams = {"translate_const": 28, "img_mean": (1, 2, 3), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m4-n3-mstd1.0-p0.9", hparams)
    for seed in range(20):
        seed_all(seed)
        wanted = theirs(COLORS)
        assert np.array_equal(np.asarray(ours(COLORS, seed)), np.asarray(wanted))


def test_what_another_thread_draws_meanwhile_is_its_own_and_changes_nothing() -> None:
    """Without workers the loader makes views in a thread, beside the thread that trains and saves random states."""
    augment = RandAugment(RAND, SIDE, (1, 2, 3))
    alone = [np.asarray(augment(COLORS, seed)) for seed in range(10)]
    seed_all(5)
    wanted = [drawn() for _ in range(200)]
    seed_all(5)
    enough = threading.Event()  # however long this thread is not given a core

    def augmented() -> list[np.ndarray]:
        images: list[np.ndarray] = []
        while len(images) < 400 or not enough.is_set():
            images += [np.asarray(augment(COLORS, seed)) for seed in range(10)]
        return images

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(augmented)
        found = []
        try:
            while not made.done():
                found.append(drawn())
                if len(found) > 10:
                    enough.set()
        finally:
            enough.set()
    assert len(found) > 10
    assert found[:200] == wanted[: len(found)]
    assert all(np.array_equal(image, alone[number % 10]) for number, image in enumerate(made.result()))


@pytest.mark.parametrize("config", ["rand-m10-p1.0-inc1", "rand-m15-mmax20-p1.0-inc1", "rand-m0-p1.0"])
def test_at_any_strength_there_is_an_image(config: str) -> None:
    """timm posterizes to no bits at all at its full strength, which Pillow refuses."""
    augment = RandAugment(config, SIDE, (1, 2, 3))
    made = [np.asarray(augment(COLORS, seed)) for seed in range(80)]
    assert {image.shape for image in made} == {(48, 40, 3)}
    assert not all(image.max() == 0 for image in made)


def stream(folder: Path, **options: Any) -> TrainStream:
    sources = {"a": DatasetConfig(path=str(folder))}
    split = {"workers": 0, "world_size": 1, "rank": 0} | options
    augment = AugmentConfig(**PLAIN, rand_augment=RAND)
    return TrainStream(
        DataConfig(datasets=sources, streams=4, augment=augment, num_workers=split["workers"]),
        sources,
        views=1,
        image_size=SIDE,
        micro_batch_size=8 // split["world_size"],
        world_size=split["world_size"],
        rank=split["rank"],
        seed=3,
        tokenizer=None,
        max_tokens=8,
        label_sets={},
        cache_dir=folder / "index",
    )


def batches(opened: TrainStream, count: int) -> list[Batch]:
    iterator = iter(opened)
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def test_workers_ranks_and_a_resume_change_nothing(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(32)]
    folder = write_shards(tmp_path / "shards", [{"png": png(picture)} for picture in pictures], ["a", "b"])
    random.seed(1)
    one = batches(stream(folder), 4)
    random.seed(2)
    np.random.seed(2)
    two = batches(stream(folder, workers=2), 4)
    ranks = [batches(stream(folder, world_size=2, rank=rank), 4) for rank in range(2)]
    stopped = stream(folder)
    batches(stopped, 2)
    resumed = stream(folder)
    resumed.load_state_dict(stopped.state_dict())
    later = batches(resumed, 2)
    for number, batch in enumerate(one):
        assert torch.equal(batch.images_VBCHW, two[number].images_VBCHW)
        assert torch.equal(batch.images_VBCHW, Batch.cat([ranks[0][number], ranks[1][number]]).images_VBCHW)
        assert number < 2 or torch.equal(batch.images_VBCHW, later[number - 2].images_VBCHW)


def run_of(task: dict[str, Any] | None, **data: Any) -> RunConfig:
    return RunConfig.model_validate({"recipe": {}} | ({} if task is None else {"task": task}) | {"data": data})


@pytest.mark.parametrize("augment", [{"rand_augment": RAND}, {"erasing": 0.25}])
def test_labelled_images_alone_are_augmented_so(augment: dict[str, Any]) -> None:
    run_of({"kind": "classification"}, augment=augment)
    for task in ({"kind": "segmentation"}, None):
        with pytest.raises(ValidationError, match=next(iter(augment))):
            run_of(task, augment=augment)
    sources = {"a": {"path": "/data/a", "augment": augment}}
    with pytest.raises(ValidationError):
        run_of({"kind": "segmentation"}, datasets=sources)


@pytest.mark.parametrize(
    "name", ["rand", "augmix-m3", "rand-m", "rand-x9", "rand-m9-", "rand-minf", "rand-m9-tweights", "v0", 9]
)
def test_what_is_no_randaugment_is_refused(name: object) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(rand_augment=name)


@pytest.mark.parametrize("augment", [{"rand_augment": RAND}, {"erasing": 0.25}])
def test_without_timm_the_run_is_refused(monkeypatch: pytest.MonkeyPatch, augment: dict[str, Any]) -> None:
    ((key, value),) = augment.items()
    found = importlib.util.find_spec
    run = load_run("finetune", [f"data.augment.{key}={value}"])
    run.task.check(run, backbone_config(run.backbone))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    with pytest.raises(ConfigError) as caught:
        run.task.check(run, backbone_config(run.backbone))
    assert caught.value.where == f"data.augment.{key}"
    assert ".[timm]" in str(caught.value.fix)


def test_images_are_erased_and_then_mixed() -> None:
    size = {"image_size": SIDE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    run = load_run("finetune", ["task.mixup=0.8", "backbone.preset=dinov2-s/14"])
    backbone = run.backbone.model_copy(update={"config": size | {"patch_size": 8}})
    run = run.model_copy(update={"backbone": backbone})
    objective = build_objective(run, {"train": ["a", "b"]}, None)
    first_weights(objective, seed=0)
    batch = random_batch(4, image=SIDE)
    batch = replace(batch, labels_B=torch.tensor([0, 1, 0, 1]), label_sets_B=torch.zeros(4, dtype=torch.int64))
    run.task.prepare(objective, 2)
    mixing = objective.mix_labelled
    run.task.prepare(objective, 2, erasing=1.0)
    wanted = mixing(Erasing(1.0, objective.pixel_norm)(batch))
    both = objective.mix_labelled(batch)
    assert torch.equal(both.images_VBCHW, wanted.images_VBCHW)
    assert torch.equal(both.soft_labels_BK, wanted.soft_labels_BK)
    assert not torch.equal(both.images_VBCHW, mixing(batch).images_VBCHW)
    loss, _ = objective.train()(batch)
    assert torch.isfinite(loss)
