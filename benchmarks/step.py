"""One training step of ours against its published peer: same sizes, batch, dtype and threads, measured in turn.

`clip` against open_clip's own model, loss and step; `mae` against `transformers` ViTMAEForPreTraining. Our side is the
whole engine step (DeepSpeed, gradient clipping off as in the peers), on one rank. Each peer has the optimizer that its
own trainer takes: open_clip torch's plain AdamW, transformers the fused one, which ours is too (`clip_fused_peer` is
`clip` with that one for open_clip). Both sides run in one process, so both profit from freed memory that is kept.

In `clip` all captions fill open_clip's context of 77 tokens. In `clip_short_captions` both sides get the same real
captions: open_clip's step fills them up to 77, ours to the longest of the batch. A single rank has nothing to share, so
`clip` and `mae` run under ZeRO-1; `clip_zero3` and `mae_zero3` show what the partition costs such a rank.

    python benchmarks/step.py --json
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import typer
from _common import emit, in_turn, machine, need, say
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch, synthetic_batch
from m3i_scale.engine.deepspeed.effective import check_effective
from m3i_scale.engine.deepspeed.resolve import load_ds_config, resolve
from m3i_scale.engine.engine import build_engine
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.objective.build import build_objective, initialize_module

CONTEXT, VOCABULARY = 77, 49408
CLIP = {"image": 224, "patch": 32, "width": 384, "depth": 12, "heads": 6, "batch": 32}
MAE = {"image": 224, "patch": 16, "width": 384, "depth": 12, "heads": 6, "batch": 32}
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
DECODER = {"width": 512, "depth": 8, "heads": 16}
LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.05, (0.9, 0.95), 1e-8


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    repeats: int = 7,
    threads: int = 0,
    deepspeed: str = "zero1_cpu_fp32",
    partitioned: str = "zero3_cpu_fp32",
) -> None:
    """Print {clip: {ours, peer, ratio}, mae: …, clip_short_captions: …, clip_zero3: …, mae_zero3: …}; images/s."""
    need("open_clip")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    start_ranks()
    document: dict[str, object] = {}
    short, full = _tokens(CLIP["batch"], full=False), _tokens(CLIP["batch"], full=True)
    pairs: list[tuple[str, dict[str, int], Callable[[], Callable[[], None]], Callable[[], Callable[[], None]]]] = [
        ("clip", CLIP, lambda: _our_clip(deepspeed, full), lambda: _open_clip(full)),
        ("mae", MAE, lambda: _our_mae(deepspeed), _vit_mae),
        ("clip_fused_peer", CLIP, lambda: _our_clip(deepspeed, full), lambda: _open_clip(full, fused=True)),
        ("clip_short_captions", CLIP, lambda: _our_clip(deepspeed, short), lambda: _open_clip(short)),
        ("clip_zero3", CLIP, lambda: _our_clip(partitioned, full), lambda: _open_clip(full)),
        ("mae_zero3", MAE, lambda: _our_mae(partitioned), _vit_mae),
    ]
    for name, sizes, ours, peer in pairs:
        sides = {"ours": ours(), "peer": peer()}
        seconds = in_turn(sides, repeats=repeats)
        speed = {side: sizes["batch"] / value for side, value in seconds.items()}
        sides.clear()  # engines and peers of this pair, before the next one is built
        gc.collect()
        ratio = speed["ours"] / speed["peer"]
        document[name] = {**speed, "ratio": ratio, "sizes": sizes}
        say(f"{name}: ours {speed['ours']:.2f}, peer {speed['peer']:.2f} images/s, ratio {ratio:.3f}")
    document |= {"dtype": "float32", "threads": torch.get_num_threads(), "deepspeed": deepspeed}
    document |= {"partitioned": partitioned, "machine": machine()}
    stop_ranks(wait=True)
    emit(document)


def _tokens(count: int, *, full: bool) -> torch.Tensor:
    """Captions as open_clip's tokenizer gives them: (B, 77), 0 after the end."""
    import open_clip

    if full:
        return torch.randint(3, VOCABULARY, (count, CONTEXT))
    captions = [CAPTIONS[index % len(CAPTIONS)] + f", picture {index}" for index in range(count)]
    tokens: torch.Tensor = open_clip.get_tokenizer("ViT-B-32")(captions)
    return tokens


def _batch(sizes: dict[str, int], tokens: torch.Tensor | None) -> Batch:
    """Random images; captions without the columns that are padding in all rows."""
    count = sizes["batch"]
    batch = synthetic_batch(count, 1, image=sizes["image"], tokens=1, classes=1, vocabulary=VOCABULARY)
    if tokens is None:
        return batch
    shown = tokens[:, (tokens != 0).any(dim=0)]
    return replace(batch, text_ids_BT=shown, text_mask_BT=shown != 0)


def _our_step(run: RunConfig, deepspeed: str, batch: Batch, vocabulary: int | None) -> Callable[[], None]:
    resolved = resolve(
        load_ds_config(deepspeed),
        world_size=1,
        batch_size=len(batch),
        micro_batch_size=len(batch),
        clip_grad_norm=0.0,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        hidden_size=384,
        where=deepspeed,
    )
    engine = build_engine(
        lambda: build_objective(run, {}, vocabulary),
        lambda module: initialize_sharded(module, initialize_module, seed=0),
        resolved.config,
        weight_decay=WEIGHT_DECAY,
    )
    check_effective(engine, resolved)
    on_device = batch.to(get_accelerator().current_device_name())

    def step() -> None:
        loss, _ = engine(on_device)
        engine.backward(loss)
        engine.step()

    return step


def _backbone(sizes: dict[str, int]) -> str:
    fields = (
        f"image_size: {sizes['image']}, patch_size: {sizes['patch']}, hidden_size: {sizes['width']}, "
        f"num_hidden_layers: {sizes['depth']}, num_attention_heads: {sizes['heads']}, "
        f"intermediate_size: {4 * sizes['width']}"
    )
    return f"backbone.config={{{fields}}}"


def _our_clip(deepspeed: str, tokens: torch.Tensor) -> Callable[[], None]:
    width, depth, heads = CLIP["width"], CLIP["depth"], CLIP["heads"]
    text = (
        f"text.config={{hidden_size: {width}, num_hidden_layers: {depth}, num_attention_heads: {heads}, "
        f"intermediate_size: {4 * width}, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}"
    )
    overrides = [_backbone(CLIP), text, f"text.max_tokens={CONTEXT}", f"recipe.targets.0.width={width}"]
    return _our_step(load_run("clip", overrides), deepspeed, _batch(CLIP, tokens), VOCABULARY)


def _our_mae(deepspeed: str) -> Callable[[], None]:
    run = load_run("mae", [_backbone(MAE)])
    return _our_step(run, deepspeed, _batch(MAE, None), None)


def _peer_step(model: torch.nn.Module, forward: Callable[[], Any], *, fused: bool | None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused
    )

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return step


def _open_clip(tokens: torch.Tensor, *, fused: bool | None = None) -> Callable[[], None]:
    import open_clip

    vision = {"image_size": CLIP["image"], "layers": CLIP["depth"], "width": CLIP["width"], "patch_size": CLIP["patch"]}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": CLIP["width"], "heads": CLIP["heads"]}
    device = get_accelerator().current_device_name()
    model = open_clip.CLIP(CLIP["width"], vision, text | {"layers": CLIP["depth"]}).to(device).train()
    loss = open_clip.ClipLoss()
    images = torch.randn(CLIP["batch"], 3, CLIP["image"], CLIP["image"], device=device)
    captions = tokens.to(device)

    def forward() -> Any:
        image_features, text_features, scale = model(images, captions)
        return loss(image_features, text_features, scale)

    return _peer_step(model, forward, fused=fused)


def _vit_mae() -> Callable[[], None]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=MAE["width"],
        num_hidden_layers=MAE["depth"],
        num_attention_heads=MAE["heads"],
        intermediate_size=4 * MAE["width"],
        image_size=MAE["image"],
        patch_size=MAE["patch"],
        decoder_hidden_size=DECODER["width"],
        decoder_num_hidden_layers=DECODER["depth"],
        decoder_num_attention_heads=DECODER["heads"],
        decoder_intermediate_size=4 * DECODER["width"],
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    device = get_accelerator().current_device_name()
    model = ViTMAEForPreTraining(config).to(device).train()
    images = torch.randn(MAE["batch"], 3, MAE["image"], MAE["image"], device=device)
    return _peer_step(model, lambda: model(pixel_values=images).loss, fused=True)


if __name__ == "__main__":
    typer.run(main)
