"""Find which parameters are gathered when under ZeRO-3: DeepSpeed's coordinator (`partitioned_param_coordinator.py`),
replayed on sizes.

A module's parameters are gathered when it runs, the next ones ahead of it; they are released after it, unless they are
small (persistent) or come again soon. A gather takes the flat buffer of all shards and a tensor for every parameter.

With second copies (`zero_hpz_partition_size`) a released parameter leaves a shard for its group of ranks behind, and is
gathered from there until the optimizer, or the momentum target, has changed it.
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
    """Holds a gathered parameter."""

    handle: int
    uses: int = 1
    """The parameter itself, or all that lie in it, and views that the backward pass holds."""


@dataclass(eq=False)
class _Gather:
    """Holds a gather that has begun: its flat buffer lives until the last of its parameters has been fetched."""

    flat: int
    waiting: set[int]
    params: list[int]
    shared: _Storage | None = None
    """What the parameters lie in that an all-reduce fetches: the flat buffer itself."""
    complete: bool = False


class _Prefetch:
    """Holds what `__params_to_release` looks through: the modules that follow, with the parameters of their children
    where a leaf is released, and their own where another module is, whatever they are themselves."""

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
        """Return whether a parameter is used within so many elements from `step` on."""
        uses = self.uses[param]
        index = bisect_left(uses, step)
        return index < len(uses) and self.passed[uses[index]] - self.passed[step] < distance


@dataclass
class Coordinator:
    """Gathers and releases parameters, for one rank."""

    parameters: tuple[Parameter, ...]
    modules: tuple[Module, ...]
    settings: Settings
    ledger: Ledger
    shards: Ledger
    """Where shards of parameters lie: the same, or that of host memory."""
    told: Callable[[Collective, int, int, int], None] = lambda way, size, calls, parameters: None
    """Called at gathers: from where they are, their bytes, how many they are, of how many parameters."""
    order: list[int] = field(default_factory=list)
    """Modules in the order of their use in one iteration; empty while DeepSpeed still records it."""
    _full: dict[int, _Storage] = field(default_factory=dict)
    _inflight: dict[int, _Gather] = field(default_factory=dict)
    _active: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    _views: dict[int, _Storage] = field(default_factory=dict)
    _second: dict[int, int] = field(default_factory=dict)
    _expected: list[tuple[int, int]] = field(default_factory=list)
    """Parameters in the order of their use, with its step."""
    _queue: deque[tuple[int, int]] = field(default_factory=deque)
    """What is left of these in an iteration."""
    _latest: dict[int, int] = field(default_factory=dict)
    _ahead: dict[bool, _Prefetch] = field(default_factory=dict)
    """What the release of a leaf sees ahead, and that of another module."""
    _step: int = 0
    _available: int = 0

    def follow(self, order: list[int]) -> None:
        """Gather ahead from now on, in the order of an iteration that has been recorded."""
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
        """Gather what `module` needs, which is about to run, forwards or backwards."""
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
        """Release what `module` needed, which has run."""
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
        """Gather small parameters for good, as after the optimizer."""
        small = [param for param in range(len(self.parameters)) if self._persists(param)]
        if small:
            # `_allgather_params_coalesced` is one call for each of them, at a time.
            self._gather_from(small, "all ranks", calls=len(small))
            for param in [param for param in small if param in self._inflight]:
                self._wait(param)

    def changed(self, param: int) -> None:
        """Drop the second copy of a parameter that has been changed."""
        if param in self._second:
            self.shards.free(self._second.pop(param))

    def keep(self, param: int, number: int) -> None:
        """Note that the backward pass holds a view of a gathered parameter."""
        storage = self._full.get(param)
        if storage is not None:
            storage.uses += 1
            self._views[number] = storage

    def drop(self, number: int) -> None:
        """Note that the backward pass no longer holds the view."""
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
        """Follow `__all_gather_params_`: those with a second copy by themselves. One alone is always gathered."""
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
        elif self.settings.on_host:  # gloo collects into a buffer of its own
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
        """Take the module's parameters off the queue, and gather the next ones ahead."""
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
        """Return what of it comes again within the reuse distance, or was passed over ahead of time."""
        if not self.order:
            return set()
        ahead, distance = self._ahead[module.leaf], self.settings.max_reuse
        return {
            param
            for param in module.fetched
            if self._latest.get(param, -1) > self._step or ahead.comes_again(param, self._step, distance)
        }

    def copy(self, param: int) -> None:
        """Follow `_partition_param_sec`: what is partitioned leaves a second copy, unless there is one."""
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
