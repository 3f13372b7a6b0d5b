"""What every benchmark shares: one JSON document, the machine named, pairs measured in turn."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError
from m3i_scale.output import print_json, reserve_stdout

reserve_stdout()  # before DeepSpeed is imported, which already prints

from deepspeed.accelerator import get_accelerator  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCENES = 1800
"""Of the built-in set, a sixth of them for validation."""


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
        font = os.environ.get("M3I_NOTO_FONT")
        options = ["--output", str(folder), *(["--noto-font", font] if font else [])]
        _make(folder, [str(EXAMPLES / "emoji.py"), *options])
    return folder


def scene_shards(kind: Literal["coco", "masks"] = "coco") -> Path:
    """Return shards of the example scenes, next to the emoji set. Create them if they are missing.

    Args:
        kind: boxes and masks of objects in `train` and `val`, or classes of pixels in `training` and `validation`.
    """
    beside = Path(os.environ.get("M3I_EMOJI_FOLDER", "data/emoji")).parent
    folder = beside / ("scenes-shards" if kind == "coco" else "scenes-masks")
    if not folder.exists():
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside) as temporary:
            scenes, cache = Path(temporary) / "scenes", beside / ".cache" / "emoji"
            made = ["--images", str(SCENES), "--seed", "0", "--cache", str(cache)]
            _make(folder, [str(EXAMPLES / "scenes.py"), str(scenes), *made])
            annotations = scenes / "annotations"
            if kind == "coco":
                files = [annotations / f"instances_{split}.json" for split in ("train", "val")]
                inputs = [part for file in files for part in ("--input", str(file))]
            else:
                inputs = ["--images", str(scenes / "images"), "--masks", str(annotations), "--reduce-zero-label"]
                inputs += ["--labels", str(scenes / "objectInfo150.txt")]
            _make(folder, ["-m", "m3i_scale", "shards", "make", kind, *inputs, "--output", str(folder)])
    return folder


def _make(folder: Path, arguments: list[str]) -> None:
    say(f"making {folder}")
    if subprocess.run([sys.executable, *arguments], stdout=sys.stderr, check=False).returncode:
        raise ConfigError(f"{folder} could not be made, see above", fix="or name other shards with --data")


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
