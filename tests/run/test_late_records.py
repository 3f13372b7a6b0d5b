"""Metrics that take long on the host hold up no step; their record is complete and comes before later events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_records import WORK
from torch import Tensor

from m3i_scale.objective.diagnostics import HostFigures
from m3i_scale.run.callbacks import Callback, CallbackList, StepRecord
from m3i_scale.run.hooks.metrics import Metrics
from m3i_scale.run.meter import Meter


class Noting(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.records: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.events.append(("step", record.step))
        self.records.append(record)

    def on_progress(self, step: int) -> None:
        self.events.append(("progress", step))

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self.events.append(("evaluation", step))

    def on_warning(self, step: int, fault: dict[str, str]) -> None:
        self.events.append(("warning", step))

    def on_end(self, status: str) -> None:
        self.events.append(("end", 0))


class Loop:
    """Steps of a run whose only group is `g`; its metrics of the host wait for `release`."""

    def __init__(self, rank: int = 0) -> None:
        recipe = SimpleNamespace(targets=[SimpleNamespace(name="g")])
        self.objective = SimpleNamespace(
            recipe=recipe, host_figures=HostFigures(), squared_grad_norms={}, token_count=1
        )
        engine = SimpleNamespace(
            module=self.objective,
            optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}]),
            fp16_enabled=lambda: False,
            get_global_grad_norm=lambda: 1.0,
        )
        stream = SimpleNamespace(source_counts=dict, quarantined={})
        self.noting, self.release = Noting(), threading.Event()
        self.state: Any = SimpleNamespace(
            engine=engine,
            stream=stream,
            ranks=SimpleNamespace(rank=rank, world_size=1),
            callbacks=CallbackList([self.noting]),
            stage=SimpleNamespace(accumulation=1),
            step=0,
            lr=1.0,
            ema_decay=None,
            applied=True,
            finite=True,
        )
        guard: Any = SimpleNamespace(skipped=2)
        self.metrics = Metrics(self.state, Meter(self.objective, 8, WORK), guard)

    def step(self, *, logged: bool, std: float = 1.0) -> None:
        if logged:
            self.objective.host_figures.add(self._compute, torch.tensor([std, 2.0]))
        micro_batch = SimpleNamespace(loss=torch.tensor(3.0), figures={"g/loss": torch.tensor(3.0)})
        batch = SimpleNamespace(text_ids_BT=torch.zeros(1, 0))
        self.metrics.post_micro_batch(batch, micro_batch)
        self.state.step, self.state.logged = self.state.step + 1, logged
        self.metrics.post_step()

    def _compute(self, values: Tensor) -> dict[str, float]:
        assert self.release.wait(300)
        return {"health/dense_std": float(values[0]), "g/nats": float(values[1])}


def test_steps_go_on_while_the_host_computes() -> None:
    loop = Loop()
    loop.step(logged=True)
    loop.step(logged=False)
    assert loop.noting.events == [("progress", 2)]  # the record of step 1 is not complete
    loop.release.set()
    loop.state.callbacks.on_end("finished")
    assert loop.noting.events[1:] == [("step", 1), ("end", 0)]
    (record,) = loop.noting.records
    wanted = {"health/dense_std": 1.0, "loss/g": 3.0, "mi/g": 2.0, "information": 2.0, "loss": 3.0}
    wanted["skipped_nonfinite"] = 2
    assert {name: record.figures.get(name) for name in wanted} == wanted
    assert not {"loss_scale", "skipped_steps"} & record.figures.keys()  # of fp16


EVENTS: dict[str, Callable[[Loop], object]] = {
    "evaluation": lambda loop: loop.state.callbacks.on_evaluation(1, {}),
    "warning": lambda loop: loop.state.callbacks.on_warning(1, {}),
    "the next record": lambda loop: (loop.step(logged=True), loop.state.callbacks.flush()),
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_record_comes_before_later_events(event: str) -> None:
    loop = Loop()
    loop.step(logged=True)
    threading.Timer(0.2, loop.release.set).start()
    EVENTS[event](loop)
    assert loop.noting.events[0] == ("step", 1)
    assert len(loop.noting.events) == 2


def test_a_warning_has_the_step_of_its_record() -> None:
    loop = Loop()
    loop.release.set()
    for _ in range(3):  # features that are constant in three records running
        loop.step(logged=True, std=0.0)
    loop.step(logged=False)
    loop.state.callbacks.flush()
    assert ("warning", 3) in loop.noting.events


def test_other_ranks_compute_nothing() -> None:
    loop = Loop(rank=1)
    for _ in range(2):
        loop.step(logged=True)
    loop.state.callbacks.on_end("finished")
    assert loop.objective.host_figures.copy()() == {}
    assert loop.noting.records == []
