"""Callback that shows progress on stderr: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from m3i_scale.output import wide_console
from m3i_scale.run.callbacks import Callback, RunInfo, StepRecord, flatten
from m3i_scale.text import filled

_SMOOTHING = 0.3  # weight of the newest step time in the ETA
_MOST_GROUPS = 12  # maximum number of groups with individually shown losses


@dataclass(frozen=True)
class _Figures:
    """Metrics of a step, wrapped between metrics at the terminal width."""

    parts: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(filled(self.parts, options.max_width)))


class _Bar(Progress):
    figures = _Figures()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.figures


class ProgressDisplay(Callback):
    """Display of step, ETA and throughput, with group losses, learning rate and data wait fraction below."""

    def __init__(self, console: Console | None = None) -> None:
        """Show on `console`. Default: stderr, because stdout is reserved for `--json`."""
        self.console = console or wide_console(stderr=True, soft_wrap=True)
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._step_s: float | None = None
        """Seconds per logged step; None before the first one."""
        self._moving = False
        self._total_steps = 0
        self._first: tuple[int, float] | None = None
        """First completed step and its time."""

    def on_start(self, run_info: RunInfo) -> None:
        recipe = run_info.config.get("recipe", {})
        balance = recipe.get("balance") or {}
        scheduled = any(isinstance(target.get("weight"), list) for target in recipe.get("targets", []))
        self._moving = scheduled or balance.get("kind", "fixed") != "fixed"
        self._total_steps = run_info.total_steps
        if not self.console.is_terminal:
            return
        self._bar = _Bar(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            redirect_stdout=False,  # stdout output must stay on stdout
        )
        self._task = self._bar.add_task("", total=run_info.total_steps, completed=run_info.start_step, left="ETA -")
        self._bar.start()

    def on_progress(self, step: int) -> None:
        now = time.monotonic()
        if self._bar is not None:
            step_s = self._step_s
            if step_s is None and self._first is not None and step > self._first[0]:  # the first step includes warm-up
                step_s = (now - self._first[1]) / (step - self._first[0])
            self._bar.update(self._task, completed=step)
            if step_s is not None:
                self._bar.update(self._task, left=self._left(step, step_s))
        elif self._first is None and self._step_s is None:
            self._print(f"step {step:,}/{self._total_steps:,}")
        self._first = self._first or (step, now)

    def on_step(self, record: StepRecord) -> None:
        self._step_s = smooth(self._step_s, record.figures["time/step"])
        left = self._left(record.step, self._step_s)
        rate = f"{record.figures['throughput/samples_per_s']:,.1f} samples/s"
        figures = summary(record, moving=self._moving)
        if self._bar is None:
            self._print("  ".join([f"step {record.step:,}/{self._total_steps:,}", left, *figures, rate]))
        else:
            self._bar.figures = _Figures(figures)
            step = max(record.step, int(self._bar.tasks[0].completed))  # a record can arrive some steps late
            self._bar.update(self._task, completed=step, description=rate, left=self._left(step, self._step_s))

    def _left(self, step: int, step_s: float) -> str:
        return f"ETA {timedelta(seconds=round((self._total_steps - step) * step_s))}"

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        figures = flatten(values, "evaluation")
        parts = [f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in figures.items()]
        self._print("  ".join([f"step {step:,}", "evaluation", *parts]))

    def on_warning(self, step: int, warning: dict[str, str]) -> None:
        text = (
            f"step {step:,}  warning: {warning['group']}: {warning['what']} ({warning['why']})\n  fix: {warning['fix']}"
        )
        self.console.print(Text(text, style="yellow"))

    def on_rewind(self, step: int, rewind: dict[str, Any]) -> None:
        """Move the bar back. A warning gives the reason."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def on_end(self, status: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if status == "failed":  # otherwise the run prints what it has saved
            self._print("run failed")

    def _print(self, text: str) -> None:
        self.console.print(Text(text))  # Text disables markup, so names in brackets are printed literally


def smooth(mean_s: float | None, newest_s: float) -> float:
    """Return an exponential moving average of step times that adapts within a few records."""
    return newest_s if mean_s is None else mean_s + _SMOOTHING * (newest_s - mean_s)


def summary(record: StepRecord, *, moving: bool = False) -> tuple[str, ...]:
    """Return the metrics of a step as text, the most important ones first. If loss weights change (`moving`), show
    every group, because the total loss is not comparable."""
    figures = record.figures
    of_groups = {name: figures[f"loss/{name}"] for name in record.targets if f"loss/{name}" in figures}
    losses = ", ".join(
        f"{name} {loss:.4g}" + (f" × {figures[f'loss_weight/{name}']:.3g}" if moving else "")
        for name, loss in of_groups.items()
    )
    if len(of_groups) > _MOST_GROUPS:
        every = of_groups.values()
        losses = f"of {len(of_groups)} groups, each {min(every):.4g} to {max(every):.4g}"
    total = f"loss {figures['loss']:.4g}" + (f" ({losses})" if losses else "")
    parts = [f"loss {losses}" if moving else total]
    if figures["skipped_nonfinite"]:
        parts.append(f"not finite, skipped {figures['skipped_nonfinite']:,}")
    if figures["quarantined"]:
        parts.append(f"quarantined {figures['quarantined']:,}")
    parts += [f"lr {figures['lr']:.2e}", f"data wait {figures['time/data_wait_share']:.0%}"]
    if "perf/mfu" in figures:
        parts.append(f"MFU {figures['perf/mfu']:.1%}")
    return (*parts, f"{figures['throughput/tokens_per_s']:,.0f} tokens/s")
