"""What ZeRO-3 gathers after an update of the average is the new average, however late the device gets to write it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _rows import Rows
from rank_parts import RankParts

from m3i_scale.engine.partition import gather_stream, local_values
from m3i_scale.engine.process_group import stop_ranks
from m3i_scale.run.setup import start_engine

SPIN_CYCLES = 400_000_000
"""A fifth of a second or more, in which whatever does not wait reads the old values."""


def measure(mode: str, rows: Rows) -> None:
    """Row: copies that are made in the stream of gathers, as a gather makes them on more than one rank."""
    with tempfile.TemporaryDirectory() as folder:
        parts = RankParts(Path(folder))
        engine, ema = start_engine(parts.plan("zero3_bf16", "m3i"), parts.ranks)
        parts._train_step(engine, 0)
        named = dict(engine.module.named_parameters())
        targets = {name: local_values(named[name]) for name in ema.online_names()}
        torch.cuda.synchronize()
        before = {name: values.clone() for name, values in targets.items()}
        torch.cuda._sleep(SPIN_CYCLES)
        ema.update(0.0)  # the average becomes the online weights
        with torch.cuda.stream(gather_stream(engine)):
            gathered = {name: values.clone() for name, values in targets.items()}
        with torch.cuda.stream(torch.cuda.Stream()):
            unordered = {name: values.clone() for name, values in targets.items()}
        torch.cuda.synchronize()
        stale = [name for name, values in targets.items() if not torch.equal(values, gathered[name])]
        rows.must("parameters gathered before they were written", [], stale, ok=not stale)
        early = sum(not torch.equal(values, unordered[name]) for name, values in targets.items())
        rows.must("a stream that does not wait reads old values", "> 0", early, ok=early > 0)
        moved = sum(not torch.equal(values, before[name]) for name, values in targets.items())
        rows.must("parameters that moved", "> 0", moved, ok=moved > 0)
        stop_ranks(wait=True)
