"""Packages are as large as `budget.toml` says: who grows one raises its number, and says why in CHANGELOG.md."""

from __future__ import annotations

import packages
import pytest

BUDGET = packages.read_toml("budget.toml")
SLACK = 0.02
"""Of a number. Who makes a package smaller than that lowers its number."""


@pytest.mark.parametrize("measure", ["lines", "files"])
def test_every_package_is_within_its_budget(measure: str) -> None:
    sizes = {name: getattr(size, measure) for name, size in packages.sizes().items()}
    numbers = BUDGET[measure]
    assert set(numbers) == set(sizes)
    assert {name: size for name, size in sizes.items() if size > numbers[name]} == {}
    assert {name: size for name, size in sizes.items() if size < (1 - SLACK) * numbers[name] - 1} == {}
