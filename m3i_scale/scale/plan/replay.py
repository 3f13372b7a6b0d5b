"""Replay one rank's engine on sizes: a recorded micro-batch is replayed, and every kind of engine says what it takes
and frees meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from m3i_scale.scale.checkpoint.host_copies import plan_pools
from m3i_scale.scale.plan.communication import Traffic
from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.settings import Parameter, Settings
from m3i_scale.scale.plan.trace import Trace

PARAMETERS, MOMENTUM, TEACHER = "parameters", "momentum target", "teacher"
GRADIENTS, OPTIMIZER, BUCKETS = "gradients", "optimizer", "reduce buckets"
SNAPSHOT = "snapshot"
"""What a save in the background copies into host memory, kept for the next one."""
ACTIVATIONS, COLLECTIVES, WORKSPACE = "activations", "collectives", "temporaries"
OF_ROLE: Final = {"trained": PARAMETERS, "momentum": MOMENTUM, "teacher": TEACHER, "frozen": PARAMETERS}
REPLAYED: Final = 2
"""Micro-batches of a step that are played through, at most."""
_NORM_BYTES = 8
"""Gradient norms are taken in fp64."""


class Engine(ABC):
    """Replays one rank's engine.

    Args:
        parameters: of the whole module, in its order.
        trace: what a micro-batch does.
        settings: of the engine.
        device: where the device's tensors are written down.
        host: host memory beside the device; the same as `device` where the host computes.
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
        """Take optimizer steps: the second one finds all states there. `traffic` is that of the last one, in as many
        micro-batches as were played; `last_micro_batch` that of the last micro-batch."""
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
        """Return the micro-batches of a step that are played: further ones repeat the second."""
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
        """Take what DeepSpeed takes on the way from the module to an engine."""

    @abstractmethod
    def on_gradient(self, param: int, handle: int, *, first: bool) -> None:
        """Do what follows when the gradient of `param` is complete."""

    @abstractmethod
    def after_backward(self, *, first: bool, last: bool) -> None:
        """Reduce what is left when all gradients are there."""

    @abstractmethod
    def step(self) -> None:
        """Take and free what the optimizer does in a step."""

    def before_forward(self) -> None:  # noqa: B027 - likewise
        """Do nothing, by default."""

    def on_use(self, module: int, kind: str) -> None:  # noqa: B027 - whole engines have nothing to do
        """Do nothing: whole parameters are always there."""

    def on_view(self, param: int, number: int, kind: str) -> None:  # noqa: B027 - likewise
        """Do nothing: a view of a parameter that stays costs nothing."""

    @abstractmethod
    def local_elements(self, param: int, rank: int) -> int:
        """Return the elements of a trained parameter that `rank` holds master weights of, without padding."""

    @abstractmethod
    def ema_elements(self, param: int, rank: int) -> int:
        """Return the elements of an average, or of a frozen parameter, that `rank` saves."""

    def snapshot(self, rank: int = 0) -> list[int]:
        """Return the bytes of every copy in host memory that a save in the background makes on `rank`: master weights
        and moments of each parameter, frozen weights, and an average in fp32, or in two halves (see
        `checkpoint/saver.py`)."""
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
        """Save for the first time. Copies stay; pinned ones share pools: torch gives such memory in powers of two."""
        if self.settings.snapshot is None:
            return
        sizes = self.snapshot()
        for size in sizes if self.settings.on_host else plan_pools(sizes)[0]:
            self.host.allocate(SNAPSHOT, size)
        if self.settings.snapshot:
            self.device.allocate(SNAPSHOT, self.settings.snapshot)

    def take_states(self, numel: int) -> None:
        """Make AdamW's moments at the first step."""
        if not self.stepped:
            for _ in range(2):
                self.states.allocate(OPTIMIZER, numel * self.settings.state_bytes)

    def norm(self, largest: int) -> None:
        """Take and free what the norm needs, gradient by gradient."""
        self.device.allocate_and_free(WORKSPACE, largest * _NORM_BYTES)
