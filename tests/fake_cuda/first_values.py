"""Initialize models on a GPU that does nothing, and print the device of every random draw, as JSON.

Run with the library of `fake_library.py` preloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from deepspeed.accelerator import get_accelerator
from tiny import DINOV2, LABEL_SETS, VOCABULARY, tiny_run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3i_scale.engine.partition import construct, initialize_sharded
from m3i_scale.objective.build import build_objective, initialize_module


class Draws(TorchDispatchMode):
    """Collects the devices on which random operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.devices += [leaf.device.type for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return output


def main() -> None:
    models: dict[str, dict[str, list[str]]] = {}
    # torch reads values there, to draw again the ones that are out of bounds.
    draw = torch.no_grad()(lambda tensor, *_, **__: tensor.normal_())
    normal = mock.patch.object(torch.nn.init, "_no_grad_trunc_normal_", draw)
    cuda = mock.patch.object(type(get_accelerator()), "current_device_name", return_value="cuda:0")
    for name, overrides in {"vit": (), "dinov2": DINOV2}.items():
        run = tiny_run("m3i", *overrides)
        with FakeTensorMode(allow_non_fake_inputs=True), cuda, normal:
            objective = construct(lambda run=run: build_objective(run, LABEL_SETS, VOCABULARY), {})
            built = sorted({parameter.device.type for parameter in objective.parameters()})
            with Draws() as draws:
                initialize_sharded(objective, initialize_module, seed=0, skip=("momentum.",))
        initialized = sorted({parameter.device.type for parameter in objective.parameters()})
        models[name] = {"built": built, "drawn": sorted(set(draws.devices)), "initialized": initialized}
    print(json.dumps(models))


if __name__ == "__main__":
    main()
