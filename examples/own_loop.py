"""Train a recipe in a loop of your own: in plain PyTorch, or under accelerate on any number of ranks.

python examples/own_loop.py --steps 20
python examples/own_loop.py --steps 20 --accelerate
accelerate launch --cpu --num_processes 2 examples/own_loop.py --steps 20 --accelerate --shards /data/shards/train

`--checkpoint FILE` goes on from FILE where it is there, and saves into it at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from coloured_shapes import make_shards

import m3i_scale
from m3i_scale import Objective, RunConfig, TrainStream

SMALL = [  # so that 20 steps take seconds on a CPU
    "backbone.config={image_size: 32, patch_size: 8, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 128}",
    "recipe.decoders.dense={kind: transformer, width: 32, heads: 2, depth: 1, position: relative}",
    "text.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}",
    "optim.lr=3e-3",
]
BATCH_SIZE = 16


def read_run(options: argparse.Namespace, shards: Path, ranks: int) -> RunConfig:
    """Return the run file: the built-in recipe `m3i` on these shards."""
    given = [f"data.datasets.own.path={shards}", f"optim.steps={options.steps}", f"output_dir={options.output}"]
    sizes = [f"optim.batch_size={BATCH_SIZE}", f"optim.micro_batch_size={BATCH_SIZE // ranks}"]
    return m3i_scale.load_run("m3i", [*SMALL, *given, *sizes, *options.overrides])


def adamw(objective: Objective, run: RunConfig) -> torch.optim.AdamW:
    """Return the optimizer of the run file; its rate is set before every step."""
    groups = m3i_scale.parameter_groups(objective, run.optim.weight_decay)
    return torch.optim.AdamW(groups, betas=run.optim.betas, eps=run.optim.eps)


def set_rate(optimizer: Any, step: int, run: RunConfig) -> None:
    """Set the learning rate of a step, counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = m3i_scale.learning_rate(step, run.optim)


def save(path: Path, step: int, objective: Objective, optimizer: Any, streams: list[dict[str, Any]]) -> None:
    """Save weights, averages and memories; the optimizer; and the position of all ranks' streams."""
    states = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"step": step, **states, "stream": m3i_scale.merge_states(streams)}, path)


def restore(path: Path | None, objective: Objective, optimizer: Any, stream: TrainStream) -> int:
    """Load what `save` saved, where it is there; return the step to go on from."""
    if path is None or not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True)
    objective.load_state_dict(saved["objective"])
    optimizer.load_state_dict(saved["optimizer"])
    stream.load_state_dict(saved["stream"])
    return int(saved["step"])


def train_plain(options: argparse.Namespace, shards: Path) -> list[float]:
    """Train in one process, on its CPU or first GPU, and return the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = read_run(options, shards, ranks=1)
    stream, objective = m3i_scale.open_stream(run), m3i_scale.build_objective(run).to(device)
    optimizer = adamw(objective, run)
    losses, first = [], restore(options.checkpoint, objective, optimizer, stream)
    for step, batch in zip(range(first, options.until or options.steps), stream, strict=False):
        set_rate(optimizer, step, run)
        loss, figures = objective(batch.to(device))
        loss.backward()
        objective.after_backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), run.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        m3i_scale.update_ema(objective, step, run.optim.steps)
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, text {figures['text/loss']:.4f}", flush=True)
    if options.checkpoint is not None:
        save(options.checkpoint, first + len(losses), objective, optimizer, [stream.state_dict()])
    return losses


def train_under_accelerate(options: argparse.Namespace, shards: Path) -> list[float]:
    """Train on as many ranks as `accelerate launch` starts, each with its share of the same batches."""
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    accelerator = Accelerator()  # first: the stream and the losses ask for its ranks
    run = read_run(options, shards, accelerator.num_processes)
    stream, objective = m3i_scale.open_stream(run), m3i_scale.build_objective(run)
    model, optimizer = accelerator.prepare(objective, adamw(objective, run))
    losses, first = [], restore(options.checkpoint, objective, optimizer, stream)
    for step, batch in zip(range(first, options.until or options.steps), stream, strict=False):
        set_rate(optimizer, step, run)
        loss, figures = model(batch.to(accelerator.device))
        accelerator.backward(loss)
        objective.after_backward()
        accelerator.clip_grad_norm_(model.parameters(), run.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        m3i_scale.update_ema(objective, step, run.optim.steps)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        text = accelerator.reduce(figures["text/loss"], "mean").item()
        accelerator.print(f"step {step + 1}: loss {losses[-1]:.4f}, text {text:.4f}", flush=True)
    streams = gather_object([stream.state_dict()])
    if options.checkpoint is not None and accelerator.is_main_process:
        save(options.checkpoint, first + len(losses), objective, optimizer, streams)
    # DDP goes before its process group: as the group's last owner it would wait, holding the interpreter, for gloo's
    # threads, which may wait for the interpreter.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the run file")
    parser.add_argument("--shards", type=Path, help="default: a few of colored shapes, made anew")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--until", type=int, help="end after this step, before all are done")
    parser.add_argument("--accelerate", action="store_true", help="train under accelerate")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    train = train_under_accelerate if options.accelerate else train_plain
    with tempfile.TemporaryDirectory() as folder:
        options.output = folder  # where samples that cannot be used are written down
        return train(options, options.shards or make_shards(Path(folder)))


if __name__ == "__main__":
    main()
