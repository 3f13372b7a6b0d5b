"""Load an export with stock transformers, in a process that does not know the training package.

    python -I launchers/_reload.py EXPORT SHARDS

Prints what was loaded and the shape of its output for the first picture of the shards.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel


def first_picture(shards: Path) -> Image.Image:
    """The first image of the first shard."""
    with tarfile.open(min(shards.glob("*.tar"))) as tar:
        for member in tar:
            if Path(member.name).suffix in (".png", ".jpg", ".webp"):
                return Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
    raise SystemExit(f"no picture in {shards}")


def main(export: Path, shards: Path) -> None:
    """See the module."""
    model = AutoModel.from_pretrained(export, local_files_only=True, trust_remote_code=False).eval()
    processor = AutoImageProcessor.from_pretrained(export, local_files_only=True, trust_remote_code=False)
    inputs = processor(first_picture(shards), return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs).last_hidden_state
    if "m3i_scale" in sys.modules:
        raise SystemExit("the training package was loaded")
    if not torch.isfinite(output).all():
        raise SystemExit("the output is not finite")
    print(f"{type(processor).__name__} → {type(model).__name__} → last_hidden_state {tuple(output.shape)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
