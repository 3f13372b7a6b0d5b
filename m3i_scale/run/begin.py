"""A run up to its first step: the lock, the checkpoint to go on from, what is written beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from m3i_scale.config import RunConfig
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import write_json, write_whole
from m3i_scale.launch.place import Place
from m3i_scale.run.callbacks.base import Callback
from m3i_scale.run.check import make_plan
from m3i_scale.run.preflight import check_machines, check_software
from m3i_scale.run.rewind import finish_rewind
from m3i_scale.run.setup import Plan, check_resume, open_data, run_yaml
from m3i_scale.run.trainer import Status, Trainer
from m3i_scale.scale.agree import from_rank_0, together
from m3i_scale.scale.checkpoint.commit import explain, sweep
from m3i_scale.scale.checkpoint.layout import read_meta, step_of
from m3i_scale.scale.checkpoint.manifest import newest_good, verify
from m3i_scale.scale.collectives import ProcessGroupRanks
from m3i_scale.scale.engine import awaited_optimizer
from m3i_scale.scale.output_dir import lock_directory
from m3i_scale.scale.shared_dir import check_shared


def find_resume(run: RunConfig) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go on from, and what was passed over (rank 0 only: it reads every byte).

    Raises:
        CheckpointError: `resume: never` with checkpoints there, a named checkpoint that is not good, or checkpoints
            of which none is good.
    """
    root = run.output_dir / "checkpoints"
    if run.checkpoint.resume not in ("auto", "never"):
        named = Path(run.checkpoint.resume)
        faults = verify(named) if named.is_dir() else ["no such folder"]
        if faults:
            raise CheckpointError(f"cannot resume: {faults[0]}", where=str(named), fix="checkpoint.resume=auto")
        newest, _ = newest_good(root)
        if newest is None or int(read_meta(newest)["step"]) <= int(read_meta(named)["step"]):
            return named, []
        if named.resolve().parent == root.resolve():
            raise CheckpointError(
                f"the run has newer good checkpoints than the named one: {newest.name}",
                where=str(named),
                fix="checkpoint.resume=auto; to branch off, name the checkpoint and take another output_dir",
            )
        return newest, [f"going on from the run's own {newest.name}, which is newer than {named}"]
    newest, passed = newest_good(root)
    notes = [f"passed over {path.name}: {reason}" for path, reason in passed]
    if run.checkpoint.resume == "never" and (newest or passed):
        raise CheckpointError(
            "checkpoint.resume is 'never', and there are checkpoints",
            where=str(root),
            fix="take another output_dir, or checkpoint.resume=auto",
        )
    if newest is None and passed:
        raise CheckpointError(
            "there are checkpoints, and none of them is good",
            where="; ".join(notes),
            fix="move them away to start anew",
        )
    return newest, notes


Announce = Callable[[Plan, Path | None, list[str]], None]


def train(
    run: RunConfig,
    ranks: ProcessGroupRanks,
    callbacks: list[Callback],
    announce: Announce,
    tell: Callable[[str], None],
    place: Place | None = None,
    plan_of_run: Callable[[], Plan] | None = None,
) -> Status:
    """Check, lock, resume, train. Every rank calls it; `callbacks`, `announce` and `tell` only serve rank 0.

    `plan_of_run` gives the plan where it was made before the ranks met, or raises its fault.
    """
    place = place or Place(None)
    place.at("open")
    check_software(run)
    plan = together(plan_of_run or (lambda: make_plan(run, ranks.world_size)), names_rank=True)
    with contextlib.ExitStack() as stack:
        from_rank_0(lambda: _lock(run, stack))
        check_shared(run.output_dir)
        resume_from, notes = from_rank_0(lambda: find_resume(run))
        if resume_from is not None:
            notes = notes + from_rank_0(lambda: check_resume(plan, resume_from, ranks.world_size))
        elif run.data.changed_sources:
            raise ConfigError(
                "data.changed_sources has no effect: the run starts anew",
                where="data.changed_sources",
                fix="take it out; to go on from another run, name its checkpoint in checkpoint.resume",
            )
        check_machines(plan)
        from_rank_0(lambda: _write_settings(plan))
        # Before the tables about the engine: what is wrong with the data should not stand below them.
        stream, validation = open_data(plan, ranks)
        if ranks.rank == 0:
            announce(plan, resume_from, notes)
            if (awaited := awaited_optimizer(plan.deepspeed.config)) is not None:
                tell(awaited)
        trainer = Trainer(plan, ranks, callbacks, resume_from, stream, validation, tell, place)
        if ranks.rank == 0:
            tell(trainer.activations)
            if (note := trainer.long_run_note(0 if resume_from is None else step_of(resume_from) or 0)) is not None:
                tell(note)
        return trainer.fit()


def _lock(run: RunConfig, stack: contextlib.ExitStack) -> None:
    """Hold the run's folder, and clear what a killed job left half written."""
    stack.enter_context(lock_directory(run.output_dir, trains=True))
    sweep(run.output_dir / "checkpoints")
    finish_rewind(run.output_dir)


def _write_settings(plan: Plan) -> None:
    """Keep what the run was given, and the tokenizer that an export needs. Only once nothing is left to refuse."""
    folder = plan.run.output_dir
    _ = plan.identity  # that of the teacher's files as they are now, not as they are at the first save
    try:
        write_whole(folder / "run.yaml", run_yaml(plan.run))
        write_json(folder / "deepspeed.json", plan.deepspeed.config)
        if plan.tokenizer is not None:
            plan.tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise explain(error, folder / "checkpoints") from None
