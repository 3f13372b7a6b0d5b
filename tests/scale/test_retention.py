"""Which checkpoint is taken, kept, swept away."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
from checkpoint_files import FILES, flip, save
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from m3i_scale.checkpoint import manifest
from m3i_scale.checkpoint.manifest import newest_good
from m3i_scale.checkpoint.retention import (
    LAST_GOOD,
    Entry,
    entries_of,
    plan_prune,
    prune,
    ranked,
    which_to_keep,
)
from m3i_scale.config import KeepBestConfig, RetentionConfig


def test_newest_good_says_what_it_passed_over(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "nowhere") == (None, [])
    saved = [save(tmp_path, step) for step in (100, 200, 300)]
    flip(saved[1] / "meta.json")
    (saved[2] / "manifest.json").unlink()
    good, passed_over = newest_good(tmp_path)
    assert good == saved[0]
    assert passed_over == [
        (saved[2], "no manifest: the save was not completed"),
        (saved[1], "meta.json: the contents have changed (SHA-256 differs)"),
    ]


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 99_999_999), save(tmp_path, 100_000_000)
    assert older.name > newer.name  # by name it would be the other way round
    assert newest_good(tmp_path)[0] == newer


# ------------------------------------------------------------------ the rules


def entry(step: int, *, good: bool = True, size: int = 10, **metrics: float) -> Entry:
    return Entry(Path(f"step-{step:08d}"), step, size, good, metrics)


def best_of(metric: str, mode: Literal["min", "max"] = "min", count: int = 1) -> KeepBestConfig:
    return KeepBestConfig(metric=metric, mode=mode, count=count)


def rules_with(
    latest: int = 1, every_steps: int | None = None, best: KeepBestConfig | None = None, max_bytes: int | None = None
) -> RetentionConfig:
    max_gib = None if max_bytes is None else max_bytes / 2**30
    return RetentionConfig(keep_latest=latest, keep_every_steps=every_steps, keep_best=best, max_gib=max_gib)


def changed(rules: RetentionConfig, **numbers: Any) -> RetentionConfig:
    now = {"latest": rules.keep_latest, "every_steps": rules.keep_every_steps, "best": rules.keep_best}
    return rules_with(**now | {"max_bytes": rules.max_bytes} | numbers)


def kept(entries: list[Entry], rules: RetentionConfig) -> dict[int, list[str]]:
    return {int(path.name[5:]): reasons for path, reasons in which_to_keep(entries, rules).items()}


def test_every_rule_adds_and_says_so() -> None:
    entries = [entry(step, loss=abs(step - 3) + 1.0) for step in range(1, 9)]
    rules = rules_with(latest=2, every_steps=4, best=best_of("loss", "min", 2))
    assert kept(entries, rules) == {
        8: ["latest 1 of 2", "every 4 steps"],
        3: ["best 1 of 2: loss 1"],
        4: ["best 2 of 2: loss 2", "every 4 steps"],
        7: ["latest 2 of 2"],
    }
    assert set(kept(entries, changed(rules, best=best_of("loss", "max")))) == {8, 7, 4}


@pytest.mark.parametrize("numbers", [{"keep_latest": 0}, {"keep_every_steps": 0}])
def test_numbers_below_one_are_refused_where_they_are_given(numbers: dict[str, int]) -> None:
    with pytest.raises(ValidationError) as refused:
        RetentionConfig(**numbers)  # type: ignore[arg-type]
    assert [fault["loc"] for fault in refused.value.errors()] == [tuple(numbers)]


def test_of_equal_figures_the_newest_is_the_best_and_nan_is_none() -> None:
    entries = [entry(1, loss=math.nan), entry(2, loss=1.0), entry(3, loss=1.0), entry(4, loss=-math.inf), entry(5)]
    assert [found.step for found in ranked(entries, best_of("loss"))] == [3, 2]


def test_what_the_limit_takes_first() -> None:
    entries = [entry(step, loss=float(step)) for step in range(1, 9)]
    rules = rules_with(latest=2, every_steps=3, best=best_of("loss"))
    order = [8, 1, 7, 6, 3]
    for count in range(1, 6):
        assert list(kept(entries, changed(rules, max_bytes=10 * count + 9))) == order[:count]
    assert kept(entries, changed(rules, max_bytes=5)) == {8: ["latest 1 of 2", LAST_GOOD]}


ENTRIES = st.lists(
    st.builds(
        lambda step, good, size, loss: entry(step, good=good, size=size, **({} if loss is None else {"loss": loss})),
        st.integers(1, 60),
        st.booleans(),
        st.integers(1, 50),
        st.none() | st.floats(allow_nan=True, width=16),
    ),
    max_size=12,
    unique_by=lambda found: found.step,
)
RULES = st.builds(
    rules_with,
    latest=st.integers(1, 5),
    every_steps=st.none() | st.integers(1, 20),
    best=st.none() | st.builds(best_of, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
    max_bytes=st.none() | st.integers(1, 300),
)


@settings(max_examples=100)
@given(ENTRIES, RULES)
def test_the_newest_good_one_stays_and_the_limit_holds(entries: list[Entry], rules: RetentionConfig) -> None:
    stay = which_to_keep(entries, rules)
    assert all(stay.values()), "a reason for each"
    good = [found for found in entries if found.good]
    if not good:
        assert set(stay) == {found.path for found in entries}
        return
    newest = max(good, key=lambda found: found.step)
    assert newest.path in stay
    total = sum(found.size for found in entries if found.path in stay)
    if rules.max_bytes is not None and total > rules.max_bytes:
        assert set(stay) == {newest.path}
        assert LAST_GOOD in stay[newest.path]
    else:
        assert all(LAST_GOOD not in reasons for reasons in stay.values())


@settings(max_examples=100)
@given(ENTRIES, RULES)
def test_the_best_stay_unless_the_limit_forbids(entries: list[Entry], rules: RetentionConfig) -> None:
    stay = which_to_keep(entries, changed(rules, max_bytes=None))
    good = [found for found in entries if found.good]
    if rules.keep_best is not None:
        finite = [found for found in good if math.isfinite(found.metrics.get("loss", math.nan))]
        better = min if rules.keep_best.mode == "min" else max
        if finite:
            value = better(found.metrics["loss"] for found in finite)
            assert any(found.path in stay and found.metrics["loss"] == value for found in finite)
    # Only the newest stands before the best: where both fit, both stay.
    if rules.keep_best is not None and good and (order := ranked(good, rules.keep_best)):
        newest = max(good, key=lambda found: found.step)
        limit = newest.size + (order[0].size if order[0] is not newest else 0)
        assert order[0].path in which_to_keep(entries, changed(rules, max_bytes=limit))


@settings(max_examples=100)
@given(ENTRIES, RULES)
def test_a_second_time_nothing_more_goes(entries: list[Entry], rules: RetentionConfig) -> None:
    stay = which_to_keep(entries, rules)
    again = which_to_keep([found for found in entries if found.path in stay], rules)
    assert set(again) == set(stay)


@settings(max_examples=100)
@given(ENTRIES, RULES, st.integers(0, 100), st.integers(0, 3))
def test_more_room_and_wider_rules_keep_no_fewer(
    entries: list[Entry], rules: RetentionConfig, room: int, more: int
) -> None:
    stay = set(which_to_keep(entries, rules))
    if rules.max_bytes is not None:
        assert stay <= set(which_to_keep(entries, changed(rules, max_bytes=rules.max_bytes + room)))
    free = changed(rules, max_bytes=None)
    wide = changed(free, latest=rules.keep_latest + more)
    assert set(which_to_keep(entries, free)) <= set(which_to_keep(entries, wide))
    if rules.keep_best is not None:
        counted = changed(
            free, best=best_of(rules.keep_best.metric, rules.keep_best.mode, rules.keep_best.count + more)
        )
        assert set(which_to_keep(entries, free)) <= set(which_to_keep(entries, counted))


# ------------------------------------------------------------------ on the disk


def removed(root: Path, *given: Any) -> list[Path]:
    return [entry.path for entry in prune(root, *given).removed]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    assert removed(tmp_path, rules_with(latest=5)) == []
    assert removed(tmp_path, rules_with(latest=2)) == [saved[1], saved[0]]
    assert {path.name for path in tmp_path.iterdir()} == {saved[2].name, saved[3].name, "latest"}


def test_prune_knows_sizes_and_figures(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    found = entries_of(tmp_path, {2: {"loss": 1.0}})
    manifest = (saved[0] / "manifest.json").stat().st_size
    assert found[3].size == sum(map(len, FILES.values())) + manifest
    assert [one.metrics for one in found] == [{}, {}, {"loss": 1.0}, {}]
    rules = rules_with(best=best_of("loss"), max_bytes=2 * found[0].size)
    assert removed(tmp_path, rules, {1: {"loss": 2.0}, 2: {"loss": 1.0}, 3: {"loss": 3.0}}) == [saved[2], saved[0]]


def test_prune_never_removes_the_last_good_one(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    flip(saved[2] / "meta.json")
    flip(saved[1] / "meta.json")
    assert removed(tmp_path, rules_with(latest=1)) == []
    assert newest_good(tmp_path)[0] == saved[0]
    flip(saved[0] / "meta.json")
    assert removed(tmp_path, rules_with(latest=1)) == []


def test_a_newest_one_that_does_not_verify_counts_for_no_rule(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    flip(saved[2] / "meta.json")  # sizes are right
    done = prune(tmp_path, rules_with(latest=1))
    assert [entry.path for entry in done.removed] == [saved[0]]
    assert done.kept == {saved[1]: ["latest 1 of 1"], saved[2]: ["not good, and as new as the kept ones"]}


def test_prune_does_not_count_what_is_plainly_broken(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (saved[3] / "meta.json").unlink()
    (saved[1] / "meta.json").unlink()
    assert removed(tmp_path, rules_with(latest=2)) == []
    assert removed(tmp_path, rules_with(latest=1)) == [saved[1], saved[0]]


def test_only_what_lets_something_go_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    read: list[Any] = []
    real = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: read.append(path) or real(path))
    plan_prune(tmp_path, rules_with(latest=3), {})
    plan_prune(tmp_path, rules_with(latest=1), {}, committed=saved[2])
    assert read == []
    assert [one.path for one in plan_prune(tmp_path, rules_with(latest=1), {}).removed] == [saved[1], saved[0]]
    assert {path.relative_to(saved[2]).as_posix() for path in read} == set(FILES)
    assert all(path.exists() for path in saved)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["good", "flipped", "torn"]), min_size=1, max_size=4), RULES)
def test_whatever_is_broken_pruning_leaves_the_newest_good_one(states: list[str], rules: RetentionConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for step, state in enumerate(states, start=1):
            final = save(root, step)
            if state == "flipped":
                flip(final / "meta.json")
            elif state == "torn":
                (final / "manifest.json").write_bytes(b"{")
        before = newest_good(root)[0]
        prune(root, rules, {1: {"loss": 1.0}})
        assert newest_good(root)[0] == before


def test_what_has_a_broken_manifest_goes_too(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (saved[0] / "manifest.json").unlink()
    (saved[1] / "manifest.json").unlink()
    (saved[1] / "manifest.json").symlink_to(saved[3] / "manifest.json")
    (saved[2] / "manifest.json").unlink()
    (saved[2] / "manifest.json").mkdir()
    assert removed(tmp_path, rules_with(latest=1)) == [saved[2], saved[1], saved[0]]
    assert newest_good(tmp_path)[0] == saved[3]
