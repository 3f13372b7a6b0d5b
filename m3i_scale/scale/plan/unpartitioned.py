"""Simulate the memory of DeepSpeed's stages 1 and 2, with all parameters on every rank, from engine start to the end of
a step. The methods follow DeepSpeed's methods; the docstrings name the files."""

from __future__ import annotations

from collections.abc import Iterator

from m3i_scale.scale.plan.communication import AVERAGED
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
from m3i_scale.scale.plan.settings import groups_of, momentum_state_bytes, share_of

_SENT_AT_ONCE = 500_000_000
"""`elements_per_buffer` of `buffered_allreduce_fallback`: groups are sent together until they exceed this size."""
_ALIGNMENT = 2
"""`nccl_start_alignment_factor`: flat groups are padded to a multiple of it times the number of ranks."""


class UnpartitionedEngine(Engine):
    """A simulation of stages 1 and 2, in which every rank has all parameters."""

    def build(self) -> None:
        """Follow `partition.construct` and `__init__` of the optimizer."""
        kept: dict[int, int] = {}
        self.gathered_averages: list[int] = []
        """Elements of the groups with gathered EMA weights."""
        for place, parameter in enumerate(self.parameters):
            size = parameter.numel * self.settings.parameter_bytes
            kept[place] = self.device.allocate(OF_ROLE[parameter.role], size)
        self.groups = groups_of(self.parameters, self.trained)
        self.flat = [self._padded(sum(self.parameters[p].numel for p in group)) for group in self.groups]
        for group, numel in zip(self.groups, self.flat, strict=True):
            self.device.allocate(PARAMETERS, numel * self.settings.parameter_bytes)
            for place in group:
                self.device.free(kept[place])
            self._master(numel // self.settings.world)
        self._after_groups()
        self._averages(kept)

    def _averages(self, kept: dict[int, int]) -> None:
        """Follow `ShardedEma._lay_out`: every rank averages its part of a group of master weights, and all gather
        the copies of targets used in training."""
        settings, trace = self.settings, self.trace
        computed = {
            place for event in trace.events if event.kind == "fetch" for place in trace.modules[event.owner].fetched
        }
        for group, numel in zip(self.groups, self.flat, strict=True):
            targets = [place for place in self.averaged if self.parameters[place].follows in group]
            if not targets:
                continue
            own = total = sum(self.parameters[place].numel for place in targets)
            if self.divides_averages:
                own, total = numel // settings.world, numel
                if computed.intersection(targets):
                    self.gathered_averages.append(numel)
            self.device.allocate(MOMENTUM, total * settings.parameter_bytes)
            for place in targets:
                self.device.free(kept[place])
            self.device.allocate(MOMENTUM, own * momentum_state_bytes(settings.precision))

    @property
    def divides_averages(self) -> bool:
        """Return whether the EMA weights are sharded like the master weights; in fp32 the parameters themselves are the
        master weights, and every rank has all."""
        return self.settings.world > 1 and self.settings.precision != "fp32"

    def local_elements(self, param: int, rank: int) -> int:
        """Return the elements of a parameter in the rank's shard of its flat group."""
        for group, numel in zip(self.groups, self.flat, strict=True):
            if param in group:
                before = sum(self.parameters[place].numel for place in group[: group.index(param)])
                shard = numel // self.settings.world
                end = min(before + self.parameters[param].numel, (rank + 1) * shard)
                return max(0, end - max(before, rank * shard))
        return 0

    def ema_elements(self, param: int, rank: int) -> int:
        """Return the elements in the rank's shard of the master weights; an even share of replicated parameters."""
        follows = self.parameters[param].follows
        if self.divides_averages and follows is not None:
            return self.local_elements(follows, rank)
        return share_of(self.parameters[param].numel, self.settings.world, rank)

    def _padded(self, numel: int) -> int:
        unit = _ALIGNMENT * self.settings.world
        return -(-numel // unit) * unit

    def _master(self, numel: int) -> None:
        copy = self.device.allocate(WORKSPACE, numel * self.settings.parameter_bytes)
        self.states.allocate(OPTIMIZER, numel * self.settings.master_bytes)
        self.device.free(copy)

    def _after_groups(self) -> None:
        """Allocate nothing more by default."""

    def gather_averages(self) -> None:
        """Follow `ShardedEma.publish`."""
        for numel in self.gathered_averages:
            self.traffic.add(AVERAGED, numel * self.settings.parameter_bytes)

    def gather_groups(self) -> None:
        """Gather updated shards on all ranks, in place; gloo uses a separate buffer."""
        for numel in self.flat:
            self.traffic.add("update", numel * self.settings.parameter_bytes)
            if self.settings.on_host and self.settings.world > 1:
                self.device.allocate_and_free(COLLECTIVES, numel * self.settings.parameter_bytes)


class ZeroEngine(UnpartitionedEngine):
    """A simulation of `stage_1_and_2.py`."""

    def _after_groups(self) -> None:
        settings = self.settings
        largest = max(self.parameters[p].numel for p in self.trained)
        shards = [numel // settings.world for numel in self.flat]
        if settings.optimizer_on_host:
            for numel in shards:
                self.host.allocate(OPTIMIZER, numel * settings.parameter_bytes)  # param_buffer_of_bit16_for_cpu_offload
                self.host.allocate(GRADIENTS, numel * settings.master_bytes)
            self.host.allocate(BUCKETS, largest * settings.parameter_bytes)  # temp_grad_buffer_for_cpu_offload
            self.device.allocate(BUCKETS, largest * settings.parameter_bytes)
        else:
            starting = [self.device.allocate(GRADIENTS, numel * settings.master_bytes) for numel in shards]
            for handle in starting:
                self.device.free(handle)
        self.compact = settings.accumulation_bytes == 4 and settings.parameter_bytes != 4
        self.early = settings.stage == 2 or settings.overlap
        self.own = self._in_partition()
        """Parameters fully or partly in the first rank's partition."""
        self.buckets: list[int] = []
        self.filled = 0
        self.large: list[int] = []
        self.waiting: dict[int, int] = {}
        self.in_bucket: list[int] = []
        self.owned: list[int] = []
        self.accumulated: list[int] = []
        self.partitions: list[int] = []

    def _in_partition(self) -> set[int]:
        places = set()
        for group, numel in zip(self.groups, self.flat, strict=True):
            start, end = 0, numel // self.settings.world
            for place in group:
                if start < end:
                    places.add(place)
                start += self.parameters[place].numel
        return places

    def on_gradient(self, param: int, handle: int, *, first: bool) -> None:
        """Follow `reduce_independent_p_g_buckets_and_remove_grads`, immediately or after the backward pass."""
        if self.early:
            self._put(param, handle)
        elif first or param not in self.waiting:
            self.waiting[param] = handle
        else:  # accumulated into the existing gradient
            self.device.free(handle)

    def _put(self, param: int, handle: int) -> None:
        settings, numel = self.settings, self.parameters[param].numel
        if not self.buckets:
            count = 2 if settings.overlap else 1
            size = settings.reduce_bucket * settings.parameter_bytes
            self.buckets = [self.device.allocate(BUCKETS, size) for _ in range(count)]
        if self.filled + numel > settings.reduce_bucket:
            self._reduce()
        self.filled += numel
        self.in_bucket.append(param)
        if numel > settings.reduce_bucket:
            self.large.append(handle)
        else:
            self.device.free(handle)

    def _reduce(self) -> None:
        """Follow `reduce_ipg_grads`: a flat copy is reduced, and this rank's part is copied out."""
        settings = self.settings
        if not self.filled:
            return
        if self.compact and not self.partitions:
            shards = [numel // settings.world for numel in self.flat]
            self.partitions = [self.device.allocate(GRADIENTS, numel * settings.accumulation_bytes) for numel in shards]
        kind = "all-reduce" if self.early else "all-reduce of the step"
        self.traffic.add(kind, self.filled * settings.communication_bytes)
        flat = self.device.allocate(BUCKETS, self.filled * settings.parameter_bytes)
        if settings.communication_bytes != settings.parameter_bytes:
            self.device.allocate_and_free(BUCKETS, self.filled * settings.communication_bytes)
        self.device.free(flat)
        if not self.compact and not settings.optimizer_on_host:
            self._put_aside()
        for handle in self.large:
            self.device.free(handle)
        self.large.clear()
        self.in_bucket.clear()
        self.filled = 0

    def _put_aside(self) -> None:
        """Follow `copy_grads_in_partition`: copy into a buffer for this rank's partition. On a CPU only its written
        pages take memory."""
        size = self.settings.parameter_bytes
        if self.settings.on_host:
            mine = [param for param in self.in_bucket if param in self.own]
            self.owned += [self.device.allocate(GRADIENTS, self.parameters[param].numel * size) for param in mine]
        elif not self.owned:
            self.owned = [self.device.allocate(GRADIENTS, sum(self.parameters[p].numel for p in self.own) * size)]

    def after_backward(self, *, first: bool, last: bool) -> None:
        """Follow `independent_gradient_partition_epilogue`."""
        if last and not self.early:
            for param in (param for group in self.groups for param in group):  # `reduce_gradients`
                if param in self.waiting:
                    self._put(param, self.waiting.pop(param))
        if self.early or last:
            self._reduce()
        for handle in self.buckets:
            self.device.free(handle)
        self.buckets.clear()
        if self.accumulated:  # accumulated with earlier micro-batches
            self._release(self.owned)
            self.owned, self.accumulated = self.accumulated, []
        if not last:
            self.accumulated, self.owned = self.owned, []

    def _release(self, handles: list[int]) -> None:
        for handle in handles:
            self.device.free(handle)

    def step(self) -> None:
        """Update one group at a time."""
        settings = self.settings
        self.norm(max(min(self.parameters[p].numel, max(self.flat) // settings.world) for p in self.trained))
        for number, numel in enumerate(self.flat):
            shard = numel // settings.world
            gradient = None
            if settings.optimizer_on_host:
                pass
            elif self.compact:
                gradient = self.partitions[number]
            else:
                gradient = self.device.allocate(GRADIENTS, shard * settings.parameter_bytes)
                if settings.master_bytes != settings.parameter_bytes:
                    converted = self.device.allocate(GRADIENTS, shard * settings.master_bytes)
                    self.device.free(gradient)
                    gradient = converted
            self.take_states(shard)
            if gradient is not None:
                self.device.free(gradient)
        if self.compact and settings.optimizer_on_host:
            for handle in self.partitions:
                self.device.free(handle)
        self.partitions = []
        self._release(self.owned)
        self.owned = []
        self.gather_groups()
        self.gather_averages()


class Bf16Engine(UnpartitionedEngine):
    """A simulation of `bf16_optimizer.py`: stage 1 in bf16 with fp32 gradients, unpartitioned on every rank."""

    def _master(self, numel: int) -> None:
        super()._master(numel)
        self.device.allocate(GRADIENTS, numel * self.settings.world * self.settings.accumulation_bytes)

    def _after_groups(self) -> None:
        self.kept: set[int] = set()

    def on_gradient(self, param: int, handle: int, *, first: bool) -> None:
        """Keep 16-bit gradients allocated: they are zeroed after the step, not freed."""
        if param in self.kept:
            self.device.free(handle)
        self.kept.add(param)

    def after_backward(self, *, first: bool, last: bool) -> None:
        """Follow `update_hp_grads`, then `buffered_allreduce_fallback`: groups of gradients that are sent together are
        concatenated in a copy, and copied again in the communication dtype."""
        settings = self.settings
        self.device.allocate_and_free(
            WORKSPACE, max(self.parameters[p].numel for p in self.trained) * settings.accumulation_bytes
        )
        if not last:
            return
        for groups in self._sent_together():
            numel = sum(groups)
            self.traffic.add("all-reduce of the step", numel * settings.communication_bytes)
            copy = self.device.allocate(BUCKETS, numel * settings.accumulation_bytes) if len(groups) > 1 else None
            if settings.communication_bytes != settings.accumulation_bytes:
                self.device.allocate_and_free(BUCKETS, numel * settings.communication_bytes)
            if copy is not None:
                self.device.free(copy)

    def _sent_together(self) -> Iterator[list[int]]:
        """Yield the sizes of groups of gradients that share one all-reduce (`allreduce_no_retain`)."""
        groups: list[int] = []
        for numel in self.flat:
            groups.append(numel)
            if sum(groups) > _SENT_AT_ONCE:
                yield groups
                groups = []
        if groups:
            yield groups

    def step(self) -> None:
        """Update this rank's shard of every group."""
        for numel in self.flat:
            self.take_states(numel // self.settings.world)
        self.gather_groups()
        self.gather_averages()
