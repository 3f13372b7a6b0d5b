"""Replay a recorded micro-batch on one rank's engine, using sizes only; each engine type reports its allocations and
frees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from m3i_scale.scale.checkpoint.host_copies import plan_pools
from m3i_scale.scale.plan.communication import Traffic
from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.settings import Parameter, Settings
from m3i_scale.scale.plan.trace import Trace

PARAMETERS, MOMENTUM, TEACHER = "parameters", "EMA teacher", "teacher"
GRADIENTS, OPTIMIZER, BUCKETS = "gradients", "optimizer", "reduce buckets"
SNAPSHOT = "snapshot"
"""Host staging buffer of a background save, reused by the next one."""
ACTIVATIONS, COLLECTIVES, WORKSPACE = "activations", "collectives", "temporaries"
OF_ROLE: Final = {"trained": PARAMETERS, "momentum": MOMENTUM, "teacher": TEACHER, "frozen": PARAMETERS}
REPLAYED: Final = 2
"""Maximum number of micro-batches replayed per step."""
_NORM_BYTES = 8
"""Gradient norms are computed in fp64."""


class Engine(ABC):
    """A simulation of one rank's engine.

    Args:
        parameters: all parameters of the model, in its order.
        trace: events of a micro-batch.
        settings: the engine's settings.
        device: ledger of the device's tensors.
        host: ledger of host memory; the same as `device` if the CPU computes.
    """

    def __init__(
        self, parameters: tuple[Parameter, ...], trace: Trace, settings: Settings, device: Ledger, host: Ledger
    ) -> None:
        self.parameters, self.trace, self.settings = parameters, trace, settings
        self.device, self.host = device, host
        self.states = device if not settings.optimizer_on_host else host
        self.trained = [place for place, p in enumerate(parameters) if p.role == "trained"]
        self.averaged = [place for place, p in enumerate(parameters) if p.role == "momentum"]
        self.frozen = [place for place, p in enumerate(parameters) if p.role == "frozen"]
        self.stepped = False
        self.traffic, self.last_micro_batch = Traffic(), Traffic()
        self.build()

    def run(self, steps: int = 2) -> None:
        """Simulate optimizer steps; from the second one all states exist. `traffic` is the traffic of the last step,
        over the replayed micro-batches; `last_micro_batch` covers its last micro-batch only."""
        for _ in range(steps):
            traffic, count = Traffic(), self.played
            for number in range(count):
                self.traffic = Traffic()
                self.micro_batch(first=number == 0, last=number + 1 == count)
                self.last_micro_batch = self.traffic
                traffic += self.last_micro_batch
            self.traffic = Traffic()
            self.step()
            self.traffic += traffic
            if not self.stepped:
                self.save()
            self.stepped = True

    @property
    def played(self) -> int:
        """Return the number of replayed micro-batches per step: further ones repeat the second."""
        return min(self.settings.accumulation_steps, REPLAYED)

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """Replay the trace."""
        held: dict[int, int] = {}
        self.before_forward()
        self.phase = "forward"
        for event in self.trace.events:
            if event.kind == "backward":
                self.phase = "backward"
            elif event.kind == "allocate":
                held[event.number] = self.device.allocate(ACTIVATIONS, event.size)
            elif event.kind == "free" and event.number in held:
                self.device.free(held.pop(event.number))
            elif event.kind == "gradient":
                self.device.move(held[event.number], GRADIENTS)
                self.on_gradient(event.owner, held.pop(event.number), first=first)
            elif event.kind in ("fetch", "release"):
                self.on_use(event.owner, event.kind)
            elif event.kind in ("keep", "drop"):
                self.on_view(event.owner, event.number, event.kind)
        for handle in held.values():
            self.device.free(handle)
        self.after_backward(first=first, last=last)

    @abstractmethod
    def build(self) -> None:
        """Allocate the tensors that DeepSpeed creates while it builds the engine."""

    @abstractmethod
    def on_gradient(self, param: int, handle: int, *, first: bool) -> None:
        """Handle the completed gradient of `param`."""

    @abstractmethod
    def after_backward(self, *, first: bool, last: bool) -> None:
        """Reduce the remaining gradients when all are complete."""

    @abstractmethod
    def step(self) -> None:
        """Allocate and free the tensors of an optimizer step."""

    def before_forward(self) -> None:  # noqa: B027 - likewise
        """Do nothing by default."""

    def on_use(self, module: int, kind: str) -> None:  # noqa: B027 - unpartitioned engines have nothing to do
        """Do nothing: unpartitioned parameters are always present."""

    def on_view(self, param: int, number: int, kind: str) -> None:  # noqa: B027 - likewise
        """Do nothing: a view of a resident parameter takes no memory."""

    @abstractmethod
    def local_elements(self, param: int, rank: int) -> int:
        """Return the elements of a trained parameter for which `rank` holds master weights, without padding."""

    @abstractmethod
    def ema_elements(self, param: int, rank: int) -> int:
        """Return the elements of an EMA or frozen parameter that `rank` saves."""

    def snapshot(self, rank: int = 0) -> list[int]:
        """Return the bytes of every staging copy of a background save on `rank`: master weights and moments of each
        parameter, frozen weights, and EMA weights in fp32 or as two halves (see `checkpoint/saver.py`)."""
        settings, sizes = self.settings, []
        for param in self.trained:
            numel = self.local_elements(param, rank)
            sizes += [numel * size for size in (settings.master_bytes, settings.state_bytes, settings.state_bytes)]
        halves = (2, 2) if settings.precision == "bf16" else (4,)
        for param in self.averaged:
            sizes += [self.ema_elements(param, rank) * size for size in halves]
        sizes += [self.ema_elements(param, rank) * settings.parameter_bytes for param in self.frozen]
        return [size for size in sizes if size]

    def save(self) -> None:
        """Simulate the first save. Copies persist; pinned ones share pools, because torch allocates pinned memory in
        powers of two."""
        if self.settings.snapshot is None:
            return
        sizes = self.snapshot()
        for size in sizes if self.settings.on_host else plan_pools(sizes)[0]:
            self.host.allocate(SNAPSHOT, size)
        if self.settings.snapshot:
            self.device.allocate(SNAPSHOT, self.settings.snapshot)

    def take_states(self, numel: int) -> None:
        """Allocate AdamW's moments at the first step."""
        if not self.stepped:
            for _ in range(2):
                self.states.allocate(OPTIMIZER, numel * self.settings.state_bytes)

    def norm(self, largest: int) -> None:
        """Allocate and free the workspace of the gradient norm, gradient by gradient."""
        self.device.allocate_and_free(WORKSPACE, largest * _NORM_BYTES)
