"""`m3i-scale checkpoint prune`: apply retention rules manually."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Literal, cast

from m3i_scale.checkpoint.listing import rules_of_run
from m3i_scale.checkpoint.retention import Metrics, entries_of, plan_prune, prune, ranked
from m3i_scale.checkpoint.retention_checks import evaluations
from m3i_scale.config import KeepBestConfig, RetentionConfig
from m3i_scale.errors import CheckpointError, ConfigError, did_you_mean
from m3i_scale.host.output_dir import lock_directory

_BEST = re.compile(r"(?P<metric>[^:]+)(?::(?P<mode>min|max))?(?::(?P<count>[1-9]\d*))?")


def rules_given(
    root: Path, latest: int | None, every: int | None, best: str | None, max_gib: float | None
) -> tuple[RetentionConfig, str]:
    """Return the rules of the options, or of the config if there are none, and a description of their origin."""
    if latest is None and every is None and best is None:
        if max_gib is not None:
            raise ConfigError(
                "--max-gib is a limit, and no option says what stays within it",
                why="nothing is removed: all but the newest would be among what goes",
                fix="say what stays as well, e.g. --keep-latest 10",
            )
        run_file = root.absolute().parent / "run.yaml"
        rules = rules_of_run(root)
        if rules is None:
            raise ConfigError(
                "no rules: there is no run file beside the checkpoints",
                where=str(run_file),
                fix="say what stays, e.g. --keep-latest 2",
            )
        return rules, str(run_file)
    if max_gib == 0:
        raise ConfigError("--max-gib 0 leaves no room", fix="give the GiB that all together may take")
    wanted = None if best is None else _parse_best(best)
    rules = RetentionConfig(keep_latest=latest or 1, keep_every_steps=every, keep_best=wanted, max_gib=max_gib)
    return rules, "the options"


def prune_run(root: Path, rules: RetentionConfig, *, dry_run: bool) -> dict[str, Any]:
    """Prune the checkpoints of a run and return the document of `checkpoint prune`."""
    output_dir = root.absolute().parent
    metrics = evaluations(output_dir)
    with contextlib.nullcontext() if dry_run else lock_directory(output_dir):
        _check_effect(root, rules, metrics)
        pruned = (plan_prune if dry_run else prune)(root, rules, metrics)
    return {
        "root": str(root),
        "dry_run": dry_run,
        "rules": rules.model_dump(),
        "kept": {path.name: reasons for path, reasons in pruned.kept.items()},
        "removed": [entry.path.name for entry in pruned.removed],
        "bytes_removed": sum(entry.size for entry in pruned.removed),
        "over_limit": pruned.over_limit,
    }


def _parse_best(text: str) -> KeepBestConfig:
    """Parse `evaluation/loss:min:3`; mode and count are optional."""
    match = _BEST.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--keep-best {text}", why="it is FIGURE[:min|max][:count]", fix="e.g. --keep-best evaluation/loss:min:3"
        )
    mode = cast(Literal["min", "max"], match["mode"] or "min")
    return KeepBestConfig(metric=match["metric"], mode=mode, count=int(match["count"] or 1))


def _check_effect(root: Path, rules: RetentionConfig, metrics: Metrics) -> None:
    """Validate that every rule matches a checkpoint, so that a typo cannot delete checkpoints that should be kept."""
    entries = entries_of(root, metrics)
    if not entries:
        raise CheckpointError("no checkpoints here", where=str(root))
    best, every = rules.keep_best, rules.keep_every_steps
    if best is not None and not ranked(entries, best):
        known = sorted({name for entry in entries for name in entry.metrics})
        raise ConfigError(
            f"no checkpoint here has a figure '{best.metric}'",
            where=str(root.absolute().parent / "metrics.jsonl"),
            why="nothing is removed: the best would be among what goes",
            fix=did_you_mean(best.metric, known) if known else "the run has evaluated nothing at these steps",
        )
    if every is not None and all(entry.step % every for entry in entries):
        steps = ", ".join(str(entry.step) for entry in entries[:8])
        raise ConfigError(
            f"no checkpoint here is of a multiple of {every} steps",
            where=str(root),
            why="nothing is removed: what was to stay would be among what goes",
            fix=f"the steps are {steps}{' …' if len(entries) > 8 else ''}",
        )
