"""What the loop promises its hooks: who is called when, whose vote is whose, and what follows a step that is undone."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m3i_scale.config import LogConfig, OptimConfig, RunConfig
from m3i_scale.data.stream import Account
from m3i_scale.run.data_supply import Fetcher
from m3i_scale.run.hooks import Hook, MicroBatchResult
from m3i_scale.run.trainer import Trainer


class Noting(Hook):
    """Notes what it is called for."""

    def __init__(self, name: str, calls: list[str], *, votes: bool = False, undoes: bool = False) -> None:
        self.name, self.calls, self.votes, self.undoes = name, calls, votes, undoes
        self.voted: bool | None = None

    def vote(self) -> bool:
        return self.votes

    def pre_optimizer_step(self, voted: bool) -> None:
        self.voted = voted

    def post_step(self) -> bool:
        self.calls.append(f"{self.name} post_step")
        return self.undoes

    def on_rewind(self) -> None:
        self.calls.append(f"{self.name} on_rewind")


def hooks(calls: list[str], undoes: str | None = None) -> list[Hook]:
    return [Noting(name, calls, undoes=name == undoes) for name in ("first", "second", "third")]


@pytest.mark.parametrize(
    ("undoes", "expected"),
    [
        (None, ["first post_step", "second post_step", "third post_step"]),
        (
            "second",
            ["first post_step", "second post_step", "first on_rewind", "second on_rewind", "third on_rewind"],
        ),
    ],
)
def test_no_hook_acts_after_the_one_that_has_undone_the_step(undoes: str | None, expected: list[str]) -> None:
    calls: list[str] = []
    trainer: Any = SimpleNamespace(hooks=hooks(calls, undoes), _optimizer_step=lambda: calls.append("step"))
    Trainer.train_step(trainer)
    assert calls == ["step", *expected]


def test_a_hook_that_only_acts_need_not_say_that_nothing_was_undone() -> None:
    class Acts(Hook):
        def post_step(self) -> Any:
            calls.append("acts")

    calls: list[str] = []
    trainer: Any = SimpleNamespace(hooks=[Acts(), *hooks(calls)], _optimizer_step=lambda: None)
    Trainer.train_step(trainer)
    assert calls == ["acts", "first post_step", "second post_step", "third post_step"]


def test_every_hook_hears_of_its_own_vote() -> None:
    voting = [Noting(str(number), [], votes=number == 1) for number in range(3)]
    results = [MicroBatchResult(torch.tensor(loss), {}, ["key"]) for loss in (1.0, 2.0)]
    stream = SimpleNamespace(account=Account(4, 1, 100), stop_if_bad=lambda total, reasons, begun: None)
    state = SimpleNamespace(micro_batches=results, stream=stream)
    trainer: Any = SimpleNamespace(state=state, hooks=voting, fetcher=Fetcher(iter(())))
    Trainer._vote(trainer)
    assert [hook.voted for hook in voting] == [False, True, False]
    assert (state.loss, state.finite) == (1.5, True)


def test_health_is_measured_in_the_last_micro_batch_of_a_step_that_is_logged() -> None:
    module, measured = SimpleNamespace(buffers=list), []
    engine = SimpleNamespace(
        module=module,
        optimizer=SimpleNamespace(param_groups=[]),
        step=lambda: None,
        was_step_applied=lambda: True,
        zero_optimization_stage=lambda: 1,
    )
    stage, timeouts = SimpleNamespace(accumulation=3), SimpleNamespace(end_step=lambda: None)
    trainer: Any = SimpleNamespace(
        run=RunConfig(optim=OptimConfig(steps=3, warmup_steps=0), log=LogConfig(every_steps=2)),
        state=SimpleNamespace(step=0, engine=engine, stage=stage, timeouts=timeouts),
        hooks=[],
        step_times=SimpleNamespace(span=lambda name: nullcontext()),
        heartbeat=SimpleNamespace(at=lambda phase, step: None),
        _micro_batches=lambda: ((None, None, None) for _ in range(3)),
        _micro_batch=lambda batch, step, states: measured.append(module.measure_health),
        _vote=lambda: None,
        _update_ema=lambda: None,
    )
    for _ in range(3):
        Trainer._optimizer_step(trainer)
    assert measured == [*[False] * 3, *[False, False, True], *[False, False, True]]  # and the last step of all
