"""`m3i-scale checkpoint prune`: the retention of a run, by hand."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Literal, cast

from m3i_scale.errors import CheckpointError, ConfigError, did_you_mean
from m3i_scale.run.retention import evaluations, rules_document, rules_of_run
from m3i_scale.scale.checkpoint.retention import Best, Metrics, Rules, entries_of, plan_prune, prune, ranked
from m3i_scale.scale.output_dir import lock_directory
from m3i_scale.text import GIB

_BEST = re.compile(r"(?P<metric>[^:]+)(?::(?P<mode>min|max))?(?::(?P<count>[1-9]\d*))?")


def rules_given(
    root: Path, latest: int | None, every: int | None, best: str | None, max_gib: float | None
) -> tuple[Rules, str]:
    """Return the rules of the options, where there is none those of the run file; and which of the two, in words.

    Raises:
        ConfigError: no options and no run file, or an option that says nothing.
        CheckpointError: the run file does not hold together.
    """
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
    limit = None if max_gib is None else max(1, int(max_gib * GIB))
    return Rules(latest or 1, every, None if best is None else _parse_best(best), limit), "the options"


def prune_run(root: Path, rules: Rules, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `checkpoint prune`.

    Raises:
        ConfigError: a rule that keeps nothing here.
        CheckpointError: a job is writing to the run's folder, or the disk refused.
    """
    output_dir = root.absolute().parent
    metrics = evaluations(output_dir)
    with contextlib.nullcontext() if dry_run else lock_directory(output_dir):
        _check_effect(root, rules, metrics)
        pruned = (plan_prune if dry_run else prune)(root, rules, metrics)
    return {
        "root": str(root),
        "dry_run": dry_run,
        "rules": rules_document(rules),
        "kept": {path.name: reasons for path, reasons in pruned.kept.items()},
        "removed": [entry.path.name for entry in pruned.removed],
        "bytes_removed": sum(entry.size for entry in pruned.removed),
        "over_limit": pruned.over_limit,
    }


def _parse_best(text: str) -> Best:
    """`evaluation/loss`, `evaluation/loss:max`, `evaluation/loss:min:3`."""
    match = _BEST.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--keep-best {text}", why="it is FIGURE[:min|max][:count]", fix="e.g. --keep-best evaluation/loss:min:3"
        )
    mode = cast(Literal["min", "max"], match["mode"] or "min")
    return Best(match["metric"], mode, int(match["count"] or 1))


def _check_effect(root: Path, rules: Rules, metrics: Metrics) -> None:
    """Refuse rules that keep nothing here: what was meant to stay must not go because of a slip of the pen."""
    entries = entries_of(root, metrics)
    if not entries:
        raise CheckpointError("no checkpoints here", where=str(root))
    if rules.best is not None and not ranked(entries, rules.best):
        known = sorted({name for entry in entries for name in entry.metrics})
        raise ConfigError(
            f"no checkpoint here has a figure '{rules.best.metric}'",
            where=str(root.absolute().parent / "metrics.jsonl"),
            why="nothing is removed: the best would be among what goes",
            fix=did_you_mean(rules.best.metric, known) if known else "the run has evaluated nothing at these steps",
        )
    every = rules.every_steps
    if every is not None and all(entry.step % every for entry in entries):
        steps = ", ".join(str(entry.step) for entry in entries[:8])
        raise ConfigError(
            f"no checkpoint here is of a multiple of {every} steps",
            where=str(root),
            why="nothing is removed: what was to stay would be among what goes",
            fix=f"the steps are {steps}{' …' if len(entries) > 8 else ''}",
        )
