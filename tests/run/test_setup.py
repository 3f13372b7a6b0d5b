"""What differs between a checkpoint and a run is told field by field."""

import pytest

from m3i_scale.run.setup import _difference


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"width": 64, "depth": 2}, {"width": 64, "depth": 3}, "backbone.depth was 2, and is 3"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 5]}}, "backbone.a.b.1 was 2, and is 5"),
        ({"a": [1]}, {"a": [1, 2]}, "backbone.a was [1], and is [1, 2]"),
        ({}, {"new": True}, "backbone.new was null, and is true"),
        (None, {"width": 64}, 'backbone was null, and is {"width": 64}'),
        ({"name": "a", "x": 1}, {"name": "a", "x": 2}, "backbone.x was 1, and is 2"),
    ],
)
def test_the_field_that_changed_is_named(before, now, told):
    assert _difference("backbone", before, now) == told


def test_recipes_of_other_names_are_told_by_them():
    assert _difference("recipe", {"name": "mae", "x": 1}, {"name": "sim"}) == "recipe was 'mae', and is 'sim'"


def test_many_changes_are_counted():
    before, now = ({str(number): number + shift for number in range(9)} for shift in (0, 1))
    told = _difference("backbone", before, now)
    assert told.count(" was ") == 5
    assert told.endswith("and 4 more")
