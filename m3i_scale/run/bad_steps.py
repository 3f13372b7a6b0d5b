"""Readable reports about non-finite steps: the affected ranks, samples and values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.files import write_json
from m3i_scale.text import listed

FOLDER = "bad_steps"
_LISTED = 8


@dataclass(frozen=True)
class MicroBatchResult:
    """Result of a forward pass, stored until all ranks agree that the step is valid."""

    loss: Tensor
    figures: dict[str, Tensor]
    keys: list[str]


@dataclass(frozen=True)
class RankReport:
    """Part of one rank in a step."""

    rank: int
    losses: list[float]
    groups: list[str]
    """Names of metrics, and of gradients at the encoder output, that are not finite on this rank."""
    keys: list[str]
    """Sample keys of the micro-batches with a non-finite loss, or of all micro-batches if there are none."""

    @property
    def bad(self) -> bool:
        """Return whether any value of this rank is not finite."""
        return bool(self.groups) or not all(map(math.isfinite, self.losses))


def report_of(rank: int, seen: Sequence[MicroBatchResult], gradients: Iterable[tuple[str, Tensor]]) -> RankReport:
    """Return the report of this rank on the micro-batches of a step. `gradients` are names and norms at the encoder
    output. Synchronizes with the device."""
    losses = torch.stack([micro.loss for micro in seen]).tolist()
    bad = [micro for micro, loss in zip(seen, losses, strict=True) if not math.isfinite(loss)]
    figures = [pair for micro in seen for pair in micro.figures.items()]
    groups = dict.fromkeys(name for name, value in [*figures, *gradients] if not math.isfinite(float(value)))
    return RankReport(rank, losses, list(groups), [key for micro in bad or seen for key in micro.keys])


def gather_reports(own: RankReport) -> list[RankReport]:
    """Return the reports of ranks with non-finite values, or of all ranks if there are none. Collective."""
    reports: list[RankReport] = gather_objects(own)
    return [report for report in reports if report.bad] or reports


@dataclass(frozen=True)
class BadStep:
    """Step with a non-finite loss or gradient."""

    step: int
    what: str
    """`loss` or `gradient`."""
    grad_norm: float | None
    """Global gradient norm over all ranks."""
    ranks: list[RankReport]

    @property
    def where(self) -> str:
        """Summarize the affected ranks and groups in one line."""
        if not any(report.bad for report in self.ranks):
            return "no rank by itself: only the sum over the ranks, or layers below the encoder output"
        ranks = [f"rank {r.rank}: {', '.join(r.groups[:_LISTED]) or 'the weighted sum'}" for r in self.ranks]
        return listed(ranks, _LISTED, "; ")

    @property
    def samples(self) -> str:
        """Return the first sample keys of the first rank."""
        return f"samples of rank {self.ranks[0].rank}: {', '.join(self.ranks[0].keys[:_LISTED])} …"


def write_bad_steps(output_dir: Path, step: int, why: str, steps: Iterable[BadStep], records: Iterable[Any]) -> str:
    """Write `output_dir/bad_steps/step-00000100.json` on rank 0, with the last records of metrics.jsonl. Every rank
    must call it. Return the path, or a message that writing failed, which must not hide why the run ends."""
    path = output_dir / FOLDER / f"step-{step:08d}.json"
    content = {"step": step, "why": why, "steps": [asdict(bad) for bad in steps], "records": list(records)}
    message: str = from_rank_0(lambda: _write(path, content))
    return message


def _write(path: Path, content: dict[str, Any]) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        return f"{path} could not be written: {error.strerror}"
    return str(path)
