"""One training step of ours against its published peer: same sizes, batch, dtype and threads, measured in turn.

Pairs and peers (`_step_peers.py`):

- `clip`, `siglip`: models and losses of open_clip.
- `mae`: ViTMAEForPreTraining of `transformers`.
- `supervised`: ViT, loss and optimizer of timm's train.py.
- `dinov2`: the step of lightly's example `examples/pytorch/dinov2.py`.

Our side (`_step_ours.py`) is the complete engine step on one rank, with the EMA update of a teacher. Gradient clipping
is off, as in the peers. Each peer has the optimizer of its training code: fused AdamW in `transformers`, plain AdamW of
torch in the others. Ours is fused; `clip_fused_peer` is `clip` with fused AdamW for open_clip. Both sides run in one
process, so both profit from freed memory that is kept. A pair with more than 1 % difference in trainable parameters is
an error.

In `clip` and `siglip`, all captions fill the context. In `clip_short_captions`, both sides get the same real captions:
open_clip pads them to 77 tokens, ours to the longest of the batch. One rank has nothing to partition, so pairs run
under ZeRO-1. `clip_zero3` and `mae_zero3` show the cost of partitioning. In the pairs `NAME_compiled`, the peer is our
own step without `backbone.compile`.

Differences between the sides:

- Ours normalizes uint8 images within the step; the peers get normalized images from their data loaders.
- `clip`: our text encoder is BERT, and its last layer computes only the first token. open_clip has a causal encoder.
- `siglip`: none. The peer is the map-head model of open_clip's SigLIP configurations with a ViT-S/32.
- `supervised`: none. Our recipe reads the class token here, as timm does, instead of the mean of the patches.
- `dinov2`: both sides use separate heads, centering instead of our recipe's Sinkhorn, and no stochastic depth. Lightly
  masks exactly half of the global crops, with a new mask in each step. Ours masks each crop with probability 0.5, and
  repeats one batch with about the mean number of masked patches. Our prototypes are unit vectors; those of lightly have
  a learned norm. Lightly keeps the unused classifier of timm's ViT.

    python benchmarks/step.py --json
    python benchmarks/step.py --json --only dinov2 --only siglip --repeats 3
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
import typer
from _common import emit, in_turn, machine, need, say
from _step_ours import our_clip_step, our_dinov2_step, our_mae_step, our_siglip_step, our_supervised_step
from _step_peers import (
    CLASSES,
    CLIP,
    CONTEXT,
    DINOV2,
    MAE,
    SIGLIP,
    SIGLIP_CONTEXT,
    SIGLIP_VOCABULARY,
    SUPERVISED,
    VOCABULARY,
    Side,
    lightly_dinov2_step,
    open_clip_siglip_step,
    open_clip_step,
    timm_step,
    vit_mae_step,
)

from m3i_scale.engine.process_group import start_ranks, stop_ranks

CAPTIONS = (
    "a dog running along the beach with a stick in its mouth",
    "two people riding bicycles through a busy city street at night",
    "a bowl of soup",
    "the old stone bridge across the river in early spring, seen from the northern bank with the town behind it",
    "a red bus",
    "close-up of a hand holding a small green leaf against the light",
    "a kitchen with white cupboards, a wooden table and a large window that looks out on a garden",
    "snow covered mountains under a clear sky",
)
PARAMETER_TOLERANCE = 0.01


class Pair(NamedTuple):
    """A step of ours, the step of the peer, and their sizes."""

    sizes: dict[str, int]
    package: str
    ours: Callable[[], Side]
    peer: Callable[[], Side]


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    repeats: int = 7,
    threads: int = 0,
    deepspeed: str = "zero1_cpu_fp32",
    partitioned: str = "zero3_cpu_fp32",
    only: list[str] = typer.Option([], help="Pair to measure; repeatable. Default: all."),
) -> None:
    """Measure pairs of steps, and print {PAIR: {ours, peer, ratio, sizes}, …} in images/s."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    pairs = _pairs(deepspeed, partitioned)
    for name in only:
        if name not in pairs:
            raise typer.BadParameter(f"'{name}' must be one of {', '.join(pairs)}", param_hint="--only")
    pairs = {name: pair for name, pair in pairs.items() if not only or name in only}
    for package in {pair.package for pair in pairs.values()}:
        need(package)
    start_ranks()
    document: dict[str, object] = {}
    for name, pair in pairs.items():
        sides = {"ours": pair.ours(), "peer": pair.peer()}
        counts = {side: built.parameters for side, built in sides.items()}
        say(f"{name}: trainable parameters: ours {counts['ours']:,}, peer {counts['peer']:,}")
        if abs(counts["ours"] / counts["peer"] - 1) > PARAMETER_TOLERANCE:
            raise ValueError(f"the trainable parameters of '{name}' must differ by 1 % at most, got {counts}")
        seconds = in_turn({side: built.step for side, built in sides.items()}, repeats=repeats)
        speed = {side: pair.sizes["batch"] / value for side, value in seconds.items()}
        sides.clear()  # engines and peers of this pair, before the next one is built
        gc.collect()
        ratio = speed["ours"] / speed["peer"]
        document[name] = {**speed, "ratio": ratio, "sizes": pair.sizes}
        say(f"{name}: ours {speed['ours']:.2f}, peer {speed['peer']:.2f} images/s, ratio {ratio:.3f}")
    document |= {"dtype": "float32", "threads": torch.get_num_threads(), "deepspeed": deepspeed}
    document |= {"partitioned": partitioned, "machine": machine()}
    stop_ranks(wait=True)
    emit(document)


def _pairs(deepspeed: str, partitioned: str) -> dict[str, Pair]:
    full = torch.randint(3, VOCABULARY, (CLIP["batch"], CONTEXT))
    siglip = torch.randint(3, SIGLIP_VOCABULARY, (SIGLIP["batch"], SIGLIP_CONTEXT))
    labels = torch.randint(0, CLASSES, (SUPERVISED["batch"],))

    def clip(config: str, tokens: Callable[[], torch.Tensor] = lambda: full, *, fused: bool | None = None) -> Pair:
        return Pair(
            CLIP, "open_clip", lambda: our_clip_step(config, tokens()), lambda: open_clip_step(tokens(), fused=fused)
        )

    def mae(config: str) -> Pair:
        return Pair(MAE, "transformers", lambda: our_mae_step(config), vit_mae_step)

    def compiled(sizes: dict[str, int], step: Callable[..., Side]) -> Pair:
        return Pair(sizes, "m3i_scale", lambda: step("backbone.compile=true"), step)

    return {
        "clip": clip(deepspeed),
        "mae": mae(deepspeed),
        "siglip": Pair(
            SIGLIP, "open_clip", lambda: our_siglip_step(deepspeed, siglip), lambda: open_clip_siglip_step(siglip)
        ),
        "supervised": Pair(
            SUPERVISED, "timm", lambda: our_supervised_step(deepspeed, labels), lambda: timm_step(labels)
        ),
        "dinov2": Pair(DINOV2, "lightly", lambda: our_dinov2_step(deepspeed), lightly_dinov2_step),
        "clip_fused_peer": clip(deepspeed, fused=True),
        "clip_short_captions": clip(deepspeed, _short_captions),
        "clip_zero3": clip(partitioned),
        "mae_zero3": mae(partitioned),
        "clip_compiled": compiled(CLIP, lambda *options: our_clip_step(deepspeed, full, *options)),
        "mae_compiled": compiled(MAE, lambda *options: our_mae_step(deepspeed, *options)),
        "dinov2_compiled": compiled(DINOV2, lambda *options: our_dinov2_step(deepspeed, *options)),
    }


def _short_captions() -> torch.Tensor:
    """Tokenize captions as open_clip does: (B, 77), 0 after the end."""
    import open_clip

    captions = [CAPTIONS[index % len(CAPTIONS)] + f", picture {index}" for index in range(CLIP["batch"])]
    tokens: torch.Tensor = open_clip.get_tokenizer("ViT-B-32")(captions)
    return tokens


if __name__ == "__main__":
    typer.run(main)
