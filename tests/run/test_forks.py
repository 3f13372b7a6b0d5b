"""A run has all its processes before it touches an accelerator."""

from __future__ import annotations

from pathlib import Path

from launch import start_ranks
from shapes import write_run


def test_nothing_is_forked_once_an_accelerator_is_touched(shards: Path, tmp_path: Path) -> None:
    """Neither by two evaluations nor by the training itself: one worker for each, before."""
    run_file = write_run(
        tmp_path,
        shards,
        "sim",
        "data.num_workers=1",
        "optim.steps=2",
        "optim.warmup_steps=0",
        f"data.validation.val.path={shards / 'val'}",
        "evaluation.every_steps=1",
        "evaluation.batches=1",
    )
    job = start_ranks([str(Path(__file__).with_name("forking.py")), str(run_file)], 1, tmp_path / "logs")
    assert job.wait() == [0], job.text()[-4000:]
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count('"kind": "evaluation"') == 2
    told = [line for line in job.text().splitlines() if line.startswith("moments:")]  # libraries may say a last word
    assert told == ["moments: fork fork check_first start_ranks"]
