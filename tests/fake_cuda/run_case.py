"""Train a run on the simulated GPU with the real `Trainer`: steps, records, saves, a rewind, and a resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clocks import machine
from cuda_start import WORLD
from engine import simulated
from tiny import LABEL_SETS, VOCABULARY, in_parts
from walk import batch_of, run_of

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.stream import Account
from m3i_scale.engine.deepspeed.resolve import resolve
from m3i_scale.engine.device import pinning
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run import flops
from m3i_scale.run.setup import ResolvedRun
from m3i_scale.run.spike import Spike
from m3i_scale.run.train import start_trainer
from m3i_scale.run.trainer import Trainer

MICRO_BATCH = 4
SPIKE_AT, SHORT, LONG = 3, 2, 4


class _Vocabulary:
    """Stands for a tokenizer of which only the size is asked for."""

    name_or_path = "none"

    def __len__(self) -> int:
        return VOCABULARY


class _Stream:
    """Stands for a `TrainStream`: batches in pinned memory."""

    can_end, samples_at_most, account = False, None, Account(0, 0, 0)

    def __init__(self, run: RunConfig, image_size: int) -> None:
        self._run = run
        self.quarantined: dict[str, int] = {}
        self.resize(image_size, MICRO_BATCH)

    def resize(self, image_size: int, micro_batch_size: int) -> None:
        self._sizes = (image_size, micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        pin = pinning()
        assert pin is not None
        for _ in itertools.count():
            yield batch_of(self._run, *self._sizes).changed(pin)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], changed: object = ()) -> dict[str, str]:
        return {}

    def source_counts(self) -> dict[str, dict[str, float]]:
        return {}

    def stop_if_bad(self, *_: object, **__: object) -> None:
        """All samples are good."""


@dataclass(frozen=True)
class Case:
    """A run to simulate.

    A short one takes two steps and saves both. A long one saves every second one, goes back once, ends, and is resumed.
    """

    model: str
    """A recipe, or a task of `walk.py`."""
    deepspeed: str
    overrides: tuple[str, ...] = ()
    long: bool = False
    accumulation: int = 1
    device_is_ahead: bool = True

    def resolved(self, folder: Path, steps: int) -> ResolvedRun:
        """Return the run of the case, `steps` long."""
        batch = MICRO_BATCH * WORLD * self.accumulation
        saves = f"checkpoint.every_steps={2 if self.long else 1}"
        lengths = (f"optim.steps={steps}", saves, "log.every_steps=100")
        sizes = (f"optim.batch_size={batch}", f"optim.micro_batch_size={MICRO_BATCH}", "optim.warmup_steps=1")
        more = (f"output_dir={folder}", "hardware.peak_tflops=1.0", "log.progress=false")
        guard = "guard.spike={}"
        probe = f"checkpoint.probe={str(self.long).lower()}"
        run = run_of(self.model, *lengths, *sizes, *more, guard, probe, *self.overrides)
        optim, parsed = run.optim, parse_recipe(run.recipe)
        deepspeed = resolve(
            in_parts(self.deepspeed),
            world_size=WORLD,
            batch_size=batch,
            micro_batch_size=MICRO_BATCH,
            clip_grad_norm=optim.clip_grad_norm,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            hidden_size=64,
            where=self.deepspeed,
        )
        labels = LABEL_SETS if run.task is None else {"shapes": LABEL_SETS["shapes"]}
        tokenizer: Any = _Vocabulary() if parsed.uses_text else None
        image_size = run.image_size(backbone_config(run.backbone).image_size)
        resolved = ResolvedRun(run, parsed, labels, tokenizer, image_size, deepspeed, self.accumulation)
        resolved.__dict__["identity"] = {}  # of files that are not there
        return resolved


def simulate(case: Case, folder: Path) -> dict[str, Any]:
    """Return the faults of a run, and what each of its steps asks of the device."""
    machine.device_is_ahead = case.device_is_ahead
    flops.step_flop = lambda run, label_sets, vocab_size: {"model": 1.0, "text": 0.0}
    steps: list[dict[str, Any]] = []
    with simulated():
        first = _trainer(case.resolved(folder, LONG if case.long else SHORT), None, steps)
        if case.long:
            _spike_once(first)
        first.fit()
        if case.long:
            last = folder / "checkpoints" / f"step-{LONG:08d}"
            _trainer(case.resolved(folder, LONG + 1), last, steps).fit()
    return {"steps": steps, "faults": dict(machine.faults)}


def _trainer(resolved: ResolvedRun, resume_from: Path | None, steps: list[dict[str, Any]]) -> Trainer:
    """Return a trainer that notes what its steps ask for."""
    stream: Any = _Stream(resolved.run, resolved.image_size)
    trainer = start_trainer(resolved, ProcessGroupRanks(), [], resume_from, stream, stream)
    take: Callable[[], None] = trainer._optimizer_step

    def take_counted() -> None:
        machine.waits.clear()
        machine.collectives.clear()
        machine.kernels = 0
        take()
        counts = {"waits": dict(machine.waits), "collectives": dict(machine.collectives), "kernels": machine.kernels}
        steps.append({"step": trainer.state.step, "logged": trainer.state.logged, **counts})

    trainer._optimizer_step = take_counted  # type: ignore[method-assign]
    return trainer


def _spike_once(trainer: Trainer) -> None:
    """Have the guard confirm one spike."""
    guard = next(hook for hook in trainer.hooks if hasattr(hook, "spike"))
    judge, left = guard.post_step, [SPIKE_AT]

    def judged() -> bool:
        undone = judge()
        guard.spike = Spike(SPIKE_AT, SPIKE_AT + 1, 9.0, 1.0, 2.0) if left == [trainer.state.step] else None
        if guard.spike is not None:
            left.clear()
        return undone

    guard.post_step = judged  # type: ignore[method-assign]
