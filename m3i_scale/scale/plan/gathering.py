"""Simulate when ZeRO-3 gathers parameters: DeepSpeed's coordinator (`partitioned_param_coordinator.py`), using sizes
only.

A module's parameters are gathered when it runs, and the next ones are prefetched. They are released after it, unless
they are small (persistent) or reused soon. A gather allocates the flat buffer of all shards and a tensor for every
parameter.

With second copies (`zero_hpz_partition_size`) a released parameter leaves a shard for its group of ranks. It is
gathered from there until the optimizer, or the EMA update, has changed it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.settings import Parameter, Settings, share
from m3i_scale.scale.plan.trace import Module

Collective = Literal["all ranks", "group", "all-reduce"]
GATHERED, KEPT = "gathered parameters", "gathered parameters kept for the backward pass"
SECOND = "second copies of parameters"


@dataclass(eq=False)
class _Storage:
    """Storage of a gathered parameter."""

    handle: int
    uses: int = 1
    """Number of parameters in the storage, plus views held by the backward pass."""


@dataclass(eq=False)
class _Gather:
    """A gather in progress: its flat buffer lives until the last of its parameters is fetched."""

    flat: int
    waiting: set[int]
    params: list[int]
    shared: _Storage | None = None
    """Storage of parameters fetched by an all-reduce: the flat buffer itself."""
    complete: bool = False


class _Prefetch:
    """The upcoming modules that `__params_to_release` searches. When a leaf is released, each counts with the
    parameters of its children, otherwise without them, whether it is a leaf or not."""

    def __init__(self, parameters: tuple[Parameter, ...], in_order: list[tuple[int, ...]]) -> None:
        self.passed = [0]
        """Elements of the parameters of all modules before a step."""
        self.uses: defaultdict[int, list[int]] = defaultdict(list)
        """Steps that use a parameter."""
        for step, places in enumerate(in_order):
            self.passed.append(self.passed[-1] + sum(parameters[param].numel for param in places))
            for param in places:
                self.uses[param].append(step)

    def comes_again(self, param: int, step: int, distance: int) -> bool:
        """Return whether a parameter is used within `distance` elements from `step` on."""
        uses = self.uses[param]
        index = bisect_left(uses, step)
        return index < len(uses) and self.passed[uses[index]] - self.passed[step] < distance


@dataclass
class Coordinator:
    """Gathers and releases of parameters on one rank."""

    parameters: tuple[Parameter, ...]
    modules: tuple[Module, ...]
    settings: Settings
    ledger: Ledger
    shards: Ledger
    """Ledger of the parameter shards: the same as `ledger`, or host memory."""
    told: Callable[[Collective, int, int, int], None] = lambda way, size, calls, parameters: None
    """Called at gathers with the collective, its bytes, the number of calls, and the number of parameters."""
    order: list[int] = field(default_factory=list)
    """Modules in the order of use in one iteration; empty while DeepSpeed records it."""
    _full: dict[int, _Storage] = field(default_factory=dict)
    _inflight: dict[int, _Gather] = field(default_factory=dict)
    _active: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    _views: dict[int, _Storage] = field(default_factory=dict)
    _second: dict[int, int] = field(default_factory=dict)
    _expected: list[tuple[int, int]] = field(default_factory=list)
    """(parameter, step) in the order of use."""
    _queue: deque[tuple[int, int]] = field(default_factory=deque)
    """The remaining entries of `_expected` in an iteration."""
    _latest: dict[int, int] = field(default_factory=dict)
    _ahead: dict[bool, _Prefetch] = field(default_factory=dict)
    """Lookahead by whether a leaf is released."""
    _step: int = 0
    _available: int = 0

    def follow(self, order: list[int]) -> None:
        """Prefetch from now on, in the order of a recorded iteration."""
        if order == self.order:
            return
        self.order, in_order = order, [self.modules[number] for number in order]
        self._expected = [(param, step) for step, module in enumerate(in_order) for param in module.fetched]
        self._ahead = {
            True: _Prefetch(self.parameters, [module.all for module in in_order]),
            False: _Prefetch(self.parameters, [module.own for module in in_order]),
        }

    def start(self) -> None:
        """Begin a new iteration."""
        self._step, self._available = 0, 0
        self._latest.clear()
        self._queue = deque(self._expected)

    def fetch(self, module: int) -> None:
        """Gather the parameters of `module`, which is about to run, forward or backward."""
        own = self.modules[module].fetched
        missing = [param for param in own if param not in self._full and param not in self._inflight]
        if missing:
            self._gather(missing)
        for param in own:
            self._active[param].add(module)
            if param in self._inflight:
                self._wait(param)
        if self.order:
            self._advance(own)
        self._step += 1

    def release(self, module: int) -> None:
        """Release the parameters of `module`, which has run."""
        own = self.modules[module].fetched
        soon = self._soon(self.modules[module])
        for param in own:
            self._active[param].discard(module)
            if param in self._full and not self._active[param] and not self._persists(param) and param not in soon:
                self._free(param)

    def release_all(self) -> None:
        """Release everything, as before the optimizer."""
        for param in list(self._inflight):
            self._wait(param)
        for param in list(self._full):
            self._active[param].clear()
            self._free(param)

    def gather_persistent(self) -> None:
        """Gather small parameters permanently, as after the optimizer."""
        small = [param for param in range(len(self.parameters)) if self._persists(param)]
        if small:
            # `_allgather_params_coalesced` makes one call per parameter.
            self._gather_from(small, "all ranks", calls=len(small))
            for param in [param for param in small if param in self._inflight]:
                self._wait(param)

    def changed(self, param: int) -> None:
        """Drop the second copy of a changed parameter."""
        if param in self._second:
            self.shards.free(self._second.pop(param))

    def keep(self, param: int, number: int) -> None:
        """Record that the backward pass holds a view of a gathered parameter."""
        storage = self._full.get(param)
        if storage is not None:
            storage.uses += 1
            self._views[number] = storage

    def drop(self, number: int) -> None:
        """Record that the backward pass no longer holds the view."""
        storage = self._views.pop(number, None)
        if storage is not None:
            self._unuse(storage)

    def _persists(self, param: int) -> bool:
        parameter = self.parameters[param]
        return parameter.numel <= self.settings.persistence and parameter.role != "momentum"

    def _bytes(self, param: int, *, padded: bool = False) -> int:
        numel, world = self.parameters[param].numel, self.settings.world
        return (share(numel, world) * world if padded else numel) * self.settings.parameter_bytes

    def _gather(self, params: list[int]) -> None:
        """Follow `__all_gather_params`: parameters with a second copy are gathered separately. A single one is always
        all-gathered."""
        second = [param for param in params if param in self._second]
        rest = [param for param in params if param not in self._second]
        if second:
            self._gather_from(second, "group")
        if rest:
            self._gather_from(
                rest, "all-reduce" if self.settings.fetch_by_all_reduce and len(rest) > 1 else "all ranks"
            )

    def _gather_from(self, params: list[int], way: Collective, *, calls: int = 1) -> None:
        self._available += sum(self.parameters[param].numel for param in params)
        if self.settings.world == 1:  # the shard is the parameter
            for param in params:
                self._full[param] = _Storage(self.ledger.allocate(GATHERED, 0))
            return
        size = sum(self._bytes(param, padded=True) for param in params)
        self.told(way, size, calls, len(params))
        gather = _Gather(self.ledger.allocate(GATHERED, size), set(params), params)
        if way == "all-reduce":
            gather.shared = _Storage(gather.flat, len(params))
        elif self.settings.on_host:  # gloo uses a separate buffer
            self.ledger.allocate_and_free("collectives", size)
        for param in params:
            self._inflight[param] = gather

    def _wait(self, param: int) -> None:
        gather = self._inflight.pop(param)
        if not gather.complete:
            for other in gather.params:
                self._full[other] = gather.shared or _Storage(self.ledger.allocate(GATHERED, self._bytes(other)))
            gather.complete = True
        gather.waiting.discard(param)
        if not gather.waiting and gather.shared is None:
            self.ledger.free(gather.flat)

    def _advance(self, own: tuple[int, ...]) -> None:
        """Remove the module's parameters from the queue and prefetch the next ones."""
        fresh = {param for param in own if self._latest.get(param, -1) < self._step}
        while self._queue and fresh:
            param, step = self._queue.popleft()
            self._latest[param] = step
            fresh.discard(param)
        limit = min(self.settings.max_live - self._available, self.settings.prefetch_bucket)
        ahead: list[int] = []
        numel = 0
        while self._queue and numel < limit:
            param, step = self._queue.popleft()
            self._latest[param] = max(self._latest.get(param, -1), step)
            if param not in self._full and param not in self._inflight and param not in ahead:
                ahead.append(param)
                numel += self.parameters[param].numel
        if ahead:
            self._gather(ahead)

    def _soon(self, module: Module) -> set[int]:
        """Return the module's parameters that are reused within the reuse distance, or were skipped by a prefetch."""
        if not self.order:
            return set()
        ahead, distance = self._ahead[module.leaf], self.settings.max_reuse
        return {
            param
            for param in module.fetched
            if self._latest.get(param, -1) > self._step or ahead.comes_again(param, self._step, distance)
        }

    def copy(self, param: int) -> None:
        """Follow `_partition_param_sec`: a partitioned parameter leaves a second copy, unless there is one."""
        if self.settings.hpz > 1 and param not in self._second:
            self._second[param] = self.shards.allocate(SECOND, self._bytes(param, padded=True) // self.settings.hpz)

    def _free(self, param: int) -> None:
        self.copy(param)
        self._available -= self.parameters[param].numel
        self._unuse(self._full.pop(param))

    def _unuse(self, storage: _Storage) -> None:
        storage.uses -= 1
        if storage.uses == 0:
            self.ledger.free(storage.handle)
        elif storage.uses > 0:
            self.ledger.move(storage.handle, KEPT)
