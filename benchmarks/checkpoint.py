"""What a checkpoint costs: the step that saves, the steps after it, memory, loading, verifying, consolidating.

A ZeRO-3 engine with an EMA teacher on two ranks, random data. Three ways to save are measured in turn: ours in the
background, ours waited for, and DeepSpeed's `engine.save_checkpoint`. Ours hashes every byte and brings it to the disk;
DeepSpeed's does neither. Fresh processes then verify and consolidate what is left, ours and DeepSpeed's.

    python benchmarks/checkpoint.py --json [--model vit-g/14]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import typer
from _common import emit, machine, say
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.backbones import describe_presets
from m3i_scale.backbones.families import PRESETS
from m3i_scale.errors import EXIT_USER_ERROR, did_you_mean

RANKS = 2
LEAN = ("vit-g/14",)
"""Held in bf16 throughout, so that two ranks fit a small machine."""
LIMITED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc gives freed tensors back, so that resident memory is what lives."""
FRESH = """
import sys, time
from pathlib import Path
started = time.perf_counter()
{}
seconds = time.perf_counter() - started
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("\\nmeasured", seconds, int(peak.split()[1]) / 1024)
"""
VERIFY = "from m3i_scale.checkpoint.manifest import verify; assert verify(Path({source!r})) == []"
CONSOLIDATE = (
    "from m3i_scale.checkpoint_tools.consolidate import consolidate; "
    "consolidate(Path({source!r}), Path({target!r}), max_shard_size={size!r})"
)
ZERO_TO_FP32 = (
    "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; "
    "convert({source!r}, {target!r}, {options})"
)


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    model: str = typer.Option(
        "vit-l/16", help="A preset of `m3i-scale backbones`; vit-g/14 takes the lean engine file."
    ),
    rounds: int = typer.Option(2, help="Saves of each kind; the first one in the background is counted apart."),
    image: int = typer.Option(112, help="Side in pixels: steps are short, checkpoints as they are."),
    shard_size: str = typer.Option("500MB", help="Of consolidated files."),
    output: Path = typer.Option(None, help="Where to write; a temporary folder by default."),
) -> None:
    """Print {stall_ratio, save, steps, load, verify, consolidate, machine, …}."""
    if model not in PRESETS:
        say(f"error: no backbone '{model}': {did_you_mean(model, PRESETS)}")
        sys.exit(EXIT_USER_ERROR)
    with tempfile.TemporaryDirectory(dir=output) as name:
        emit(_measure(Path(name), model, rounds, image, shard_size))


def _measure(folder: Path, model: str, rounds: int, image: int, shard_size: str) -> dict[str, Any]:
    parameters = int(describe_presets([model])[0]["parameters"])
    background = _fits(parameters, model in LEAN)
    settings: dict[str, Any] = {"folder": str(folder), "model": model, "rounds": rounds, "image": image}
    settings |= {"deepspeed": "zero3_cpu_lean" if model in LEAN else "zero3_cpu", "background": background is None}
    (folder / "settings.json").write_text(json.dumps(settings))
    say("saving …")
    saved = _ranks(folder, "save", RANKS)
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    say("loading on one rank …")
    one_rank = _ranks(folder, "load", 1)
    say("verifying, consolidating …")
    document = _save_figures(saved, background)
    document["load"] = {
        "two_ranks": saved["load"],
        "one_rank": one_rank,
        "seconds_ratio": one_rank["seconds"] / saved["load"]["seconds"],
        "peak_to_held": one_rank["peak_mib"] / one_rank["held_after_mib"],
        "peak_ratio": one_rank["peak_mib"] / saved["load"]["peak_mib"],
    }
    document["bytes"] = {"ours": _size(checkpoint), "deepspeed": _size(folder / "deepspeed")}
    document["verify"] = _fresh(VERIFY.format(source=str(checkpoint)))
    document["consolidate"] = _consolidate(folder, checkpoint, shard_size)
    document |= {"model": model, "parameters": parameters, "settings": settings | {"ranks": RANKS, "folder": ""}}
    return document | {"load_average": os.getloadavg()[0], "machine": machine()}


def _fits(parameters: int, lean: bool) -> str | None:
    """Why no save in the background is measured: engine, gradients and copy, against what is free."""
    held, copy = (18, 10) if lean else (26, 16)
    wanted, free = (held + copy) * parameters + RANKS * 2**30, psutil.virtual_memory().available
    if wanted <= free:
        return None
    return f"about {wanted / 2**30:.1f} GiB wanted, {free / 2**30:.1f} GiB free"


def _save_figures(saved: dict[str, Any], left_out: str | None) -> dict[str, Any]:
    ways = [name for name in ("background", "blocking", "deepspeed") if name in saved]
    seconds = {name: statistics.median(save["seconds"] for save in saved[name]) for name in ways}
    step_s = statistics.median(saved["step_s"])
    document: dict[str, Any] = {
        "stall_ratio": seconds["background"] / seconds["deepspeed"] if "background" in ways else None,
        "blocking_ratio": seconds["blocking"] / seconds["deepspeed"],
        "save": {
            name: {"seconds": seconds[name], "peak_mib": max(save["peak_mib"] for save in saved[name])} for name in ways
        },
        "held_mib": saved["deepspeed"][0]["held_mib"],
        "probe_s": saved["probe"]["seconds"],
        "step_s": step_s,
        "all": {name: saved[name] for name in ways},
    }
    if left_out is not None:
        document["background_left_out"] = left_out
        return document
    meanwhile = [second for save in saved["background"] for second in save["steps_meanwhile_s"]]
    document["save"]["background"] |= {
        "first_seconds": saved["background_first"]["seconds"],
        "committed_after_s": statistics.median(save["committed_after_s"] for save in saved["background"]),
        "commit_s": statistics.median(save["commit_s"] for save in saved["background"]),
        "steps_meanwhile": len(meanwhile),
        "step_meanwhile_s": statistics.median(meanwhile) if meanwhile else None,
    }
    document["first_stall_ratio"] = saved["background_first"]["seconds"] / seconds["deepspeed"]
    return document


def _consolidate(folder: Path, checkpoint: Path, size: str) -> dict[str, Any]:
    ours = _fresh(CONSOLIDATE.format(source=str(checkpoint), target=str(folder / "whole"), size=size))
    largest = max(path.stat().st_size for path in (folder / "whole").glob("*.safetensors")) / 2**20
    theirs = {}
    for name, options in (("default", ""), ("shards", f"max_shard_size='{size}', safe_serialization=True")):
        source = {"source": str(folder / "deepspeed"), "target": str(folder / name), "options": options}
        theirs[name] = _fresh(ZERO_TO_FP32.format(**source))
    return {
        "ours_peak_mib": ours["peak_mib"],
        "zero_to_fp32_peak_mib": theirs["default"]["peak_mib"],
        "zero_to_fp32_shards_peak_mib": theirs["shards"]["peak_mib"],
        "largest_shard_mib": largest,
        "limit_mib": 1.3 * largest + 500e6 / 2**20,
        "ours_s": ours["seconds"],
        "zero_to_fp32_s": theirs["default"]["seconds"],
        "zero_to_fp32_shards_s": theirs["shards"]["seconds"],
        "imports_mib": _fresh("import m3i_scale.checkpoint_tools.consolidate")["peak_mib"],
    }


def _ranks(folder: Path, mode: str, world: int) -> dict[str, Any]:
    port, processes = str(get_free_port()), []
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = str(Path(__file__).with_name("_checkpoint_rank.py"))
    for rank in range(world):
        own = os.environ | common | LIMITED | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, script, mode, str(folder / "settings.json")]
        processes.append(subprocess.Popen(command, env=own, stdout=sys.stderr))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"a rank failed: exit codes {codes}")
    found: dict[str, Any] = json.loads((folder / f"settings.{mode}.out").read_text())
    return found


def _fresh(work: str) -> dict[str, float]:
    """Seconds, imports included, and peak memory of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(work)], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
    )
    _, seconds, peak = done.stdout.strip().splitlines()[-1].split()
    return {"seconds": float(seconds), "peak_mib": float(peak)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    typer.run(main)
