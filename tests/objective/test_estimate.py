"""Joint distributions whose information is known: the figures are never above it, and nearer to it with training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from m3i_scale.objective.diagnostics import gaussian_information, gaussian_moments
from m3i_scale.objective.distributions import unit
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.targets.category import BoltzmannClasses
from m3i_scale.objective.targets.text import BernoulliPairs, BoltzmannPairs, gather_targets

RANKS = SingleProcess()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and three standard errors."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), 3 * float(x.std()) / math.sqrt(len(values))


def information(prediction: Tensor, target: Tensor) -> float:
    moments = gaussian_moments(prediction, target, RANKS)
    assert moments is not None
    return gaussian_information(moments)


# ---------------------------------------------------------------- discrete channel

CLASSES, ERROR = 6, 0.3
CHANNEL_TRUTH = math.log(CLASSES) + (1 - ERROR) * math.log(1 - ERROR) + ERROR * math.log(ERROR / (CLASSES - 1))
"""H(Y) − H(Y|X) of a symmetric channel with uniform input."""


def channel(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, CLASSES, (count,), generator=generator)
    wrong = (x + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    y = torch.where(torch.rand(count, generator=generator) < ERROR, wrong, x)
    return nn.functional.one_hot(x, CLASSES).float(), y


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_bound_of_a_discrete_channel_rises_to_the_truth_and_not_above(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Linear(CLASSES, CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def measure() -> tuple[float, float]:
        batches = (channel(512, generator) for _ in range(40))
        every = torch.ones(512, dtype=torch.bool)
        return mean_and_error(
            [float(BoltzmannClasses(label_smoothing=smoothing).loss(model(x), y, every, RANKS)[1]) for x, y in batches]
        )

    before = measure()[0]
    for _ in range(300):
        x, y = channel(512, generator)
        optimizer.zero_grad()
        BoltzmannClasses(label_smoothing=smoothing).loss(model(x), y, torch.ones(512, dtype=torch.bool), RANKS)[
            0
        ].backward()
        optimizer.step()
    after, error = measure()
    assert before < after - 0.3
    assert after - error <= CHANNEL_TRUTH
    assert after > 0.95 * CHANNEL_TRUTH - (0.1 if smoothing else 0.0)


# ---------------------------------------------------------------- correlated Gaussians

DIMENSIONS, RHO = 3, 0.8
GAUSSIAN_TRUTH = -DIMENSIONS / 2 * math.log(1 - RHO**2)


def gaussians(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, noise = (torch.randn(count, DIMENSIONS, generator=generator) for _ in range(2))
    return x, RHO * x + math.sqrt(1 - RHO**2) * noise


class Towers(nn.Module):
    """Both sides onto the sphere, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.ModuleList(
            [nn.Sequential(nn.Linear(DIMENSIONS, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)]
        )
        self.log_scale, self.bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), -3.0))

    def forward(self, kind: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        one, other = unit(self.sides[0](x)), unit(self.sides[1](y))
        count = len(x)
        targets = gather_targets(other, torch.arange(1, count + 1), torch.ones(count, dtype=torch.bool), RANKS)
        if kind == "bernoulli":
            return BernoulliPairs().loss(one, targets, self.log_scale.exp(), self.bias, RANKS)
        return BoltzmannPairs().loss(one, targets, self.log_scale.exp(), None, RANKS)


@pytest.mark.parametrize(("kind", "share"), [("boltzmann", 0.8), ("bernoulli", 0.6)])
def test_the_bound_of_pairs_rises_towards_the_truth_and_not_above(kind: str, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    towers = Towers()
    optimizer = torch.optim.Adam(towers.parameters(), lr=5e-3)

    def measure() -> tuple[float, float]:
        with torch.no_grad():
            return mean_and_error([float(towers(kind, *gaussians(128, generator))[1]) for _ in range(60)])

    before = measure()[0]
    for _ in range(400):
        optimizer.zero_grad()
        towers(kind, *gaussians(128, generator))[0].backward()
        optimizer.step()
    after, error = measure()
    assert before < after - 0.3
    assert after - error <= GAUSSIAN_TRUTH
    assert after > share * GAUSSIAN_TRUTH


def test_the_estimate_of_a_gaussian_is_its_information() -> None:
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS, generator=generator))[0] * torch.tensor([1.0, 3.0, 0.2])
    found = {"perfect": [], "half": [], "none": []}
    for _ in range(60):
        x, y = gaussians(2000, generator)
        for name, prediction in (("perfect", RHO * x), ("half", 0.5 * RHO * x), ("none", torch.zeros_like(x))):
            found[name].append(information(prediction @ turn, y @ turn))
    value, error = mean_and_error(found["perfect"])
    assert value == pytest.approx(GAUSSIAN_TRUTH, abs=error + 0.005)
    # Errors of 1 − ρ² + ρ²/4 a dimension.
    half = -DIMENSIONS / 2 * math.log(1 - RHO**2 + RHO**2 / 4)
    assert mean_and_error(found["half"])[0] == pytest.approx(half, abs=0.02)
    assert mean_and_error(found["none"])[0] < 0.01


def test_the_estimate_counts_no_direction_without_variance_and_survives_few_rows_and_nan() -> None:
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(3))
    flat = torch.cat([x, torch.zeros(400, 2)], dim=1)
    assert information(torch.zeros_like(flat), flat) < 0.1
    assert gaussian_moments(x[:19], x[:19], RANKS) is None
    assert math.isnan(information(x * torch.nan, x))


def test_a_decomposition_that_does_not_converge_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert math.isnan(information(torch.zeros(40, 4), torch.randn(40, 4)))


def test_the_leading_components_count_and_prediction_and_target_are_not_alike() -> None:
    generator = torch.Generator().manual_seed(4)
    x, noise = (torch.randn(60, 40, generator=generator) for _ in range(2))
    target = torch.cat([10 * (x[:, :1] + 0.1 * noise[:, :1]), 0.01 * noise[:, 1:]], dim=1)
    prediction = torch.cat([10 * x[:, :1], torch.zeros(60, 39)], dim=1)
    # 60 rows are enough for three of 40 components: the first holds ½ ln(1.01 / 0.01).
    found = information(prediction, target)
    assert found == pytest.approx(0.5 * math.log(101), abs=0.5)
    shifted = information(prediction + 5.0, target)  # an offset is an error
    assert shifted < found - 1.0
    wide = torch.cat([3 * prediction[:, :1], prediction[:, 1:]], dim=1)
    assert information(target, wide) != pytest.approx(found, abs=0.1)
