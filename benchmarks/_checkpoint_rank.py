"""One rank of `checkpoint.py`: `python _checkpoint_rank.py save|load SETTINGS.json`, with the launchers' variables.

`save` takes steps, and between them saves in three ways, in turn. `load` reads the checkpoint that `save` has left.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m3i_scale.backbones.build import backbone_config
from m3i_scale.checkpoint.load import first_samples, load_checkpoint, probe_loss
from m3i_scale.checkpoint.saver import Saver
from m3i_scale.config import load_run
from m3i_scale.data.batch import synthetic_batch
from m3i_scale.engine.agree import max_over_ranks
from m3i_scale.engine.deepspeed.resolve import load_ds_config, resolve
from m3i_scale.engine.engine import take_step
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.setup import ResolvedRun, start_engine

MIB = 2**20
MICRO_BATCH = 2


def memory_mib(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def plan_of(settings: dict[str, Any], world: int) -> ResolvedRun:
    """Return the `sim` recipe with small images. Its dense target needs the EMA teacher."""
    run = load_run(
        "sim",
        [
            f"backbone.preset={settings['model']}",
            f"backbone.config={{image_size: {settings['image']}}}",
            "backbone.activation_checkpointing=full",
            f"optim.micro_batch_size={MICRO_BATCH}",
            f"optim.batch_size={MICRO_BATCH * world}",
            "optim.clip_grad_norm=0",
            "hardware.peak_tflops=1",
            f"output_dir={settings['folder']}",
        ],
    )
    optim = run.optim
    resolved = resolve(
        load_ds_config(settings["deepspeed"]),
        world_size=world,
        batch_size=optim.batch_size,
        micro_batch_size=optim.micro_batch_size,
        clip_grad_norm=optim.clip_grad_norm,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        hidden_size=1024,
        where=settings["deepspeed"],
    )
    config = backbone_config(run.backbone)
    return ResolvedRun(run, parse_recipe(run.recipe), {}, None, config.image_size, resolved, 1)


class Bench:
    """An engine, and what is timed on it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.folder = settings, Path(settings["folder"])
        self.group = start_ranks()
        plan = plan_of(settings, self.group.world_size)
        self.engine, self.ema = start_engine(plan, self.group)
        assert self.ema is not None
        torch.manual_seed(self.group.rank)
        sizes = {"image": plan.image_size, "tokens": 8, "classes": 10, "vocabulary": 100}
        self.batch = synthetic_batch(MICRO_BATCH, plan.recipe.drawn_views, **sizes)
        self.number = 0

    def timed(self, work: Callable[[], object]) -> dict[str, float]:
        """Seconds of the slowest rank; the sum over the ranks of what they held before, and of their peaks since."""
        dist.barrier()
        held = memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
        started = time.perf_counter()
        work()
        seconds = max_over_ranks({"s": time.perf_counter() - started})["s"]
        memory = torch.tensor([held, memory_mib("VmHWM"), memory_mib("VmRSS")])
        dist.all_reduce(memory)
        names = ("held_mib", "peak_mib", "held_after_mib")
        return {"seconds": seconds} | {name: float(value) for name, value in zip(names, memory, strict=True)}

    def step(self) -> float:
        """One step of the engine and of the EMA teacher."""

        def work() -> None:
            loss, _ = self.engine(self.batch)
            self.engine.backward(loss)
            take_step(self.engine)
            self.ema.update(0.99)

        dist.barrier()
        started = time.perf_counter()
        work()
        return max_over_ranks({"s": time.perf_counter() - started})["s"]

    def next_folder(self) -> Path:
        """For a checkpoint; the one before goes."""
        if self.group.rank == 0:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        dist.barrier()
        self.number += 1
        return self.folder / "checkpoints" / f"step-{self.number:08d}"

    def facts(self) -> dict[str, Any]:
        """Arguments of a save."""
        return {
            "data_state": {},
            "meta": {"step": self.number, "world_size": self.group.world_size},
            "run_yaml": "{}\n",
        }

    def blocking(self) -> dict[str, Any]:
        """Our save, waited for: files on the disk, hashed, committed."""
        folder = self.next_folder()
        return self.timed(lambda: Saver(self.engine, self.ema).save(folder, **self.facts()))

    def background(self, saver: Saver) -> dict[str, Any]:
        """Our save beside the training: `seconds` is how long the training stands still."""
        folder, steps, started = self.next_folder(), [], time.perf_counter()
        found: dict[str, Any] = self.timed(lambda: saver.save(folder, **self.facts()))
        while max_over_ranks({"on": float(saver.writing)})["on"]:
            steps.append(self.step())
        peak = torch.tensor([memory_mib("VmHWM")])
        dist.all_reduce(peak)
        return found | {
            "steps_meanwhile_s": steps,
            "commit_s": self.timed(saver.close)["seconds"],
            "committed_after_s": time.perf_counter() - started,
            "peak_mib": float(peak),
        }

    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's own save of the same engine. It brings nothing to the disk and hashes nothing."""
        folder = self.folder / "deepspeed"
        if self.group.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        return self.timed(lambda: self.engine.save_checkpoint(str(folder), tag="saved"))


def save(settings: dict[str, Any]) -> dict[str, Any]:
    """Saves in turn; the last checkpoints of both kinds are left, of the same weights."""
    bench = Bench(settings)
    steps = [bench.step() for _ in range(5)][2:]
    probe = first_samples(bench.batch)
    found: dict[str, Any] = {"step_s": steps, "probe": bench.timed(lambda: probe_loss(bench.engine, probe))}
    saver = Saver(bench.engine, bench.ema, background=True)
    ways: dict[str, Callable[[], dict[str, Any]]] = {"blocking": bench.blocking, "deepspeed": bench.deepspeed}
    if settings["background"]:
        ways["background"] = lambda: bench.background(saver)
        found["background_first"] = ways["background"]()
    found |= {name: [] for name in ways}
    for number in range(settings["rounds"]):
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        for name in order:
            found[name].append(ways[name]())
            if bench.group.rank == 0:
                print(name, found[name][-1], file=sys.stderr, flush=True)
    saver._copies.clear()  # a run that loads has just begun
    found["last"] = [bench.blocking(), bench.deepspeed()] and str(bench.folder / "checkpoints")
    found["load"] = bench.timed(lambda: load_checkpoint(newest(bench.folder), bench.engine, bench.ema))
    return found


def load(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the checkpoint that is there, on these ranks."""
    bench = Bench(settings)
    return bench.timed(lambda: load_checkpoint(newest(bench.folder), bench.engine, bench.ema))


def newest(folder: Path) -> Path:
    """The one checkpoint that is left."""
    return max((folder / "checkpoints").glob("step-*"))


@contextlib.contextmanager
def _output_elsewhere() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main() -> None:
    """Write what was measured, as rank 0."""
    mode, path = sys.argv[1], Path(sys.argv[2])
    settings = json.loads(path.read_text())
    with _output_elsewhere():
        found = {"save": save, "load": load}[mode](settings)
        rank = dist.get_rank()
        stop_ranks(wait=True)
    if rank == 0:
        path.with_suffix(f".{mode}.out").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
