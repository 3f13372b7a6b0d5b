"""CLI of `m3i-scale init`: a config file for a folder of images, with sizes that fit them.

Slow imports are inside the functions, so that --help is fast.
"""

from __future__ import annotations

import re
import shlex
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3i_scale.errors import ConfigError, ErrorCollector, did_you_mean
from m3i_scale.options import writes_to
from m3i_scale.output import leave_out_accelerator_warning, print_line
from m3i_scale.text import yaml_string

if TYPE_CHECKING:  # this import takes seconds, too long for --help
    from m3i_scale.tasks.packed_folders import ImageFolder

_SAMPLE = 64
"""Number of images whose headers are read."""
_TEXT_TOWERS = {
    "vit-mini/16": "{hidden_size: 192, num_hidden_layers: 4, num_attention_heads: 3, intermediate_size: 768, "
    "initializer_range: 0.06}",
    "vit-s/16": "{hidden_size: 384, num_hidden_layers: 6, num_attention_heads: 6, intermediate_size: 1536}",
}


@dataclass(frozen=True)
class Machine:
    """The device type of this machine, as far as it determines settings."""

    gpus: int
    deepspeed: str

    @staticmethod
    def of_this() -> Machine:
        """Ask DeepSpeed's accelerator. CPUs compute in fp32, about three times as fast as bf16 without bf16
        instructions, which no public function of torch 2.6 reports."""
        from m3i_scale.engine.device import has_fast_bf16
        from m3i_scale.launch.job import gpus_here

        gpus = gpus_here()
        return Machine(gpus, "zero3_cpu_fp32" if not gpus else "zero1_bf16" if has_fast_bf16() else "zero3_fp16")


@dataclass(frozen=True)
class Sizes:
    """Settings of a run that follow from the number and the size of the images."""

    preset: str
    image_size: int
    patch_size: int
    streams: int
    batch_size: int
    micro_batch_size: int
    steps: int
    epochs: float


def fitting_sizes(images: int, side: int, gpus: int) -> Sizes:
    """Return sizes for a number of images with a typical short side, on a number of GPUs (0: CPU)."""
    preset = "vit-mini/16" if images < 50_000 or not gpus else "vit-s/16" if images < 500_000 else "vit-b/16"
    largest = 128 if preset == "vit-mini/16" else 224
    small = side < 64
    image_size = max(16, side // 8 * 8) if small else min(largest, side // 32 * 32)
    ranks, most = min(max(gpus, 1), images), _power_of_2(images)
    total = min(max(_power_of_2(images // 4), min(8, most)), 256 if images < 100_000 else 1024)
    micro = min(64, _power_of_2(total // ranks))
    batch = micro * ranks * max(total // (micro * ranks), 1)
    streams = ranks * min(micro, _power_of_2(8 // ranks))
    epochs = min(300.0, max(30.0 if gpus else 5.0, 512_000 / images))  # 512,000 samples, as m3i_mini
    steps = max(2, round(epochs * images / batch))
    return Sizes(preset, image_size, 4 if small else 16, streams, batch, micro, steps, steps * batch / images)


def _power_of_2(number: int) -> int:
    """Return the largest power of 2 that is at most a number, at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Images, in class folders or not; NAME.txt: captions.")],
    output: Annotated[Path, typer.Option(callback=writes_to, help="Config file to write.")] = Path("run.yaml"),
    recipe: Annotated[str | None, typer.Option(help="Built-in recipe; default: by labels and captions.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented config file for a folder of images."""
    leave_out_accelerator_warning()
    from m3i_scale.config import known_runs, run_values
    from m3i_scale.files import atomic_write
    from m3i_scale.shards.image_folders import holds_shards
    from m3i_scale.shards.make import FITTING_RECIPES
    from m3i_scale.tasks.packed_folders import ImageFolder

    if output.exists() and not overwrite:
        raise ConfigError("the file exists", where=str(output), fix="--overwrite, or another --output")
    if recipe is not None and (recipe not in known_runs() or "task" in run_values(recipe)):
        raise ConfigError(f"no recipe '{recipe}'", where="--recipe", fix=did_you_mean(recipe, known_runs()))
    if folder.is_dir() and holds_shards(folder):
        raise ConfigError(
            "the folder contains .tar shards, not images",
            where=str(folder),
            fix=f"m3i-scale train m3i_mini data.datasets.main.path={shlex.quote(str(folder))}",
        )
    images = ImageFolder(folder.absolute(), "m3i-scale init ")
    width, height, side = _typical_size(images)
    has_labels, has_captions = len(images.classes) > 1, 2 * len(images.captions) >= len(images.records)
    machine = Machine.of_this()
    sizes = fitting_sizes(len(images.records), side, machine.gpus)
    fitting = FITTING_RECIPES[has_labels, has_captions]
    if fitting == "m3i_mini" and sizes.preset != "vit-mini/16":
        fitting = "m3i"  # the same recipe
    name = recipe or fitting
    text = "\n".join(_lines(name, images, sizes, machine)) + "\n"
    _check(text, name, max(machine.gpus, 1))
    try:
        atomic_write(output, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the config file: {error.strerror}", where=str(output), fix="use another --output"
        ) from None
    for line in (
        f"{folder}: {images.contents()}, typically {width} × {height} pixels",
        f"recipe {name}: it learns from images"
        + (", class labels" if has_labels else "")
        + (", captions" if has_captions else "")
        if recipe is None
        else f"recipe {name}: as given by --recipe",
        f"model {sizes.preset} at {sizes.image_size} pixels: for {len(images.records):,} images"
        + ("" if machine.gpus else ", on a CPU"),
        f"{sizes.steps:,} steps of {sizes.batch_size} images: {sizes.epochs:.3g} epochs",
        f"deepspeed {machine.deepspeed}: "
        + (f"{machine.gpus} GPUs" if machine.gpus else "there is no GPU; take zero1_bf16 on a machine with GPUs"),
        f"wrote {output}",
        f"next: m3i-scale train {shlex.quote(str(output))}",
    ):
        print_line(line)


def _typical_size(images: ImageFolder) -> tuple[int, int, int]:
    """Return the medians of width, height and short side of a sample, from file headers."""
    from m3i_scale.data.images import DECODE_ERRORS, open_any_size

    sizes = []
    for record in images.records[:_SAMPLE]:  # they are in the order of a hash
        path = record.image
        try:
            with open_any_size(path.read_bytes() if isinstance(path, Path) else b"") as image:
                sizes.append(image.size)
        except DECODE_ERRORS:
            continue
    if not sizes:
        raise ConfigError(
            f"none of {min(_SAMPLE, len(images.records))} images can be read",
            where=str(images.folder),
            fix="check one of them with an image viewer",
        )
    medians = [int(statistics.median(values)) for values in zip(*sizes, strict=True)]
    return medians[0], medians[1], int(statistics.median(map(min, sizes)))


def _lines(recipe: str, images: ImageFolder, sizes: Sizes, machine: Machine) -> Iterator[str]:
    """Yield the lines of the config file."""
    from m3i_scale.config import run_values

    values = run_values(recipe)
    name, number = _new_name(images.folder), len(images.records)
    path = str(images.folder)
    if path != path.encode(errors="replace").decode():
        raise ConfigError("the path of the folder must be UTF-8", where=repr(path), fix="rename it")
    yield f"extends: {recipe}  # the recipe: `m3i-scale recipes show {recipe}` draws it"
    yield f"name: {yaml_string(name)}  # of the run, in logs and reports"
    yield f"output_dir: {yaml_string(f'runs/{name}')}  # checkpoints, metrics, and the images packed into shards"
    if "from_pretrained" not in values.get("backbone", {}):
        yield "backbone:"
        yield f"  preset: {sizes.preset}  # model size for {number:,} images; `m3i-scale backbones` lists others"
        yield "  config:"
        yield f"    image_size: {sizes.image_size}  # crops in pixels, a multiple of patch_size"
        yield f"    patch_size: {sizes.patch_size}  # pixels per token"
        if sizes.preset == "vit-mini/16":
            yield "    initializer_range: 0.06  # a small model starts with larger weights than a ViT-B"
    if _uses_text_tower(recipe) and sizes.preset in _TEXT_TOWERS:
        yield "text:"
        yield f"  config: {_TEXT_TOWERS[sizes.preset]}  # text encoder, as small as the backbone"
    yield "data:"
    yield "  datasets:"
    yield "    main:  # name in metrics; add datasets here to mix them"
    yield f"      path: {yaml_string(path)}  # {number:,} images; `train` packs them once into output_dir/shards"
    yield f"  streams: {sizes.streams}  # fixes the order of samples for any number of GPUs and workers"
    if machine.gpus:
        workers = min(4, max(sizes.streams // machine.gpus, 1))
        yield f"  num_workers: {workers}  # data loader processes per GPU; they share its streams"
    yield "optim:"
    yield f"  batch_size: {sizes.batch_size}  # images per step, over all GPUs"
    yield f"  micro_batch_size: {sizes.micro_batch_size}  # images per GPU at a time; lower it if memory is short"
    yield f"  steps: {sizes.steps}  # {sizes.epochs:.3g} epochs; more is better if the loss still falls"
    yield f"  warmup_steps: {sizes.steps // 10}  # linear increase of the learning rate"
    yield f"  lr: {'1.0e-3' if sizes.preset == 'vit-mini/16' else '5.0e-4'}  # peak learning rate"
    other = "zero1_bf16 on GPUs" if not machine.gpus else "zero3_bf16 for models that do not fit into a GPU"
    yield f"deepspeed: {machine.deepspeed}  # precision and partitioning; {other}"


def _new_name(folder: Path) -> str:
    """Return the name of a run from its folder, with the parent of a split, that no run in `runs` has."""
    from m3i_scale.shards.image_folders import SPLIT_NAMES

    parts = folder.parts[-2:] if folder.name.lower() in SPLIT_NAMES else [folder.name]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._") or "images"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(free for free in names if not Path("runs", free).exists())


def _uses_text_tower(recipe: str) -> bool:
    from m3i_scale.config import run_values
    from m3i_scale.objective.recipe import parse_recipe

    return parse_recipe(run_values(recipe).get("recipe", {})).uses_text_tower


def _check(text: str, recipe: str, ranks: int) -> None:
    """Raise the errors of `m3i-scale check`, so that the file is valid as written."""
    from m3i_scale.run.check import errors_of
    from m3i_scale.tasks.packed_folders import RunFolders

    errors = ErrorCollector()
    with tempfile.TemporaryDirectory(prefix="m3i-init-") as place:
        file = Path(place) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        errors.errors = errors_of(str(file), ranks=ranks, read_unpacked=RunFolders(str(file), None).facts)
        for error in errors.errors:
            if error.where == str(file):
                error.where = f"--recipe {recipe}"
    errors.raise_any()
