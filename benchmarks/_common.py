"""What every benchmark shares: one JSON document, the machine named, pairs measured in turn."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError
from m3i_scale.output import print_json, reserve_stdout

reserve_stdout()  # before DeepSpeed is imported, which already prints

from deepspeed.accelerator import get_accelerator  # noqa: E402

EMOJI = Path(__file__).resolve().parent.parent / "examples" / "emoji.py"


def machine() -> dict[str, object]:
    """The machine that the figures hold for."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}


def need(package: str) -> None:
    """End at once, and say how, where a peer is not installed."""
    if importlib.util.find_spec(package) is None:
        say(f"error: this benchmark needs '{package}'\n  fix: python -m pip install -e '.[test]'")
        sys.exit(EXIT_USER_ERROR)


def emoji_shards() -> Path:
    """The emoji set of the examples: in M3I_EMOJI_FOLDER or data/emoji, made where it is missing."""
    folder = Path(os.environ.get("M3I_EMOJI_FOLDER", "data/emoji"))
    if not folder.exists():
        say(f"making the emoji shards in {folder}")
        font = os.environ.get("M3I_NOTO_FONT")
        command = [sys.executable, str(EMOJI), "--output", str(folder), *(["--noto-font", font] if font else [])]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise ConfigError("the emoji shards could not be made, see above", fix="or name other shards with --data")
    return folder


def in_turn(sides: dict[str, Callable[[], None]], *, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds per call of every side, called in turn so that a drifting machine hits all alike."""
    for _ in range(warmup):
        for call in sides.values():
            call()
            get_accelerator().synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        order = list(sides) if repeat % 2 == 0 else list(reversed(sides))
        for name in order:
            started = time.perf_counter()
            sides[name]()
            get_accelerator().synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def emit(document: dict[str, object]) -> None:
    """The one JSON document."""
    print_json(document)
