"""Packages are as large as `budget.toml` says: who grows one raises its number, and says why in CHANGELOG.md."""

from __future__ import annotations

import packages
import pytest

BUDGET = packages.read_toml("budget.toml")
SLACK = {"lines": 100, "files": 1}
"""If a package is smaller than its number by more than this, or by 2 %, the number is lowered."""


@pytest.mark.parametrize("measure", ["lines", "files"])
def test_every_package_is_within_its_budget(measure: str) -> None:
    sizes = {name: getattr(size, measure) for name, size in packages.sizes().items()}
    numbers = BUDGET[measure]
    assert set(numbers) == set(sizes)
    assert {name: size for name, size in sizes.items() if size > numbers[name]} == {}
    assert {name: size for name, size in sizes.items() if numbers[name] - size > max(SLACK[measure], 0.02 * size)} == {}
