"""Tiny CLIP and SigLIP models with random weights and a tokenizer of letters, and what they compute."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

POSITIONS = 12
CAPTIONS = ("a b c", "d e", "f g h i j k l m n o p q r s", "t")
WIDTHS = {"clip": 40, "siglip": None}
"""`width` of the text target."""
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE = {"hidden_size": 64, "intermediate_size": 128, "image_size": 32, "patch_size": 8, **_LAYERS}
_TEXT = {
    **{"hidden_size": 48, "intermediate_size": 96, "vocab_size": 30, "max_position_embeddings": POSITIONS, **_LAYERS},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
}


def write_model(kind: str, folder: Path, positions: int = POSITIONS, width: int = 40) -> Path:
    """A folder as published: model, image processor and tokenizer. SigLIP's scale is above CLIP's limit of 100."""
    torch.manual_seed(3)
    if kind == "clip":
        text = _TEXT | {"projection_dim": width, "max_position_embeddings": positions}
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=_IMAGE, projection_dim=width))
    else:
        model = SiglipModel(SiglipConfig(text_config=_TEXT | {"projection_size": 64}, vision_config=_IMAGE))
        with torch.no_grad():
            model.logit_scale.fill_(4.9)
            model.logit_bias.fill_(-12.5)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero in a new model
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BitImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 32}, crop_size=size
    ).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    letters = [chr(ord("a") + number) for number in range(26)]
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<bos>", 2), ("<eos>", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@functools.cache
def tokens(folder: Path, fixed_length: bool) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if fixed_length else "longest"
    options = {"padding": padding, "truncation": True, "max_length": POSITIONS, "return_tensors": "pt"}
    found = tokenizer(list(CAPTIONS), return_token_type_ids=False, return_attention_mask=True, **options)
    return dict(found)


def stock_logits(kind: str, folder: Path, pixels_BCHW: Tensor, model: Any = None, of: Path | None = None) -> Tensor:
    """What the model of a folder computes for `CAPTIONS`; SigLIP sees padding."""
    model = model or AutoModel.from_pretrained(folder)
    inputs = tokens(of or folder, kind == "siglip")
    if kind == "siglip":
        inputs = {"input_ids": inputs["input_ids"]}
    logits: Tensor = model(pixel_values=pixels_BCHW, **inputs).logits_per_image
    return logits
