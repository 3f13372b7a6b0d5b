"""`checkpoint prune`: the retention of a run, by hand."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Literal, cast

from m3i_scale.errors import CheckpointError, ConfigError, did_you_mean
from m3i_scale.run.checkpoints.listing import rules_document
from m3i_scale.run.checkpoints.places import Place, rules_of_run, run_file
from m3i_scale.run.retention import GIB, evaluations
from m3i_scale.scale.checkpoint.lock import lock_directory
from m3i_scale.scale.checkpoint.pruning import Metrics, Pruned, entries_of, plan_prune, remove_checkpoints
from m3i_scale.scale.checkpoint.retention import Best, Rules, ranked

_BEST = re.compile(r"(?P<metric>[^:]+)(?::(?P<mode>min|max))?(?::(?P<count>[1-9]\d*))?")


def rules_given(
    place: Place, latest: int | None, every: int | None, best: str | None, max_gib: float | None
) -> tuple[Rules, str]:
    """The rules of the options, where there is none those of the run file; and which of the two, in words.

    Raises:
        ConfigError: no options and no run file, or an option that says nothing.
        CheckpointError: the run file does not hold together.
    """
    if latest is None and every is None and best is None and max_gib is None:
        rules = rules_of_run(place)
        if rules is None:
            raise ConfigError(
                "no rules: there is no run file beside the checkpoints",
                where=str(run_file(place)),
                fix="say what stays, e.g. --keep-latest 2",
            )
        return rules, str(run_file(place))
    if latest is None and every is None and best is None:
        raise ConfigError(
            "--max-gib is a limit, and no option says what stays within it",
            why="nothing is removed: all but the newest would be among what goes",
            fix="say what stays as well, e.g. --keep-latest 10",
        )
    if max_gib == 0:
        raise ConfigError("--max-gib 0 leaves no room", fix="give the GiB that all together may take")
    limit = None if max_gib is None else max(1, int(max_gib * GIB))
    return Rules(latest or 1, every, None if best is None else parse_best(best), limit), "the options"


def parse_best(text: str) -> Best:
    """`evaluation/loss`, `evaluation/loss:max`, `evaluation/loss:min:3`.

    Raises:
        ConfigError: anything else.
    """
    match = _BEST.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--keep-best {text}", why="it is FIGURE[:min|max][:count]", fix="e.g. --keep-best evaluation/loss:min:3"
        )
    mode = cast(Literal["min", "max"], match["mode"] or "min")
    return Best(match["metric"], mode, int(match["count"] or 1))


def prune_run(place: Place, rules: Rules, *, dry_run: bool) -> dict[str, Any]:
    """The document of `checkpoint prune`.

    Raises:
        ConfigError: a rule that keeps nothing here.
        CheckpointError: a job is writing to the run's folder, or the disk refused.
    """
    metrics = evaluations(place.output_dir)
    with contextlib.ExitStack() as stack:
        if not dry_run:
            _lock(place, stack)
        _check_effect(place, rules, metrics)
        planned = plan_prune(place.root, rules, metrics)
        if not dry_run:
            remove_checkpoints(planned)
    return _document(place, rules, planned, dry_run)


def _lock(place: Place, stack: contextlib.ExitStack) -> None:
    try:
        stack.enter_context(lock_directory(place.output_dir))
    except CheckpointError as error:
        raise CheckpointError(
            error.what,
            where=error.where,
            why=error.why,
            fix="prune when the job has ended, or let it keep fewer itself (checkpoint.keep_latest, …); "
            "--dry-run needs no lock",
        ) from None


def _check_effect(place: Place, rules: Rules, metrics: Metrics) -> None:
    """What was meant to stay must not go because of a slip of the pen."""
    entries = entries_of(place.root, metrics)
    if not entries:
        raise CheckpointError("no checkpoints here", where=str(place.root))
    if rules.best is not None and not ranked(entries, rules.best):
        known = sorted({name for entry in entries for name in entry.metrics})
        raise ConfigError(
            f"no checkpoint here has a figure '{rules.best.metric}'",
            where=str(place.output_dir / "metrics.jsonl"),
            why="nothing is removed: the best would be among what goes",
            fix=did_you_mean(rules.best.metric, known) if known else "the run has evaluated nothing at these steps",
        )
    every = rules.every_steps
    if every is not None and all(entry.step % every for entry in entries):
        steps = ", ".join(str(entry.step) for entry in entries[:8])
        raise ConfigError(
            f"no checkpoint here is of a multiple of {every} steps",
            where=str(place.root),
            why="nothing is removed: what was to stay would be among what goes",
            fix=f"the steps are {steps}{' …' if len(entries) > 8 else ''}",
        )


def _document(place: Place, rules: Rules, planned: Pruned, dry_run: bool) -> dict[str, Any]:
    sizes = {entry.path: entry.size for entry in planned.going}
    removed = [entry.path for entry in planned.going] if dry_run else planned.removed
    return {
        "root": str(place.root),
        "dry_run": dry_run,
        "rules": rules_document(rules),
        "kept": {path.name: reasons for path, reasons in planned.kept.items()},
        "removed": [path.name for path in removed],
        "in_use": [path.name for path in planned.in_use],
        "bytes_removed": sum(sizes[path] for path in removed),
        "over_limit": planned.over_limit,
    }
