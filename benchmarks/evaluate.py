"""Measure the throughput of `m3i-scale embed`, a plain `transformers` loop and timm's inference loop, in turn.

All sides read the same folder of JPEG files, crop them to 224 pixels and compute the features of a ViT of the same
shape with random weights, in fp32. The `transformers` loop is that of its documentation: open the images of a batch,
call the image processor, call the model. The timm side is the loop of its `inference.py`: `create_dataset`,
`create_loader` with worker processes, forward pass of every batch. Every side is measured with every batch
size, and its best one counts.

    python benchmarks/evaluate.py --json
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import typer
from _common import emit, in_turn, machine, say
from PIL import Image
from timm.data import create_dataset, create_loader
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from m3i_scale.evaluation.embed import embed
from m3i_scale.evaluation.encoding import visible_devices

SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {},
}


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    model: str = typer.Option("tiny", help="tiny, small or base: a ViT with patches of 16 pixels."),
    images: int = typer.Option(512, min=64, help="JPEG files of 500 × 375 pixels."),
    batches: list[int] = typer.Option([16, 64], "--batch", min=1, help="Images per forward pass; the best counts."),
    threads: list[int] = typer.Option([1, 2], help="CPU threads, and worker processes."),
    repeats: int = typer.Option(3, min=1, help="Turns of every side."),
) -> None:
    """Print images/s by number of threads and side, and ours divided by the faster peer."""
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data, weights = Path(folder, "images"), Path(folder, "model")
        _make_images(data, images)
        torch.manual_seed(0)
        ViTModel(ViTConfig(**SIZES[model]), add_pooling_layer=False).save_pretrained(weights)
        ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(weights)
        for count in threads:
            torch.set_num_threads(count)
            sides: dict[str, Callable[[], object]] = {}
            for batch in batches:
                sides[f"ours {batch}"] = partial(_ours, weights, data, batch, count)
                sides[f"transformers {batch}"] = partial(_transformers, weights, data, batch)
                sides[f"timm {batch}"] = partial(_timm, model, data, batch, count)
            speed = {side: images / value for side, value in in_turn(sides, repeats=repeats).items()}
            best = {
                name: max(speed[f"{name} {batch}"] for batch in batches) for name in ("ours", "transformers", "timm")
            }
            ratio = best["ours"] / max(best["transformers"], best["timm"])
            document[f"threads_{count}"] = {**best, "ratio": ratio, "by_batch": speed}
            say(f"{count} threads: {', '.join(f'{side} {value:.1f}' for side, value in speed.items())} images/s")
    settings = {"model": model, "images": images, "batches": batches}
    emit({**document, "settings": settings, "machine": machine(), "timm": timm.__version__})


def _make_images(folder: Path, count: int) -> None:
    """Write smooth random pictures as JPEG files."""
    (folder / "class").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"class/{number:05d}.jpg", quality=90)


def _ours(weights: Path, data: Path, batch: int, workers: int) -> None:
    device = visible_devices()[:1]
    embed(weights, str(data), batch_size=batch, num_workers=workers, dtype="float32", devices=device)


@torch.inference_mode()
def _transformers(weights: Path, data: Path, batch: int) -> np.ndarray:
    device = visible_devices()[0]
    processor, model = ViTImageProcessor.from_pretrained(weights), ViTModel.from_pretrained(weights)
    model.to(device).eval()
    files, parts = sorted(data.rglob("*.jpg")), []
    for start in range(0, len(files), batch):
        pictures = [Image.open(path).convert("RGB") for path in files[start : start + batch]]
        hidden = model(**processor(pictures, return_tensors="pt").to(device)).last_hidden_state
        parts.append(hidden[:, 1:].mean(dim=1).cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def _timm(size: str, data: Path, batch: int, workers: int) -> np.ndarray:
    device = visible_devices()[0]
    model = timm.create_model(f"vit_{size}_patch16_224", num_classes=0, global_pool="avg").to(device).eval()
    loader = create_loader(
        create_dataset(name="", root=str(data)),
        input_size=(3, 224, 224),
        batch_size=batch,
        use_prefetcher=device.type == "cuda",
        num_workers=workers,
        device=device,
    )
    return np.concatenate([model(images.to(device)).cpu().numpy() for images, _ in loader])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
