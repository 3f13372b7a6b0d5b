"""Two ranks, one of which has no object, train the same detector under ZeRO-1 and ZeRO-2, and compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detector_ranks import STAGES, STEPS, Detection, first_weights
from detectors import FOUR_SCENES, batch_of
from launch import TESTS, start_ranks
from safetensors.torch import load_file
from torch import Tensor

from m3i_scale.objective.ranks import SingleProcess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    out = tmp_path_factory.mktemp("detectors")
    job = start_ranks([str(TESTS / "detector_ranks.py"), str(out)], 2, out / "logs")
    assert job.wait() == [0, 0], "\n".join(Path(job.log(rank)).read_text()[-3000:] for rank in (0, 1))
    return {stage: [load_file(out / f"{stage}-rank{rank}.safetensors") for rank in (0, 1)] for stage in STAGES}


@pytest.mark.parametrize("stage", list(STAGES))
def test_both_ranks_take_every_step_to_the_same_weights(told: dict[str, list[dict[str, Tensor]]], stage: str) -> None:
    first, second = told[stage]
    assert first.keys() == second.keys()
    assert len(first) == 5 * STEPS + 2
    assert torch.equal(first["weights"], second["weights"])
    assert all(value.isfinite().all() for value in first.values())
    assert second["0/mask"] == 0 < first["0/mask"]
    assert first["1/mask"] == 0 < second["1/mask"]


@pytest.mark.parametrize("case", ["zero1_cpu_fp32", "rfdetr"])
def test_the_mean_over_ranks_is_the_loss_of_one_and_so_are_gradients(
    told: dict[str, list[dict[str, Tensor]]], case: str
) -> None:
    module = Detection(SingleProcess(), case).train()
    first_weights(module)
    loss, losses = module(*batch_of(FOUR_SCENES))
    loss.backward()
    first, second = told[case]
    norms = [torch.zeros(()) if one.grad is None else one.grad.norm() for one in module.parameters()]
    torch.testing.assert_close(first["gradients"], torch.stack(norms), rtol=1e-3, atol=1e-5)
    for name, loss in losses.items():
        mean = (first[f"0/{name}"] + second[f"0/{name}"]) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-4, atol=1e-5)
