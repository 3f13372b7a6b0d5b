"""What a checkpoint must bring along, and what it may leave to other files."""

import pytest
import torch
from torch import nn

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.state import fill


def model():
    module = nn.Module()
    module.trained, module.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    module.register_buffer("queue", torch.zeros(3))
    return module


def without(*names):
    return {name: value + 1 for name, value in model().state_dict().items() if name not in names}


def test_frozen_parameters_may_be_missing(tmp_path):
    module = model()
    before = module.frozen.weight.clone()
    fill(module, without("frozen.weight", "frozen.bias"), where=tmp_path)
    assert module.queue.tolist() == [1, 1, 1]
    assert torch.equal(module.frozen.weight, before)


@pytest.mark.parametrize("name", ["trained.bias", "queue"])
def test_nothing_else_may(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"1 tensors .* e.g. {name}"):
        fill(model(), without(name), where=tmp_path)


def test_what_the_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"e\.g\. extra"):
        fill(model(), without() | {"extra": torch.zeros(1)}, where=tmp_path)
