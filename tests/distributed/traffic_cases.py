"""A case about collectives: those of a step, and those that the plan counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rank_parts import GLOBAL_BATCH, RankParts
from tiny import LABEL_SETS, VOCABULARY
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.run.planning import Model, Vocabulary
from m3i_scale.run.setup import start_engine
from m3i_scale.scale.plan.engines import engine_for
from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.settings import settings_of

COUNTED = ("zero1_bf16", "zero1_cpu_fp32", "zero2_bf16", "zero3_cpu", "zero3_cpu_fp32")
KINDS = {
    "_allgather_base_": "gather",
    "allgather_": "gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
SMALL_BYTES = 16
"""All-reduces of norms and of votes on overflows, which the plan leaves out, are no larger."""


class Sizes(TorchDispatchMode):
    """Calls of this thread's collectives, and bytes of the whole tensors, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            # A gather has its output first, a reduce-scatter its input second; an all-reduce has a list.
            whole = args[1] if "reduce_scatter" in function._opname else args[0]
            size = sum(tensor.nbytes for tensor in whole) if isinstance(whole, list) else whole.nbytes
            kind = KINDS.get(function._opname, function._opname)
            if kind != "all-reduce" or size > SMALL_BYTES:
                self.calls[kind] += 1
                self.bytes[kind] += size
        return function(*args, **(kwargs or {}))


class TrafficCases(RankParts):
    """One method per case."""

    def traffic(self, ds_config: str) -> dict[str, Any]:
        """Of the third step, when DeepSpeed knows the order of modules, with nothing compared between ranks."""
        plan = self.plan(ds_config, "mae", "backbone.activation_checkpointing=every_2")
        engine, _ = start_engine(plan, self.ranks)
        for seed in (0, 1):
            self._train_step(engine, seed)
        with Sizes() as seen:
            self._train_step(engine, 2)
        engine.destroy()
        settings = settings_of(plan.deepspeed.config, world=self.world, on_host=True)
        model = Model(plan.run, Vocabulary(LABEL_SETS, VOCABULARY, ()), self.world, settings.precision)
        ledger = Ledger()
        trace = model.trace(plan.run.backbone.activation_checkpointing, GLOBAL_BATCH // self.world)
        planned = engine_for(model.parameters, trace, settings, ledger, ledger)
        planned.run(3)
        told: dict[str, Counter[str]] = {"calls": Counter(), "bytes": Counter()}
        for kind, calls in planned.traffic.calls.items():
            name = "gather" if kind == "update" or "gather" in kind else kind.removesuffix(" of the step")
            told["calls"][name] += calls
            told["bytes"][name] += planned.traffic.bytes[kind]
        return {
            "seen": {"calls": dict(seen.calls), "bytes": dict(seen.bytes)},
            "planned": {key: dict(value) for key, value in told.items()},
        }
