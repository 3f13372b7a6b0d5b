"""Simulate the memory of DeepSpeed's stage 3, in which every parameter is partitioned, from the start of the engine to
the end of a step. The methods follow the methods of `stage3.py`."""

from __future__ import annotations

from m3i_scale.scale.plan.communication import FETCH, IN_GROUP
from m3i_scale.scale.plan.gathering import Collective, Coordinator
from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.replay import (
    BUCKETS,
    COLLECTIVES,
    GRADIENTS,
    MOMENTUM,
    OF_ROLE,
    OPTIMIZER,
    PARAMETERS,
    WORKSPACE,
    Engine,
)
from m3i_scale.scale.plan.settings import groups_of, momentum_state_bytes, share, share_of


class PartitionedEngine(Engine):
    """A simulation of `stage3.py`, in which every parameter is partitioned over the ranks."""

    def build(self) -> None:
        """Follow `zero.Init`, weight initialization, `_create_fp16_partitions_with_defragmentation`,
        `…_fp32_partitions`."""
        settings, world = self.settings, self.settings.world
        places = self.device if not settings.parameters_on_host else self.host
        shards = {}
        for module in self.trace.modules:
            whole = [self.device.allocate(WORKSPACE, self._bytes(place)) for place in module.fetched]
            for place, handle in zip(module.fetched, whole, strict=True):
                part = OF_ROLE[self.parameters[place].role]
                size = share(self.parameters[place].numel, world) * settings.parameter_bytes
                shards[place] = places.allocate(part, size)
                self.device.free(handle)
        self.phase = "start"
        self.coordinator = Coordinator(
            self.parameters, self.trace.modules, settings, self.device, places, told=self._count_gather
        )
        for place in range(len(self.parameters)):
            self.coordinator.copy(place)
        for number in range(len(self.trace.modules)):  # weight initialization, module by module
            self.coordinator.fetch(number)
            self.coordinator.release_all()
        self._flatten(shards, places)
        self._masters()
        self.device.allocate(BUCKETS, settings.reduce_bucket * settings.communication_bytes)
        total = sum(share(self.parameters[p].numel, world) for p in self.trained)
        self.states.allocate(GRADIENTS, total * settings.accumulation_bytes)
        for place in self.averaged:
            numel = share(self.parameters[place].numel, world)
            self.device.allocate(MOMENTUM, numel * momentum_state_bytes(settings.precision))
        self.order: list[int] = []
        self.filled: list[tuple[int, int | None]] = []

    def local_elements(self, param: int, rank: int) -> int:
        """Return the elements of the rank's shard, without padding."""
        return share_of(self.parameters[param].numel, self.settings.world, rank)

    ema_elements = local_elements

    def _bytes(self, place: int) -> int:
        return self.parameters[place].numel * self.settings.parameter_bytes

    def _flatten(self, shards: dict[int, int], places: Ledger) -> None:
        total = sum(share(self.parameters[p].numel, self.settings.world) for p in self.trained)
        size = total * self.settings.parameter_bytes
        if self.settings.on_host or self.settings.parameters_on_host:
            places.allocate(PARAMETERS, size)
            for place in self.trained:
                places.free(shards[place])
        else:  # copied through CPU memory
            for place in self.trained:
                places.free(shards[place])
            places.allocate(PARAMETERS, size)

    def _masters(self) -> None:
        settings = self.settings
        self.sub_groups = self._sub_groups()
        # Also if parameters have the masters' dtype: DeepSpeed compares a device with its name, and copies.
        for numel in self.sub_groups:
            converted = self.states.allocate(WORKSPACE, numel * settings.master_bytes)
            self.states.allocate(OPTIMIZER, numel * settings.master_bytes)
            self.states.free(converted)
        if settings.optimizer_on_host:
            for numel in self.sub_groups:
                self.host.allocate(GRADIENTS, numel * settings.master_bytes)
        else:
            self.device.allocate_and_free(GRADIENTS, max(self.sub_groups) * settings.master_bytes)

    def _sub_groups(self) -> list[int]:
        """Follow `_create_fp16_sub_groups`."""
        sub_groups = []
        for group in groups_of(self.parameters, self.trained):
            sizes = [share(self.parameters[place].numel, self.settings.world) for place in group]
            if self.settings.sub_group >= sum(sizes):
                sub_groups.append(sum(sizes))
                continue
            size = 0
            for number, numel in enumerate(sizes):
                size += numel
                if size >= self.settings.sub_group or number + 1 == len(sizes):
                    sub_groups.append(size)
                    size = 0
        return sub_groups

    def before_forward(self) -> None:
        """Enable prefetching, except in the first iteration, which is recorded."""
        if self.order:
            self.coordinator.follow(self.order)
        self.coordinator.start()
        self.order = []

    def on_use(self, module: int, kind: str) -> None:
        """Gather or release the module's parameters."""
        if kind == "fetch":
            self.order.append(module)
            self.coordinator.fetch(module)
        else:
            self.coordinator.release(module)

    def _count_gather(self, way: Collective, size: int, calls: int, parameters: int) -> None:
        kind = self.phase if self.phase == "update" else f"gather {self.phase}"
        ways: dict[Collective, tuple[str, int]] = {
            "all ranks": (kind, self.settings.world),
            "group": (IN_GROUP, self.settings.hpz),
            "all-reduce": (FETCH, 0),  # has no pieces
        }
        kind, pieces = ways[way]
        self.traffic.add(kind, size, calls)
        if parameters > calls:  # a single parameter is gathered in place
            self.traffic.pieces += parameters * pieces

    def on_view(self, param: int, number: int, kind: str) -> None:
        """Make saved views keep gathered weights alive, unless DeepSpeed's linear function is on."""
        if self.settings.efficient_linear:
            return
        if kind == "keep":
            self.coordinator.keep(param, number)
        else:
            self.coordinator.drop(number)

    def on_gradient(self, param: int, handle: int, *, first: bool) -> None:
        """Follow `reduce_independent_p_g_buckets_and_remove_grads`."""
        numel, used = self.parameters[param].numel, sum(size for size, _ in self.filled)
        if self.filled and used + numel > self.settings.reduce_bucket:
            self._reduce()
            used = 0
        if used + numel <= self.settings.reduce_bucket:  # copied into the bucket
            self.device.free(handle)
            self.filled.append((numel, None))
        else:
            self.filled.append((numel, handle))

    def _reduce(self) -> None:
        """Follow `__avg_scatter_contiguous_grads`, which reduces the bucket itself, or `reduce_scatter_coalesced`,
        which makes a flat copy unless a single gradient needs no padding."""
        settings, world = self.settings, self.settings.world
        sizes = [numel for numel, _ in self.filled]
        if not settings.reduce_scatter and sum(sizes) <= settings.reduce_bucket:
            self.traffic.add("all-reduce", sum(sizes) * settings.communication_bytes)
            if settings.accumulation_bytes != settings.communication_bytes:
                self.device.allocate_and_free(BUCKETS, sum(sizes) * settings.accumulation_bytes)
            self.filled.clear()
            return
        padded = sum(share(numel, world) * world for numel in sizes)
        self.traffic.add("reduce-scatter", padded * settings.communication_bytes)
        self.traffic.pieces += world * len(sizes)
        alone = len(sizes) == 1 and padded == sizes[0]
        flat = None if alone else self.device.allocate(BUCKETS, padded * settings.communication_bytes)
        if settings.on_host and world > 1:  # gloo reduces a clone
            self.device.allocate_and_free(COLLECTIVES, padded * settings.communication_bytes)
        if settings.accumulation_bytes != settings.communication_bytes:
            self.device.allocate_and_free(BUCKETS, padded // world * settings.accumulation_bytes)
        if flat is not None:
            self.device.free(flat)
        for _, handle in self.filled:
            if handle is not None:
                self.device.free(handle)
        self.filled.clear()

    def after_backward(self, *, first: bool, last: bool) -> None:
        """Reduce the rest of the bucket."""
        if self.filled:
            self._reduce()

    def step(self) -> None:
        """Update one sub-group at a time."""
        settings = self.settings
        self.coordinator.release_all()
        self.norm(max(share(self.parameters[p].numel, settings.world) for p in self.trained))
        for numel in self.sub_groups:
            gradient = None
            if not settings.optimizer_on_host:
                gradient = self.device.allocate(WORKSPACE, numel * settings.accumulation_bytes)
                if settings.accumulation_bytes != settings.master_bytes:
                    converted = self.device.allocate(WORKSPACE, numel * settings.master_bytes)
                    self.device.free(gradient)
                    gradient = converted
            self.take_states(numel)
            if gradient is not None:
                self.device.free(gradient)
        self.phase = "update"
        self.coordinator.gather_persistent()
        for param in (*self.trained, *self.averaged):
            self.coordinator.changed(param)
