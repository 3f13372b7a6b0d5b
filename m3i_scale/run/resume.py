"""Resuming from a checkpoint: find it and verify the settings that must not change. All other settings can change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.layout import read_meta
from m3i_scale.checkpoint.manifest import newest_good, verify
from m3i_scale.config import OptimConfig, RunConfig, parse_section, read_yaml
from m3i_scale.config.optim import learning_rate
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.objective.recipe import meaning
from m3i_scale.run.setup import ResolvedRun, run_yaml
from m3i_scale.run.software import software_versions
from m3i_scale.text import format_differences, known_part, listed

_SHOWN_CHANGES = 5


def find_resume(run: RunConfig, *, contents: bool = True) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, and notes on checkpoints that were skipped as invalid. `contents` verifies
    every byte of the checkpoint, so only use it on one rank; for False, see `verify`."""
    root = run.output_dir / "checkpoints"
    if run.checkpoint.resume not in ("auto", "never"):
        named = Path(run.checkpoint.resume)
        errors = verify(named, contents=contents) if named.is_dir() else ["no such folder"]
        if errors:
            raise CheckpointError(f"cannot resume: {errors[0]}", where=str(named), fix="set checkpoint.resume=auto")
        newest, _ = newest_good(root, contents=contents)
        if newest is None or int(read_meta(newest)["step"]) <= int(read_meta(named)["step"]):
            return named, []
        if named.resolve().parent == root.resolve():
            raise CheckpointError(
                f"the run has newer valid checkpoints than checkpoint.resume: {newest.name}",
                where=str(named),
                fix="set checkpoint.resume=auto; to branch off, name the checkpoint and set another output_dir",
            )
        return newest, [f"resuming from {newest.name} of this run, which is newer than {named}"]
    newest, passed = newest_good(root, contents=contents)
    notes = [f"passed over {path.name}: {reason}" for path, reason in passed]
    if run.checkpoint.resume == "never" and (newest or passed):
        raise CheckpointError(
            "checkpoint.resume is 'never', but the output directory has checkpoints",
            where=str(root),
            fix="set another output_dir, or checkpoint.resume=auto",
        )
    if newest is None and passed:
        raise CheckpointError(
            "no checkpoint of the run is valid",
            where="; ".join(notes),
            fix="move them to another folder to start from step 0",
        )
    if newest is None and run.data.changed_datasets:
        raise ConfigError(
            "data.changed_datasets has no effect: the run starts from step 0",
            where="data.changed_datasets",
            fix="remove it; to resume from another run, name its checkpoint in checkpoint.resume",
        )
    return newest, notes


def check_resume(resolved: ResolvedRun, checkpoint: Path, world_size: int) -> list[str]:
    """Validate that a run can resume from a checkpoint: same model and recipe, and not past the last step. Return notes
    on changed settings. Call it on one rank: it can read complete teachers."""
    meta = read_meta(checkpoint)
    _check_identity(resolved, checkpoint, meta)
    if meta["step"] > resolved.run.optim.steps:
        raise CheckpointError(
            f"optim.steps must be at least {meta['step']}, the step of the checkpoint, got {resolved.run.optim.steps}",
            where=str(checkpoint),
            fix="raise optim.steps, or set another output_dir",
        )
    return [*_changes(resolved, checkpoint, meta, world_size)]


_OF_THE_SCHEDULE = {"steps", "warmup_steps", "lr", "min_lr", "layer_decay", "schedule", "momentum_correction"}


def _changes(resolved: ResolvedRun, checkpoint: Path, meta: dict[str, Any], world_size: int) -> Iterator[str]:
    """Yield notes on changes of the parallel layout, the schedule, and the stages."""
    run, step, now = resolved.run, int(meta["step"]), computed_shape(resolved, int(meta["step"]), world_size)
    for key, value in now.items():
        if key != "compared" and meta.get(key) != value:
            yield f"resharded: {key} was {meta.get(key)}, is {value}"
    if resolved.recipe.uses_batch_statistics and meta.get("compared") != now["compared"]:
        yield (
            f"the global contrastive batch is {now['compared']}, was {meta.get('compared')}: losses change their value "
            "here (optim.contrastive_batch, optim.micro_batch_size × ranks)"
        )
    if step < run.optim.steps:
        before = saved_optim(checkpoint)
        values = [optim.model_dump(mode="json", include=_OF_THE_SCHEDULE) for optim in (before, run.optim)]
        if changes := format_differences("optim", *values):
            note = f"the schedule changed: {', '.join(changes)}"
            rate, then = (learning_rate(step, optim) for optim in (run.optim, before))
            if rate != then:
                note += f"; the learning rate of step {step + 1} is {rate:.3g} instead of {then:.3g}"
            yield note
    stages = [stage.model_dump() for stage in run.stages]
    if changes := format_differences("stages", meta.get("stages", []), stages):
        yield f"stages changed: {', '.join(changes)}"


def saved_optim(checkpoint: Path) -> OptimConfig:
    """Return the section `optim` of the run that saved a checkpoint."""
    path = checkpoint / "run.yaml"
    return parse_section(OptimConfig, read_yaml(path).get("optim", {}), where=f"optim of {path}", stored=True)


def computed_shape(resolved: ResolvedRun, step: int, world_size: int) -> dict[str, Any]:
    """Return the parallel layout and precision of a run after `step` steps. They can change on resume."""
    config, run = resolved.deepspeed.config, resolved.run
    stage = run.in_stage(run.stage_at(max(step - 1, 0)))
    return {
        "world_size": world_size,
        "zero_stage": int(config["zero_optimization"]["stage"]),
        "precision": precision(config),
        "compared": stage.optim.compared_samples(world_size),
    }


def _check_identity(resolved: ResolvedRun, checkpoint: Path, meta: dict[str, Any]) -> None:
    saved, now = dict(meta["identity"]), json.loads(json.dumps(resolved.identity))
    for identity in (saved, now):  # equivalent recipes can be written differently
        identity["recipe"] = meaning(identity.get("recipe"))
        if identity.get("protocol") is not None:
            identity["protocol"].pop("deviations", None)  # free text
        if (identity.get("task") or {}).get("kind") == "classification":
            identity["task"].setdefault("final_norm", True)  # which older checkpoints do not have
    _check_label_order(saved.get("label_sets"), now["label_sets"], checkpoint)
    for key in ("tokenizer", "protocol"):  # newer versions add fields
        if key in now:
            now[key] = known_part(saved.get(key), now[key])
    different = [key for key in now if saved.get(key) != now[key]]
    if different:
        key = different[0]
        files = [f"data.datasets.{name}: {source.path}" for name, source in resolved.run.data.datasets.items()]
        labels = key == "label_sets"
        raise CheckpointError(
            f"the checkpoint is from a different run: {', '.join(different)} changed",
            where=f"{checkpoint}" + (f"; labels.json of {', '.join(files)}" if labels else ""),
            why=_difference(key, saved.get(key), now[key]),
            fix=("restore labels.json" if labels else "use the same config file")
            + ", or set another output_dir for the new run",
        )


def _check_label_order(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None, checkpoint: Path) -> None:
    """Validate that the label spaces have the same order. Heads are numbered, so each would otherwise resume with
    the weights of another one."""
    if saved and now and set(saved) == set(now) and list(saved) != list(now):
        raise CheckpointError(
            f"the label sets must be in the order of the checkpoint: {', '.join(saved)}",
            where=str(checkpoint),
            why="every label set has a numbered head, and would get the weights of another",
            fix="restore the order of data.datasets",
        )


def _difference(key: str, before: Any, now: Any) -> str:
    """Return the old and new value: recipe names if they differ, otherwise all differing fields."""
    names = [value.get("name") if isinstance(value, dict) else None for value in (before, now)]
    if key == "recipe" and names[0] != names[1]:
        return f"recipe was '{names[0]}', is '{names[1]}'"
    return listed(format_differences(key, before, now), _SHOWN_CHANGES, "; ")


def checkpoint_meta(resolved: ResolvedRun, *, step: int, world_size: int) -> dict[str, Any]:
    """Return the content of meta.json and the metadata in the manifest of a checkpoint."""
    text = run_yaml(resolved.run)
    return {
        "step": step,
        "samples": step * resolved.run.optim.batch_size,
        **computed_shape(resolved, step, world_size),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "identity": resolved.identity,
        "label_sets": resolved.label_sets,
        "stages": [stage.model_dump() for stage in resolved.run.stages],
        "vocab_size": resolved.vocab_size,
        "tokenizer": getattr(resolved.tokenizer, "name_or_path", None),
        "versions": software_versions()["packages"],
    }
