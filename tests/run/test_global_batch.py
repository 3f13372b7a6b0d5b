"""A run whose losses cover all micro-batches of a step is the run with one large micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shapes import metrics, train, write_run

from m3i_scale.checkpoint_tools.consolidate import saved_weights

pytestmark = pytest.mark.slow

STEPS = 3


def test_micro_batches_with_global_losses_train_as_one_large_one(tmp_path: Path, shards: Path) -> None:
    for name, micro, kind in (("large", 8, "micro"), ("joint", 4, "global")):
        settings = (f"optim.micro_batch_size={micro}", f"optim.contrastive_batch={kind}", f"optim.steps={STEPS}")
        # A mix would pair other images. With a small eps, Adam makes full steps of rounding errors.
        run = write_run(tmp_path / name, shards, "m3i_no_mix", *settings, "optim.eps=1e-4", "deepspeed=zero3_cpu_fp32")
        job = train(run)
        assert job.wait(600) == [0], [log.read_text() for log in (tmp_path / name / "logs").glob("*.log")]
    large, joint = (metrics(tmp_path / name / "run.yaml") for name in ("large", "joint"))
    assert set(large) == set(joint) == set(range(1, STEPS + 1))
    for step, line in large.items():
        for key in ("loss", "grad_norm", "loss/text", "loss/intra", "loss/category", "mi/text"):
            assert joint[step][key] == pytest.approx(line[key], rel=1e-3), (step, key)
    checkpoint = Path("out") / "checkpoints" / f"step-{STEPS:08d}"
    one, two = (dict(saved_weights(tmp_path / name / checkpoint, "student")) for name in ("large", "joint"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
