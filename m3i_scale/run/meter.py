"""Metrics and step times accumulated since the last logged step, reduced over the ranks."""

from __future__ import annotations

import contextlib
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.engine.agree import max_over_ranks, mean_over_ranks
from m3i_scale.host.rank_record import PHASES
from m3i_scale.objective.information import Objective
from m3i_scale.run.callbacks import StepRecord
from m3i_scale.run.flops import Work
from m3i_scale.text import GIB


class StepTimes:
    """Timer by profiler section since the last reset. Time in a nested section does not count in the outer one.

    Every change of section sets a mark. On an asynchronous accelerator, a mark is an event in its stream: it measures
    when the device reaches it, without synchronization.
    """

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        self._host = bool(self._accelerator.is_synchronized_device())
        self._now = "other"
        self.on_change: Callable[[str], object] = lambda phase: None
        """Called at every change of section, except after an error."""
        self.reset()

    def reset(self) -> None:
        """Restart the timer in the current section."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: deque[tuple[str, Any]] = deque()
        self._mark(self._now)

    @contextlib.contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Count the time inside as `phase`, then continue the outer section. After an error `on_change` is not called,
        so that the section of the error stays reported."""
        around = self._now
        self._mark(phase)
        try:
            yield
        except BaseException:
            self._mark(around, changes=False)
            raise
        self._mark(around)

    def end_step(self) -> None:
        """Accumulate the marks that the device has passed, so that they do not pile up between logged steps."""
        while len(self._marks) > 1 and (self._host or self._marks[1][1].query()):
            self._take()

    def shares(self) -> dict[str, float]:
        """Return the fraction of time per section since the last reset. Synchronizes with the device."""
        self._mark(self._now)
        self._accelerator.synchronize()
        while len(self._marks) > 1:
            self._take()
        total = sum(self.seconds.values())
        return {name: value / total if total > 0 else 0.0 for name, value in self.seconds.items()}

    def _mark(self, phase: str, *, changes: bool = True) -> None:
        self._now = phase
        if changes:
            self.on_change(phase)
        if self._host:
            mark: Any = time.perf_counter()
        else:
            mark = self._accelerator.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def _take(self) -> None:
        phase, begin = self._marks.popleft()
        end = self._marks[0][1]
        self.seconds[phase] += end - begin if self._host else begin.elapsed_time(end) / 1e3  # events return ms


class _Sums:
    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: list[tuple[str, Tensor]]) -> None:
        for name, value in figures:
            total = self._totals.get(name)
            self._totals[name] = value.float() if total is None else total + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        if not self._totals:
            return {}
        totals = torch.stack(list(self._totals.values())).tolist()  # a single device synchronization
        return {name: total / self._counts[name] for name, total in zip(self._totals, totals, strict=True)}


class Meter:
    """Running means of one rank. Metrics stay on the device until a step is logged, so that steps do not
    synchronize."""

    def __init__(self, objective: Objective, batch_size: int, work: Work) -> None:
        self.objective = objective
        self.work = work
        self.step_times = StepTimes()
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        self._good, self._left_out = _Sums(), _Sums()
        self._figures: list[tuple[str, Tensor]] = []
        self.gradients: list[tuple[str, Tensor]] = []
        """Names and norms of this step's gradients at the encoder output."""
        self._steps = 0
        self._tokens = 0
        self._micro_batches = self._caption_tokens = 0
        self.step_times.reset()
        self._data_wait_s = 0.0
        self._started = time.perf_counter()

    def add_micro_batch(self, loss: Tensor, figures: dict[str, Tensor], tokens: int, caption_tokens: int = 0) -> None:
        """Add a forward pass. `tokens` counts tokens through the backbone, `caption_tokens` is the padded caption
        length."""
        self._figures += [("loss", loss.detach()), *figures.items()]
        self._tokens += tokens
        self._micro_batches += 1
        self._caption_tokens += caption_tokens

    def add_wait(self, data_wait_s: float) -> None:
        self._data_wait_s += data_wait_s

    def add_gradients(self, scale: float) -> None:
        """Add the gradient norm of every group at the encoder output after a backward pass, divided by `scale`."""
        for name, squared in self.objective.squared_grad_norms.items():
            if squared:
                self.gradients.append((f"{name}/grad_norm", torch.stack(squared).sum().sqrt() / scale))

    def end_step(self, *, applied: bool = True, finite: bool = True) -> None:
        """Add an optimizer step. Gradients of a skipped step are ignored. Losses of a step that is not finite on
        some rank only count if there are no others until the next record."""
        (self._good if finite else self._left_out).add(self._figures)
        if not finite:
            self.objective.host_figures.clear()
        if applied:
            self._good.add(self.gradients)
        self._figures, self.gradients = [], []
        self._steps += 1
        self.step_times.end_step()

    def record(self, same: Mapping[str, float | None], *, step: int, world_size: int, quarantined: int) -> StepRecord:
        """Return the means since the last record over all ranks, without `HostFigures`. Every rank must call it. `same`
        are further metrics, the same on every rank; those that are None are left out."""
        of_rank = self._good.means() or self._left_out.means()
        steps = max(self._steps, 1)
        step_s = (time.perf_counter() - self._started) / steps
        counts = {
            "tokens": self._tokens / steps,
            "quarantined": float(quarantined),
            "captions": self._caption_tokens / max(self._micro_batches, 1),
        }
        means, shares, sums = _means_over_ranks(of_rank, self.step_times.shares(), counts)
        peaks = max_over_ranks({"memory": _memory_gib(), "wait": self._data_wait_s / steps, "step_s": step_s})
        step_s = peaks["step_s"]
        figures = {"loss": means["loss"], **{name: value for name, value in same.items() if value is not None}}
        figures |= {
            "samples": step * self.batch_size,
            "quarantined": round(sums["quarantined"] * world_size),
            "time/step": step_s,
            "time/data_wait": peaks["wait"],
            "time/data_wait_share": peaks["wait"] / step_s,
            "throughput/samples_per_s": self.batch_size / step_s,
            "throughput/tokens_per_s": sums["tokens"] * world_size / step_s,
            "memory_gib": peaks["memory"],
        }
        figures |= {f"time/{name}": share * step_s for name, share in shares.items()}
        figures["perf/flops_per_s"] = self.work.step_flop(sums["captions"]) / step_s
        mfu = figures["perf/flops_per_s"] / (self.work.peak.tflops * 1e12 * world_size)
        if mfu <= 1:  # otherwise the peak is wrong
            figures["perf/mfu"] = mfu
        self.reset()
        targets = tuple(target.name for target in self.objective.recipe.targets)
        return StepRecord(step, targets, figures).with_figures(means)


def _means_over_ranks(*parts: dict[str, float]) -> list[dict[str, float]]:
    """Average several dicts over the ranks in one collective."""
    joined = {f"{number}/{name}": value for number, part in enumerate(parts) for name, value in part.items()}
    means = mean_over_ranks(joined)
    return [{name: means[f"{number}/{name}"] for name in part} for number, part in enumerate(parts)]


def _memory_gib() -> float:
    """Return the peak memory of the accelerator in GiB, or of the process on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(accelerator.max_memory_allocated()) / GIB
