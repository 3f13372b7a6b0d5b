"""A tiny stock ViT and shards whose classes differ in color."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.records import ListedInput, Record

LABELS = ["warm", "cold", "green"]
_COLOURS = [(220, 60, 40), (40, 80, 220), (40, 200, 60)]


class Picture:
    """A noisy patch of one color."""

    def __init__(self, label, seed):
        self.label, self.seed = label, seed

    def __call__(self):
        noise = np.random.default_rng(self.seed).integers(-40, 40, (36, 48, 3))
        pixels = np.clip(np.array(_COLOURS[self.label]) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()


def make_records(count=24, styles=3, meta=True, labels=True):
    """`count` concepts, two to a family, in several styles; every fourth family is for validation."""
    return [
        Record(
            key=f"s{style}-c{number}",
            image=Picture(number % 3, 100 * number + style),
            caption=f"thing {number}",
            label=number % 3 if labels else None,
            meta={"concept": f"c{number}", "family": f"f{number // 2}", "group": LABELS[number % 3]} if meta else {},
            split="val" if (number // 2) % 4 == 0 else "train",
        )
        for number in range(count)
        for style in range(styles)
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "shards"
    make_shards(
        ListedInput(make_records(), LABELS), output, name="things", options=ShardOptions(multiple_of=2, vocabulary=0)
    )
    return output


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    """A plain Hub folder: a random ViT with its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    folder = tmp_path_factory.mktemp("models") / "vit"
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records_of():
    """`make_records`, for shards of another kind."""
    return make_records
