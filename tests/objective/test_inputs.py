"""Masks, mixes and the random numbers behind them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from tiny import tiny_run

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.objective.inputs import EncodedInput, InputSpec, MaskSpec, MixSpec, build_inputs, mix_partners, normalize
from m3i_scale.objective.masks import Mask, hash_uniform

SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8, unique=True).map(torch.tensor)
FORMS = st.sampled_from(["random", "block", "inverse_block"])
COUNTED_FORMS = FORMS | st.just("beit_blocks")
"""Those too that depend on the number of masked patches."""


def mixed(count: int, seeds: torch.Tensor, grid: tuple[int, int], cell: int = 1, form: str = "random"):
    """Inputs of a mix of so many images."""
    names = [f"x{number}" for number in range(count)]
    mix = MixSpec(inputs=names, form=form)
    return build_inputs([InputSpec(name=name, view=1) for name in names], mix, seeds, grid, cell)


def one_masked(ratio: float, form: str, seeds: torch.Tensor, grid: tuple[int, int], cell: int = 1) -> EncodedInput:
    """One input with a mask."""
    spec = InputSpec(name="x", view=1, mask=MaskSpec(form=form, ratio=ratio))
    return build_inputs([spec], None, seeds, grid, cell)[0]


def blocked(
    form: dict[str, float], ratio: float, seeds: torch.Tensor, grid: tuple[int, int], cell: int = 1
) -> EncodedInput:
    """One input with target blocks."""
    spec = InputSpec(name="x", view=1, mask={"form": {"kind": "target_blocks", **form}, "ratio": ratio})
    return build_inputs([spec], None, seeds, grid, cell)[0]


# ---------------------------------------------------------------- random numbers


def test_hash_numbers_are_uniform_over_seeds_and_over_places() -> None:
    numbers = hash_uniform(torch.arange(300), 200, 0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(numbers[:, 0].numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(numbers[0].numpy(), "uniform").pvalue > 1e-3
    neighbours = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.02


@given(SEEDS, st.integers(1, 40), st.integers(0, 100))
def test_hash_numbers_depend_on_seed_stream_and_place_alone(seeds: torch.Tensor, count: int, stream: int) -> None:
    whole = hash_uniform(seeds, count + 7, stream)
    assert torch.equal(whole[:, :count], hash_uniform(seeds, count, stream))
    assert torch.equal(whole[-1:], hash_uniform(seeds[-1:], count + 7, stream))
    assert not torch.equal(whole, hash_uniform(seeds, count + 7, stream + 1))


def test_hash_numbers_match_splitmix64_in_plain_integers() -> None:
    def reference(seed: int, index: int, stream: int) -> float:
        full = (1 << 64) - 1
        state = (seed + index * 0x9E3779B97F4A7C15 + stream * 2685821657736338717) & full
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
        return ((state ^ (state >> 31)) >> 40) / 2**24

    seeds = [0, 1, 12345, 2**62 + 17, 2**63 - 1]
    for stream in (0, 1, 5, 16, 33):
        wanted = [[reference(seed, index, stream) for index in (1, 2, 3)] for seed in seeds]
        assert torch.equal(hash_uniform(torch.tensor(seeds), 3, stream), torch.tensor(wanted))


# ---------------------------------------------------------------- masks


@given(SEEDS, st.sampled_from([(2, 2), (4, 4), (3, 5), (14, 14)]), FORMS)
def test_a_patch_order_is_a_permutation(seeds: torch.Tensor, grid: tuple[int, int], form: str) -> None:
    order = Mask.model_validate(form).order(seeds, grid, 0)
    assert torch.equal(order.sort(dim=1).values, torch.arange(grid[0] * grid[1]).expand(len(seeds), -1))


@settings(max_examples=40)
@given(SEEDS, st.floats(0.01, 0.99), FORMS)
def test_masks_hide_the_rounded_count_and_split_the_patches(seeds: torch.Tensor, ratio: float, form: str) -> None:
    spec = one_masked(ratio, form, seeds, (6, 6))
    hidden = min(max(round(ratio * 36), 1), 35)
    assert spec.hidden_BM.shape == (len(seeds), hidden)
    both = torch.cat([spec.visible_BL, spec.hidden_BM], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(36).expand(len(seeds), -1))
    for part in (spec.visible_BL, spec.hidden_BM):
        assert torch.equal(part, part.sort(dim=1).values)


def test_the_published_ratios_give_the_published_counts() -> None:
    sim = one_masked(0.602, "block", torch.arange(2), (14, 14))
    mae = one_masked(0.75, "random", torch.arange(2), (14, 14))
    assert sim.hidden_BM.shape[1] == 118
    assert mae.visible_BL.shape[1] == 49


def test_inputs_of_one_recipe_have_masks_of_their_own() -> None:
    specs = [InputSpec(name=name, view=1, mask=MaskSpec(form="random", ratio=0.5)) for name in "abc"]
    first, second, third = build_inputs(specs, None, torch.arange(4), (6, 6))
    assert not torch.equal(first.hidden_BM, second.hidden_BM)
    assert not torch.equal(second.hidden_BM, third.hidden_BM)


def test_block_masks_cluster_and_random_masks_do_not() -> None:
    def clustering(form: str) -> float:
        """Return the fraction of masked patches whose right neighbor is masked, too."""
        spec = one_masked(0.5, form, torch.arange(200), (14, 14))
        hidden = torch.zeros(200, 196).scatter_(1, spec.hidden_BM, 1.0).view(200, 14, 14)
        return float((hidden[:, :, 1:] * hidden[:, :, :-1]).sum() / hidden[:, :, :-1].sum())

    assert abs(clustering("random") - 0.5) < 0.02
    assert clustering("block") > 0.75


def mask_of_beit(draw: random.Random, side: int, masked: int) -> np.ndarray:
    """A mask of `MaskingGenerator` in the code of BEiT and SIM, written anew."""
    mask = np.zeros((side, side), dtype=bool)
    while (left := masked - int(mask.sum())) > 0:
        for _ in range(10):
            area, aspect = draw.uniform(16, left), math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if max(height, width) < side:
                top, start = draw.randint(0, side - height), draw.randint(0, side - width)
                part = mask[top : top + height, start : start + width]
                if 0 < (~part).sum() <= left:
                    part[:] = True
                    break
        else:
            visible = np.flatnonzero(~mask)
            mask.flat[draw.sample(list(visible), left)] = True
    return mask


def edges(masks: np.ndarray) -> np.ndarray:
    """The number of edges between masked and visible patches, by mask."""
    return sum((np.diff(masks, axis=axis) != 0).sum(axis=(1, 2)) for axis in (1, 2))


def test_blocks_of_beit_have_the_distribution_of_its_code() -> None:
    draw, count = random.Random(0), 4000
    wanted = np.stack([mask_of_beit(draw, 14, 118) for _ in range(count)])
    hidden = one_masked(0.602, "beit_blocks", torch.arange(count) * 7919, (14, 14)).hidden_BM
    masks = torch.zeros(count, 196).scatter(1, hidden, 1.0).bool().view(-1, 14, 14).numpy()
    assert set(masks.sum(axis=(1, 2))) == {118}
    assert np.abs(masks.mean(axis=0) - wanted.mean(axis=0)).max() < 4.5 * math.sqrt(0.5 / count)
    ours, theirs = edges(masks), edges(wanted)
    assert stats.ks_2samp(ours, theirs).statistic < 0.04  # 0.24 for `block`
    assert ours.mean() == pytest.approx(theirs.mean(), rel=0.02)


def test_an_inverse_block_mask_shows_one_rectangle_of_any_place_and_aspect() -> None:
    spec = one_masked(0.65, "inverse_block", torch.arange(400), (14, 14))
    shown = torch.zeros(400, 196).scatter_(1, spec.visible_BL, 1.0).view(400, 14, 14)
    heights, widths = (shown.amax(dim=dim).sum(dim=1) for dim in (2, 1))
    count = spec.visible_BL.shape[1]
    filled = count / (heights * widths)
    assert float(filled.min()) > 0.7  # the last row or column of patches may lack some
    assert float(filled.mean()) > 0.85
    aspect = heights / widths
    assert 0.4 < float(aspect.min()) < 0.6
    assert 1.7 < float(aspect.max()) < 2.4
    torch.testing.assert_close(shown.mean(dim=0), torch.full((14, 14), count / 196), atol=0.1, rtol=0)


# ---------------------------------------------------------------- target blocks


@settings(max_examples=40)
@given(
    SEEDS,
    st.integers(1, 5),
    st.floats(0.05, 0.19),
    st.tuples(st.floats(0.2, 1.0), st.floats(1.0, 4.0)),
    st.floats(0.1, 1.0),
    st.sampled_from([(6, 6), (14, 14), (5, 9)]),
)
def test_target_blocks_are_rectangles_of_one_size_that_the_context_does_not_see(
    seeds: torch.Tensor, count: int, scale: float, aspect: tuple[float, float], context: float, grid: tuple[int, int]
) -> None:
    form = {"blocks": count, "scale": scale, "aspect": aspect, "context": context}
    seen = blocked(form, count * scale, seeds, grid)
    rows, columns = grid
    patches = int(scale * rows * columns)
    assert seen.blocks_BKT.shape == (len(seeds), count, patches)
    for sample, blocks in enumerate(seen.blocks_BKT.tolist()):
        hidden = set(seen.hidden_BM[sample].tolist())
        for block in blocks:
            assert set(block) <= hidden
            assert block == sorted(set(block))
            assert 0 <= block[0] <= block[-1] < rows * columns
            down = [patch // columns for patch in block]
            across = [patch % columns for patch in block]
            height, width = down[-1] - down[0] + 1, max(across) - min(across) + 1
            # All of the rectangle but the beginning of its first row, or the end of its last one.
            assert (height - 1) * width < patches <= height * width
            places = [(down[0] + number // width, min(across) + number % width) for number in range(height * width)]
            found = list(zip(down, across, strict=True))
            assert found in (places[:patches], places[-patches:])
            wide = (patches / aspect[0]) ** 0.5 + 0.5, (patches / aspect[1]) ** 0.5 - 0.5
            assert min(wide[1], columns) - 1e-4 <= width <= max(wide[0], -(-patches // rows)) + 1e-4


def test_target_blocks_lie_everywhere_with_every_shape_and_depend_on_the_seed_alone() -> None:
    seeds = torch.arange(400) * 7919
    seen = blocked({}, 0.7, seeds, (14, 14))
    assert seen.visible_BL.shape[1] == 59
    assert seen.blocks_BKT.shape == (400, 4, 34)
    often = torch.zeros(196).scatter_add_(0, seen.blocks_BKT.flatten(), torch.ones(400 * 4 * 34)).view(14, 14)
    assert often.min() > 0
    for corner in (often[:2, :2], often[-2:, -2:]):
        assert corner.sum() < often[6:8, 6:8].sum()
    assert {4, 5, 6} <= set((seen.blocks_BKT % 14).diff(dim=2).eq(1).int().argmin(dim=2).flatten().tolist())
    alone = blocked({}, 0.7, seeds[7:8], (14, 14))
    assert torch.equal(alone.blocks_BKT, seen.blocks_BKT[7:8])
    assert torch.equal(alone.visible_BL, seen.visible_BL[7:8])
    assert not torch.equal(seen.blocks_BKT[0], seen.blocks_BKT[1])
    assert not torch.equal(seen.blocks_BKT[:, 0], seen.blocks_BKT[:, 1])


def test_the_context_is_drawn_from_its_square_while_that_has_enough() -> None:
    seeds = torch.arange(50)
    seen = blocked({"blocks": 1, "scale": 0.1, "context": 0.25}, 0.9, seeds, (10, 10))
    assert seen.visible_BL.shape == (50, 10)
    for visible in seen.visible_BL:
        assert visible.div(10, rounding_mode="floor").aminmax().max - visible.div(10, rounding_mode="floor").min() < 5
        assert (visible % 10).max() - (visible % 10).min() < 5
    more = blocked({"blocks": 1, "scale": 0.1, "context": 0.25}, 0.2, seeds, (10, 10))
    assert more.visible_BL.shape == (50, 80)


def test_target_blocks_of_cells_are_made_of_whole_squares() -> None:
    form, seeds = {"blocks": 2, "scale": 0.2}, torch.arange(6)
    coarse, fine = blocked(form, 0.5, seeds, (5, 5)), blocked(form, 0.5, seeds, (10, 10), 2)
    for few, many in zip(coarse.blocks_BKT.flatten(0, 1), fine.blocks_BKT.flatten(0, 1), strict=True):
        squares = {(int(patch) // 10 // 2) * 5 + int(patch) % 10 // 2 for patch in many}
        assert squares == set(few.tolist())
        assert many.tolist() == sorted(set(many.tolist()))
        assert len(many) == 4 * len(few)


def test_without_a_mask_every_patch_is_visible() -> None:
    (spec,) = build_inputs([InputSpec(name="x", view=1)], None, torch.arange(3), (4, 4))
    assert torch.equal(spec.visible_BL, torch.arange(16).expand(3, -1))
    assert spec.hidden_BM.shape == (3, 0)


def test_an_input_of_several_views_and_masks_has_a_part_for_each() -> None:
    seeds, mask = torch.arange(4), {"ratio": 0.5}
    several = InputSpec(name="x", view=2, views=2, mask=MaskSpec(**mask, count=2))
    parts = build_inputs([several, InputSpec(name="y", view=1)], None, seeds, (6, 6))
    assert [(part.name, part.view) for part in parts] == [("x", 1), ("x", 1), ("x", 2), ("x", 2), ("y", 0)]
    alone = [InputSpec(name=name, view=2, mask=MaskSpec(**mask)) for name in "abcd"]
    for part, wanted in zip(parts, build_inputs(alone, None, seeds, (6, 6)), strict=False):
        assert torch.equal(part.hidden_BM, wanted.hidden_BM)


def test_a_view_of_another_size_has_a_grid_of_its_own() -> None:
    specs = [InputSpec(name="large", view=1), InputSpec(name="small", view=2, views=2)]
    parts = build_inputs(specs, None, torch.arange(3), (4, 4), small={2: (2, 2), 3: (2, 2)})
    assert [part.visible_BL.shape for part in parts] == [(3, 16), (3, 4), (3, 4)]


# ---------------------------------------------------------------- mask tokens


def covered(seeds: torch.Tensor, grid: tuple[int, int] = (8, 8), form: str = "random", **mask: object) -> EncodedInput:
    """One input with mask tokens."""
    spec = InputSpec(name="x", view=1, mask=MaskSpec(form=form, masked="mask_token", **mask))
    return build_inputs([spec], None, seeds, grid)[0]


@given(SEEDS, COUNTED_FORMS, st.floats(0.1, 0.9))
def test_mask_tokens_hide_the_patches_that_would_be_dropped(seeds: torch.Tensor, form: str, ratio: float) -> None:
    part, dropped = covered(seeds, form=form, ratio=ratio), one_masked(ratio, form, seeds, (8, 8))
    assert torch.equal(part.hidden_BM, dropped.hidden_BM)
    assert torch.equal(part.visible_BL, torch.arange(64).expand(len(seeds), -1))
    assert part.masked_BM is None
    assert part.shown_BN is not None
    assert torch.equal(part.shown_BN.nonzero()[:, 1].view(len(seeds), -1), dropped.visible_BL)


@given(SEEDS, FORMS)
def test_samples_hide_shares_of_their_own_and_what_is_hidden_first(seeds: torch.Tensor, form: str) -> None:
    part = covered(seeds, form=form, ratio=(0.25, 0.75))
    assert part.masked_BM is not None
    assert part.shown_BN is not None
    assert part.hidden_BM.shape == (len(seeds), 48)
    for row, count in enumerate(part.masked_BM.sum(dim=1).tolist()):
        assert 16 <= count <= 48
        hidden = part.hidden_BM[row][part.masked_BM[row]]
        assert torch.equal((~part.shown_BN[row]).nonzero()[:, 0], hidden)
        assert torch.equal(hidden, one_masked(count / 64, form, seeds, (8, 8)).hidden_BM[row])
    assert part.masked_N is not None
    assert torch.equal(part.masked_N, part.masked_BM.flatten().nonzero()[:, 0])
    alone = covered(seeds[-1:], form=form, ratio=(0.25, 0.75))
    assert alone.masked_BM is not None
    assert torch.equal(alone.masked_BM[0], part.masked_BM[-1])  # whatever the batch


def test_one_patch_of_a_sample_stays_visible() -> None:
    part = covered(torch.arange(9), ratio=(0.99, 0.999), share=0.5)
    assert part.masked_BM is not None
    assert part.masked_N is not None
    assert set(part.masked_BM.sum(dim=1).tolist()) == {0, 63}
    assert torch.equal(part.masked_N, part.masked_BM.flatten().nonzero()[:, 0])


def test_a_share_of_the_samples_hides_anything() -> None:
    part = covered(torch.arange(2000), ratio=(0.1, 0.5), share=0.3)
    assert part.masked_BM is not None
    share = part.masked_BM.float().mean(dim=1) * part.hidden_BM.shape[1] / 64
    assert abs(float((share > 0).float().mean()) - 0.3) < 0.03
    assert stats.kstest(share[share > 0].numpy(), stats.uniform(0.1, 0.4).cdf).statistic < 0.06  # whole patches
    one, other = (
        build_inputs(
            [InputSpec(name="x", view=1, mask=MaskSpec(ratio=0.5, masked="mask_token", share=0.5, count=2))],
            None,
            torch.arange(2000),
            (4, 4),
        )[number].masked_BM
        for number in (0, 1)
    )
    assert one is not None
    assert other is not None
    both = (one.any(dim=1) & other.any(dim=1)).float().mean()
    assert abs(float(both) - 0.25) < 0.04  # each part draws for itself


@pytest.mark.parametrize(
    "mask",
    [
        {"ratio": (0.1, 0.5)},
        {"ratio": 0.5, "share": 0.5},
        {"ratio": (0.5, 0.1), "masked": "mask_token"},
        {"ratio": (0.5, 1.0), "masked": "mask_token"},
        {"ratio": 0.0},
        {"ratio": 1.0},
    ],
)
def test_masks_that_no_batch_can_have_are_refused(mask: dict) -> None:
    with pytest.raises(ValidationError):
        MaskSpec(**mask)


# ---------------------------------------------------------------- mixes


@given(st.integers(2, 17), st.integers(2, 4))
def test_partners_never_meet_themselves_and_serve_once_in_every_place(batch: int, images: int) -> None:
    if batch < images:
        with pytest.raises(ValueError, match="needs a micro-batch of at least"):
            mixed(images, torch.arange(batch), (4, 4))
        return
    places = torch.stack(mix_partners(batch, images, torch.device("cpu")))
    for place in places:
        assert torch.equal(place.sort().values, torch.arange(batch))
    assert all(len(set(row)) == images for row in places.T.tolist())


@given(st.integers(2, 17), st.integers(2, 4))
def test_a_whole_batch_mixes_like_its_parts(groups: int, images: int) -> None:
    """Rows of 2B samples on one rank are those of B samples on each of two ranks, where B is a multiple of the mix."""
    half = groups * images
    whole = torch.stack(mix_partners(2 * half, images, torch.device("cpu")))
    own = torch.stack(mix_partners(half, images, torch.device("cpu")))
    assert torch.equal(whole, torch.cat([own, own + half], dim=1))


@settings(max_examples=60)
@given(st.integers(2, 17), st.integers(2, 4), FORMS, st.sampled_from([(4, 4), (3, 3), (6, 5)]))
def test_masks_of_a_mix_cover_every_patch_exactly_once(
    batch: int, images: int, form: str, grid: tuple[int, int]
) -> None:
    images = min(images, batch)
    patches = grid[0] * grid[1]
    inputs = mixed(images, torch.arange(batch) * 31, grid, form=form)
    for row in range(batch):
        shown = torch.cat([spec.visible_BL[spec.image_of_row_B[row]] for spec in inputs])
        assert torch.equal(shown.sort().values, torch.arange(patches))
    for spec in inputs:
        assert abs(spec.visible_BL.shape[1] - patches / images) < 1
        assert torch.equal(spec.row_of_image_B[spec.image_of_row_B], torch.arange(batch))
        both = torch.cat([spec.visible_BL, spec.hidden_BM], dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(patches).expand(batch, -1))


# ---------------------------------------------------------------- small ones


def test_normalize_is_the_usual_one() -> None:
    run = tiny_run("mae")
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = run.data.augment.mean, run.data.augment.std
    wanted = [(value / 255 - m) / s for value, m, s in zip((0, 128, 255), mean, std, strict=True)]
    torch.testing.assert_close(normalize(images, mean, std).flatten(), torch.tensor(wanted))


def test_gather_tokens_picks_rows_per_sample() -> None:
    tokens = torch.arange(24.0).view(2, 4, 3)
    picked = gather_tokens(tokens, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(picked, torch.stack([tokens[0, [3, 0]], tokens[1, [1, 1]]]))


# ---------------------------------------------------------------- cells


@given(SEEDS, FORMS, st.sampled_from([2, 4]), st.integers(2, 4), st.integers(2, 4), st.sampled_from([0.25, 0.5, 0.75]))
def test_masks_of_cells_hide_whole_squares(seeds, form: str, cell: int, rows: int, columns: int, ratio: float) -> None:
    grid = (rows * cell, columns * cell)
    coarse, fine = one_masked(ratio, form, seeds, (rows, columns)), one_masked(ratio, form, seeds, grid, cell)
    for coarse_BL, fine_BL in ((coarse.visible_BL, fine.visible_BL), (coarse.hidden_BM, fine.hidden_BM)):
        assert torch.equal(fine_BL, fine_BL.sort(dim=1).values)
        for shown, squares in zip(fine_BL, coarse_BL, strict=True):
            wanted = torch.zeros(rows, columns, dtype=torch.bool)
            wanted.view(-1)[squares] = True
            found = torch.zeros(grid, dtype=torch.bool)
            found.view(-1)[shown] = True
            assert torch.equal(found, wanted.repeat_interleave(cell, 0).repeat_interleave(cell, 1))


@given(SEEDS.filter(lambda seeds: len(seeds) > 1), FORMS)
def test_images_of_a_mix_cover_the_grid_in_cells(seeds, form: str) -> None:
    inputs = mixed(2, seeds, (4, 6), 2, form)
    by_row = torch.cat([spec.visible_BL[spec.image_of_row_B] for spec in inputs], dim=1)
    assert torch.equal(by_row.sort(dim=1).values, torch.arange(24).expand(len(seeds), -1))


def test_masks_of_beit_have_one_ratio() -> None:
    """They are drawn for it: the smaller masks of a range would be nearly random patches."""
    with pytest.raises(ValidationError, match="beit_blocks"):
        MaskSpec.model_validate({"form": "beit_blocks", "ratio": [0.1, 0.6], "masked": "mask_token"})
