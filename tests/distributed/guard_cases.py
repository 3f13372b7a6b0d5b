"""Cases about steps that are not finite on one rank: nothing moves on any rank, and the next step is as if they had not
been."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from lasting_cases import Collectives
from rank_parts import RankParts
from torch import Tensor, nn

from m3i_scale.config import GuardConfig
from m3i_scale.data.stream import Account
from m3i_scale.engine.engine import spread_nonfinite, take_step, undone_if_skipped
from m3i_scale.errors import UserError
from m3i_scale.run.data_supply import Fetcher
from m3i_scale.run.hooks import MicroBatchResult, Preemption
from m3i_scale.run.hooks.guard import Guard
from m3i_scale.run.setup import start_engine
from m3i_scale.run.trainer import Trainer

QUEUE, BALANCE = ("densecl",), ("m3i", "recipe.balance={kind: gradient_norm, momentum: 0.5}")
NONFINITE = {
    "zero1_bf16": BALANCE,
    "zero1_cpu_fp32": QUEUE,
    "zero2_bf16": QUEUE,
    "zero2_fp32": BALANCE,
    "zero3_cpu": QUEUE,
    "zero3_cpu_fp32": BALANCE,
}
"""DeepSpeed files (the stages in bf16 and fp32) with recipes that have an EMA teacher and remember something."""
FAULTS = ("loss", "gradient")


class GuardCases(RankParts):
    """One method per case."""

    def nonfinite(self, ds_config: str) -> dict[str, Any]:
        """What has moved in bad steps, and what is different after a good step that follows."""
        with_faults, without = (self._steps(ds_config, faults) for faults in (FAULTS, ()))
        after, plain = with_faults.pop("after"), without["after"]
        different = [name for name, value in plain.items() if not torch.equal(value, after[name])]
        return with_faults | {"different_after": different, "good_steps_moved": without["moved_at_all"]}

    def _steps(self, ds_config: str, faults: tuple[str, ...]) -> dict[str, Any]:
        plan = self.plan("zero1_cpu_fp32" if ds_config == "zero2_fp32" else ds_config, *NONFINITE[ds_config])
        if ds_config == "zero2_fp32":
            plan.deepspeed.config["zero_optimization"]["stage"] = 2
        engine, momentum = start_engine(plan, self.ranks)
        assert momentum is not None

        def kept() -> dict[str, Tensor]:
            values = {k: self._master(p).clone() for k, p in engine.module.named_parameters() if p.requires_grad}
            values |= {f"momentum {name}": value for name, value in self._averages(momentum).items()}
            values |= {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
            for number, state in enumerate(engine.basic_optimizer.state.values()):
                values |= {f"{number} {k}": v.clone() for k, v in state.items() if torch.is_tensor(v)}
            return values

        def step(seed: int, fault: str | None = None) -> bool:
            with undone_if_skipped(engine, engine.module), self._gradient_fault(engine.module, fault):
                loss, _ = engine(self.batch(seed))
                if fault == "loss" and self.rank == self.world - 1:
                    loss = loss + torch.nan  # with a gradient that is finite
                engine.backward(spread_nonfinite(loss))
                engine.module.after_backward()
                take_step(engine)
            if engine.was_step_applied():
                momentum.update(0.9)
            return bool(engine.was_step_applied())

        first = kept()
        good = [step(0), step(1)]
        before = kept()
        moved_at_all = [name for name, value in first.items() if not torch.equal(value, before[name])]
        skipped, moved = [], []
        for fault in faults:
            skipped.append(not step(7, fault))
            moved += [name for name, value in kept().items() if not torch.equal(value, before[name])]
        good.append(step(2))
        result = {"good": good, "skipped": skipped, "moved": moved, "count": engine.skipped_steps, "after": kept()}
        engine.destroy()
        return result | {"moved_at_all": moved_at_all}

    def _gradient_fault(self, module: nn.Module, fault: str | None) -> AbstractContextManager[Any]:
        """A NaN in the backward pass of the last rank, below the encoder output: the loss is finite."""
        deep = next(child for child in module.student.modules() if type(child).__name__.endswith("Layer"))

        def poison(child: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradient * torch.nan)

        if fault == "gradient" and self.rank == self.world - 1:
            return deep.register_forward_hook(poison)
        return nullcontext()

    def vote(self, nan_here: bool, asked_here: bool) -> Any:
        """The trainer's vote after two micro-batches, and the guard's word, when the last rank alone met something."""
        last = self.rank == self.world - 1
        losses = [1.0, float("nan") if nan_here and last else 2.0]
        seen = [
            MicroBatchResult(torch.tensor(loss), {"text/loss": torch.tensor(loss)}, [f"r{self.rank}m{number}"])
            for number, loss in enumerate(losses)
        ]
        judged: list[tuple[int, ...]] = []
        account = Account(6 * (self.rank + 1), self.rank, 100)
        stream = SimpleNamespace(account=account, stop_if_bad=lambda total, reasons, begun: judged.append(tuple(total)))
        state = SimpleNamespace(micro_batches=seen, stream=stream, ranks=self.ranks, applied=True)

        class Asked(Preemption):
            def vote(self) -> bool:
                return asked_here and last

        trainer = SimpleNamespace(state=state, hooks=[Asked(state)], fetcher=Fetcher(iter(())))
        with (counter := Collectives()):
            Trainer._vote(trainer)
        return {
            "collectives": counter.seen,
            "vote": (state.loss, state.finite, state.stopping),
            "judged": judged,
            "guard": self._guard(state),
        }

    def _guard(self, state: Any) -> dict[str, Any]:
        told: list[dict[str, str]] = []
        run = SimpleNamespace(guard=GuardConfig(max_skipped_in_a_row=2))
        state.resolved = SimpleNamespace(run=run)
        state.callbacks = SimpleNamespace(on_warning=lambda step, fault: told.append(fault), flush=lambda: None)
        state.engine = SimpleNamespace(fp16_enabled=lambda: False)
        state.applied = state.finite
        guard = Guard(state, list)
        error = ""
        for state.step in (7, 8):
            try:
                guard.post_step()
            except UserError as fault:
                error = str(fault)
        return {"told": told, "error": error, "skipped": guard.skipped}
