"""How far from uniform batches are: our order, webdataset's and Megatron-Energon's, with the samples each holds for it.

All read the same shards: one class a shard, as a crawl, a sort or a download leaves them. Measured is the order in
which keys really came, over two passes, with the measures of `benchmarks/clumping.py`.

    python benchmarks/shuffle.py --json
"""

from __future__ import annotations

import importlib.util
import tempfile
from importlib.metadata import version
from pathlib import Path

import typer
from _common import emit, machine, say
from _shuffle import Setting, make_shards, measured

ENERGON = "megatron-energon"
HOW_TO_INSTALL = "python -m pip install -e '.[peers]'"


def settings(samples: int, streams: int, buffers: list[int], ranks: int) -> list[Setting]:
    """Ours at several windows and streams; the others with so many samples in their buffers, over all ranks."""
    found = [Setting("uniform", 1, {}, samples)]
    found += [Setting("ours", 1, {"streams": streams, "shuffle_shards": window}, 0) for window in (1, 4, 8, 16)]
    found.append(Setting("ours", 1, {"streams": 2 * streams, "shuffle_shards": 4}, 0))
    found.append(Setting("ours", ranks, {"streams": streams, "shuffle_shards": 4}, 0))
    found.append(Setting("webdataset", 1, {"buffer": buffers[0], "detshuffle": False}, buffers[0]))
    for buffer in buffers:
        for count in (1, ranks):
            each = buffer // count
            found.append(Setting("webdataset", count, {"buffer": each, "detshuffle": True}, buffer))
            for longest in (None, 100) if count == 1 else (None,):
                options = {"shuffle_buffer_size": each, "max_samples_per_sequence": longest}
                found.append(Setting("energon", count, options, buffer))
    return found


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    shards: int = typer.Option(128, min=2, help="Shards, all of one size."),
    samples_per_shard: int = typer.Option(250, min=2),
    shards_per_class: int = typer.Option(4, min=1, help="So many shards, one behind the other, hold one class."),
    batch_size: int = typer.Option(256, min=2, help="Over all ranks."),
    streams: int = typer.Option(8, min=1, help="Ours; so many and twice so many."),
    buffers: str = typer.Option("1000,5000", help="Samples that the others hold, over all ranks."),
    ranks: int = typer.Option(8, min=2, help="What is also measured on so many."),
    seed: int = 0,
) -> None:
    """Print {loaders: [{loader, options, held_samples, batch, rank, epoch_correlation, …}], not_measured, …}."""
    wanted = settings(shards * samples_per_shard, streams, [int(buffer) for buffer in buffers.split(",")], ranks)
    missing = {}
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.energon") is None:
        missing[ENERGON] = {"reason": "not installed", "fix": HOW_TO_INSTALL}
        say(f"{ENERGON} is not installed and left out: {HOW_TO_INSTALL}")
        wanted = [setting for setting in wanted if setting.loader != "energon"]
    results = []
    with tempfile.TemporaryDirectory() as name:
        say(f"{shards} shards of {samples_per_shard} samples …")
        made = make_shards(Path(name) / "shards", shards, samples_per_shard, shards_per_class)
        for setting in wanted:
            say(f"{setting.loader} on {setting.ranks} rank(s), {setting.options} …")
            results.append(measured(made, setting, batch_size, seed, Path(name) / "index"))
            found = results[-1]
            say(f"  clumping {found['batch']['clumping']:.2f}, correlation {found['epoch_correlation']:.3f}")
    emit(
        {
            "loaders": results,
            "not_measured": missing,
            "shards": shards,
            "samples_per_shard": samples_per_shard,
            "shards_per_class": shards_per_class,
            "batch_size": batch_size,
            "seed": seed,
            "versions": {peer: version(peer) for peer in ("webdataset", ENERGON) if peer not in missing},
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    typer.run(main)
