"""Cases about collectives: those of a step, those that the plan counts, and those that losses need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rank_parts import GLOBAL_BATCH, RankParts
from tiny import LABEL_SETS, VOCABULARY, first_weights
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.objective.build import build_objective
from m3i_scale.plan.planning import Model, Vocabulary
from m3i_scale.plan.settings import settings_of
from m3i_scale.plan.traffic import collectives_of
from m3i_scale.run.setup import start_engine

COMPARED = ("m3i", "clip", "supervised", "mae", "moco")
COUNTED = ("zero1_bf16", "zero1_cpu_fp32", "zero2_bf16", "zero3_cpu", "zero3_cpu_fp32", "zero3_cpu by all-reduce")
BY_ALL_REDUCE = {
    "stage3_use_all_reduce_for_fetch_params": True,
    "reduce_scatter": False,
    "stage3_param_persistence_threshold": 0,
}
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

    def __init__(self, least_bytes: int = SMALL_BYTES + 1) -> None:
        super().__init__()
        self.least_bytes = least_bytes
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            # A gather has its output first, a reduce-scatter its input second; an all-reduce has a list.
            whole = args[1] if "reduce_scatter" in function._opname else args[0]
            size = sum(tensor.nbytes for tensor in whole) if isinstance(whole, list) else whole.nbytes
            kind = KINDS.get(function._opname, function._opname)
            if kind != "all-reduce" or size >= self.least_bytes:
                self.calls[kind] += 1
                self.bytes[kind] += size
        return function(*args, **(kwargs or {}))


class TrafficCases(RankParts):
    """One method per case."""

    def compared(self, recipe: str) -> dict[str, Any]:
        """Collectives until the student is through, of the forward pass and of the backward pass, of a step that is
        logged too; and the figures of that step that are of all ranks."""
        plan = self.plan("zero3_cpu_fp32", recipe)
        objective = build_objective(plan.run, LABEL_SETS, plan.vocab_size, self.ranks)
        first_weights(objective, plan.run.seed, plan.run.backbone.weight_init)
        told: dict[str, Any] = {}
        for name in ("plain", "logged"):
            objective.measure_health = name == "logged"
            forward, by_span = Sizes(least_bytes=0), Counter[str]()

            @contextmanager
            def count(span: str, forward: Sizes = forward, by_span: Counter[str] = by_span) -> Iterator[None]:
                yield
                by_span[span] = forward.calls.total()

            objective.span = count
            with forward:
                loss, _ = objective(self.batch())
            with Sizes(least_bytes=0) as backward:
                loss.backward()
            told[name] = by_span["forward"], forward.calls.total(), backward.calls.total()
        figures = objective.host_figures.copy()()
        of_all = {name: value for name, value in figures.items() if name.endswith(("nats", "spread"))}
        return told | {"figures": of_all}

    def traffic(self, ds_config: str) -> dict[str, Any]:
        """Of the third step, when DeepSpeed knows the order of modules, with nothing compared between ranks."""
        plan = self.plan(ds_config.partition(" ")[0], "mae", "backbone.activation_checkpointing=every_2")
        if "by all-reduce" in ds_config:
            plan.deepspeed.config["zero_optimization"] |= BY_ALL_REDUCE
        engine, _ = start_engine(plan, self.ranks)
        for seed in (0, 1):
            self._train_step(engine, seed)
        with Sizes() as seen:
            self._train_step(engine, 2)
        engine.destroy()
        settings = settings_of(plan.deepspeed.config, world=self.world, on_host=True)
        model = Model(plan.run, Vocabulary(LABEL_SETS, VOCABULARY, ()), self.world, settings.precision)
        trace = model.trace(plan.run.backbone.activation_checkpointing, GLOBAL_BATCH // self.world)
        planned = collectives_of(model.parameters, trace, settings)
        told: dict[str, Counter[str]] = {"calls": Counter(), "bytes": Counter()}
        for kind, calls in planned.calls.items():
            name = "gather" if kind == "update" or "gather" in kind else kind.removeprefix("fetch by ")
            name = "all-reduce" if name.startswith("all-reduce") else name
            told["calls"][name] += calls
            told["bytes"][name] += planned.bytes[kind]
        return {
            "seen": {"calls": dict(seen.calls), "bytes": dict(seen.bytes)},
            "planned": {key: dict(value) for key, value in told.items()},
        }
