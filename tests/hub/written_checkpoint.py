"""A committed checkpoint as a run on two ranks writes it."""

import json

from safetensors.torch import save_file
from saved_tensors import write_as_ranks

from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.stream import Range, buffers_of
from m3i_scale.objective.build import ema_pairs
from m3i_scale.run.setup import run_yaml


def write_checkpoint(final, run, objective, step, vocab_size, tokenizer, label_sets, identity=None):
    meta = {
        "identity": identity or {},
        "step": step,
        "world_size": 2,
        "label_sets": label_sets,
        "vocab_size": vocab_size,
        "tokenizer": str(tokenizer),
    }
    folder = begin(final)
    tensors = {key_of(name): tensor for name, tensor in objective.named_parameters()}
    write_as_ranks(folder, tensors, [halves_of(objective, rank) for rank in (0, 1)])
    save_file(buffers_of(objective), folder / "buffers.safetensors")
    meta["averages"] = {target: name for name, target in ema_pairs(objective)}
    (folder / "run.yaml").write_text(run_yaml(run))
    (folder / "meta.json").write_text(json.dumps(meta))
    commit(final, folder, meta)


def key_of(name):
    return f"{'average' if name.startswith('momentum.') else 'weight'}/{name}"


def halves_of(objective, rank):
    """What a rank of two writes: the first or the second half of every tensor."""
    found = []
    for name, tensor in objective.named_parameters():
        flat = tensor.detach().float().flatten()
        half = flat.chunk(2)[rank] if len(flat) > 1 else flat[: 1 - rank]
        start = rank * len(flat.chunk(2)[0])
        found.append(Range(key_of(name), start, (half,)))
    return [piece for piece in found if piece.numel]
