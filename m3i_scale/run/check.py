"""Validation of a run before it starts, with all errors reported at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from m3i_scale.backbones.build import backbone_config, backbone_source
from m3i_scale.backbones.families import family_of
from m3i_scale.backbones.load_plan import plan_load
from m3i_scale.checkpoint.retention_checks import check_retention
from m3i_scale.config import RunConfig, Stage, find_run_file, run_values
from m3i_scale.config.partial_run import fields_that_hold, sections_that_hold
from m3i_scale.data.mixing import check_shares
from m3i_scale.data.remote.access import check_access
from m3i_scale.engine.activations import check_policy, read_policy
from m3i_scale.engine.arithmetic import check_deterministic
from m3i_scale.engine.compilation import check_compile
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig, check_accelerator, load_ds_config
from m3i_scale.engine.peak import compute_dtype, named_peak
from m3i_scale.errors import ConfigError, Faults, UserError, error_prefix
from m3i_scale.host.output_dir import check_output_dir
from m3i_scale.objective.encoders import FrozenTeacher
from m3i_scale.objective.fit import check_fit
from m3i_scale.objective.information import Objective
from m3i_scale.objective.meta import build_on_meta
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe, parse_recipe
from m3i_scale.objective.teacher import check_outputs
from m3i_scale.run.callbacks.trackers import trackers_of
from m3i_scale.run.config_warnings import config_warnings, repeated_overrides
from m3i_scale.run.data_checks import DataChecks, DataFacts, check_batch, check_text
from m3i_scale.run.resume import check_counts, check_resume, find_resume
from m3i_scale.run.setup import ResolvedRun, resolve_engine
from m3i_scale.run.source_checks import scored_targets
from m3i_scale.run.source_warnings import source_warnings
from m3i_scale.run.spike import check_guard
from m3i_scale.run.start_table import other_images

_ANY_WIDTH = 768
"""Backbone width used if the backbone is invalid. It only resolves DeepSpeed bucket sizes, which are then discarded."""


def faults_of(name_or_path: str, overrides: list[str] | None = None, ranks: int | None = None) -> list[UserError]:
    """Return all errors that `train` would raise at startup, except errors that only the machines of the run can
    detect. If `ranks` is None, checks that depend on the number of ranks are skipped."""
    faults = Faults()
    values = faults.note(run_values, name_or_path, overrides)
    if values is None:
        return faults.found
    faults.note(load_run_and_recipe, name_or_path, overrides, values)
    run, broken = sections_that_hold(values)
    if run is not None:
        recipe_holds = Faults().note(lambda: parse_recipe(run.recipe)) is not None
        at_fault = broken if recipe_holds else broken | {"recipe"}
        resolved = Checks(run, ranks, at_fault, here=False).resolve(faults)
        if Faults().note(check_output_dir, run.output_dir) is not None:
            if "backbone" not in at_fault:
                _note_weights(run, faults)
            if not at_fault & {"checkpoint", "data", "output_dir"}:
                _note_resume(run, resolved, ranks or 1, faults)
    for fault in faults.found:
        fault.where = fault.where or str(find_run_file(name_or_path))
    return faults.found


def _note_weights(run: RunConfig, faults: Faults) -> None:
    """Match the local pretrained weights with the parameters of the backbone, reading only file headers."""
    start, goes_on = run.backbone.from_pretrained, (run.output_dir / "checkpoints").exists()
    if start is None or goes_on or not Path(start).exists():
        return
    model = Faults().note(backbone_config, run.backbone)  # its errors are already recorded
    if model is not None:
        faults.note(plan_load, backbone_source(run.backbone), model)


def _note_resume(run: RunConfig, resolved: ResolvedRun | None, ranks: int, faults: Faults) -> None:
    """Find the checkpoint to resume from, checking file sizes only, and compare the run with it."""
    checkpoint, _ = faults.note(find_resume, run, contents=False) or (None, [])
    if checkpoint is None or resolved is None:
        return
    if faults.note(check_resume, resolved, checkpoint, ranks) is not None:
        faults.note(check_counts, checkpoint, run.optim.batch_size)


def check_run(name_or_path: str, overrides: list[str] | None = None, ranks: int | None = None) -> None:
    """Raise the errors that `faults_of` returns."""
    faults = Faults()
    faults.found = faults_of(name_or_path, overrides, ranks)
    faults.end()


def stage_lines(run: RunConfig) -> list[str]:
    """Return one line per stage of a valid run; empty without stages."""
    image_size = backbone_config(run.backbone).image_size
    lines = []
    for number, (start, stage) in enumerate(zip(run.stage_starts, run.stages, strict=False)):
        here = run.in_stage(number)
        lines.append(
            f"stage {number}: steps {start + 1:,} to {start + stage.steps:,}, images of {here.image_size(image_size)} "
            f"pixels, micro-batches of {here.optim.micro_batch_size}"
        )
    return lines


def warnings_of(
    name_or_path: str, overrides: list[str] | None = None, ranks: int | None = None, *, ask_servers: bool = True
) -> list[str]:
    """Return warnings about a config file. If it has errors, only warn about the valid values. `ask_servers` reads the
    manifests of remote shards. Pass False if the run has errors, e.g. an unreachable server."""
    try:
        values = run_values(name_or_path, overrides)
    except UserError:  # reported by `faults_of`
        return []
    run, faulty = fields_that_hold(values)
    warnings = repeated_overrides(overrides or [])
    return warnings if run is None else warnings + run_warnings(run, ranks, faulty, ask_servers=ask_servers)


def run_warnings(
    run: RunConfig, ranks: int | None, faulty: Collection[str] = (), *, ask_servers: bool = True
) -> list[str]:
    """Return warnings about a run, which has default values in place of values with errors. `faulty` has their dotted
    keys. See `warnings_of` for `ask_servers`."""
    errors = Faults()
    recipe = errors.note(parse_recipe, run.recipe)
    access = errors.note(lambda: check_access(run.data, run.data.datasets).at_start()) if ask_servers else None
    warnings = config_warnings(run, recipe, faulty)
    warnings += errors.note(_other_images, run) or []
    return warnings + list(source_warnings(run, ranks, access))


def _other_images(run: RunConfig) -> list[str]:
    """Describe how the run's images differ from the images that its pretrained weights expect."""
    if run.backbone.from_pretrained is None:
        return []
    source = backbone_source(run.backbone)
    positions = family_of(source.config).positions
    return other_images(source.normalisation, None if positions is None else source.config.image_size, run)


def resolve_run(run: RunConfig, world_size: int) -> ResolvedRun:
    """Validate a config against its data, its DeepSpeed config, the number of ranks and this machine."""
    faults = Faults()
    resolved = Checks(run, world_size).resolve(faults)
    faults.end()
    if resolved is None:
        raise RuntimeError("nothing is at fault, and nothing is resolved")
    return resolved


class Checks(DataChecks):
    """All checks of one run, except checks that depend on an invalid section. `at_fault` names these sections, which
    have default values instead. `here`: whether this machine takes part in the run."""

    def __init__(
        self, run: RunConfig, ranks: int | None, at_fault: frozenset[str] = frozenset(), *, here: bool = True
    ) -> None:
        super().__init__(run, ranks, at_fault)
        self.here = here

    def resolve(self, faults: Faults) -> ResolvedRun | None:
        """Run all checks, add errors to `faults`, and return the resolved run, or None if there are errors."""
        run, before = self.run, len(faults.found)
        recipe = faults.note(parse_recipe, run.recipe) if self.has_no_errors("recipe") else None
        access, there = self.access(faults) if self.has_no_errors("data") else (None, False)
        model = faults.note(backbone_config, run.backbone) if self.has_no_errors("backbone") else None
        if self.has_no_errors("output_dir"):
            faults.note(check_output_dir, run.output_dir)
        if self.has_no_errors("log"):
            faults.note(trackers_of, run.log)
        faults.note(check_policy, run.backbone.activation_checkpointing)
        if run.backbone.compiles:
            faults.note(check_compile)
        facts = DataFacts(run)
        if run.task is not None and model is not None and self.has_no_errors("optim"):
            faults.note(run.task.check, run, model)
        if recipe is not None:
            self._check_without_data(recipe, faults)
            facts = self.read(recipe, access, faults, there=there)
            run = facts.run
        deepspeed = None
        if self.has_no_errors("optim", "deepspeed"):
            width = _ANY_WIDTH if model is None else model.hidden_size
            deepspeed = faults.note(resolve_engine, run, self.ranks, width)
        elif self.has_no_errors("deepspeed"):  # its "auto" values are resolved from `optim`
            faults.note(load_ds_config, run.deepspeed)
        if deepspeed is not None and run.task is not None:
            faults.note(run.task.check_engine, run, deepspeed.config)
        self._check_engine(deepspeed, faults)
        if recipe is None or model is None or deepspeed is None or not self.has_no_errors("data", "text"):
            return None
        if len(faults.found) > before:
            return None
        accumulation = run.optim.batch_size // (run.optim.micro_batch_size * (self.ranks or 1))
        scored = faults.note(scored_targets, run, recipe, access)
        label_sets, image_counts = facts.label_sets, facts.image_counts
        resolved = ResolvedRun(
            run,
            recipe,
            label_sets,
            facts.tokenizer,
            run.image_size(model.image_size),
            deepspeed,
            accumulation,
            image_counts,
            scored or [],
        )
        vocab_size = resolved.vocab_size
        whole = run.model_copy(update={"stages": []})  # each stage is checked separately
        built = faults.note(lambda: build_on_meta(whole, label_sets, vocab_size, image_counts=image_counts))
        if built is not None and run.stages:
            faults.note(_check_borders, run, model.image_size)
            for number in range(len(run.stages)):
                faults.note(self._check_stage, resolved, number, built)
        return resolved if len(faults.found) == before else None

    def _check_stage(self, resolved: ResolvedRun, number: int, built: Objective) -> None:
        """Check one stage as if the run consisted of it alone. `built` has the modules of the run on the `meta`
        device."""
        run = resolved.run.in_stage(number)
        size = run.image_size(built.student.image_size)
        with _of_stage(number, run.stages[0]):
            if self.ranks is not None:
                check_shares(run.data, micro_batch_size=run.optim.micro_batch_size, world_size=self.ranks)
                check_batch(run, resolved.recipe, self.ranks)
            resolve_engine(run, self.ranks, built.student.width)
            check_fit(run, resolved.recipe, built.student, resolved.label_sets, resolved.vocab_size)
            for teacher in built.teachers.values():
                if isinstance(teacher, FrozenTeacher):
                    check_outputs(teacher, size)

    def _check_without_data(self, recipe: Recipe, faults: Faults) -> None:
        run = self.run
        faults.note(check_text, run, recipe)
        if self.has_no_errors("evaluation", "data", "optim"):
            faults.note(_check_evaluation, run)
            if self.has_no_errors("checkpoint"):
                faults.note(check_retention, run, recipe)
        if self.ranks is not None and self.has_no_errors("optim"):
            ranks = self.ranks
            faults.note(check_batch, run, recipe, ranks)

    def _check_engine(self, deepspeed: ResolvedConfig | None, faults: Faults) -> None:
        peak = self.run.hardware.peak_tflops
        if deepspeed is None:
            if not isinstance(peak, str | None):  # the name of a preset depends on the precision
                faults.note(named_peak, peak, torch.float32)
            return
        if self.here:
            faults.note(check_accelerator, deepspeed)
            if self.run.hardware.deterministic:
                faults.note(check_deterministic)
        if self.has_no_errors("guard", "checkpoint"):
            faults.note(check_guard, self.run, deepspeed.config)
        if peak is not None:
            faults.note(named_peak, peak, compute_dtype(deepspeed.config))


@contextmanager
def _of_stage(number: int, stage: Stage) -> Iterator[None]:
    """Prefix the location of errors with the stage, and name the stage's micro-batch key if it sets one."""
    with error_prefix(f"stages.{number}"):
        try:
            yield
        except UserError as error:
            if stage.micro_batch_size is not None:
                error.where = error.where and error.where.replace("optim.micro_batch_size", "micro_batch_size")
                own = f"stages.{number}.micro_batch_size"
                error.fix = error.fix and error.fix.replace("optim.micro_batch_size", own)
            raise


def _check_borders(run: RunConfig, image_size: int) -> None:
    """Check that consecutive stages differ, that a single stage changes a setting, and that several stages have no
    memory budget for activations."""
    own = run.optim.micro_batch_size
    sizes = [(stage.image_size or image_size, stage.micro_batch_size or own) for stage in run.stages]
    if sizes == [(image_size, own)]:
        raise ConfigError(
            "a single stage that changes nothing has no effect",
            where="stages",
            fix="leave it out, or give the last steps an image_size",
        )
    policy = run.backbone.activation_checkpointing
    if len(sizes) > 1 and read_policy(policy).kind == "budget":
        raise ConfigError(
            "a budget of activations is measured before the first step, and stages take different memory",
            where=f"backbone.activation_checkpointing: {policy}",
            fix="backbone.activation_checkpointing=full, or what `m3i-scale plan` says for the stage that takes most",
        )
    for number, (one, other) in enumerate(pairwise(sizes)):
        if one == other:
            raise ConfigError(
                f"nothing changes between stages {number} and {number + 1}, counted from 0",
                where="stages",
                fix=f"one stage of {run.stages[number].steps + run.stages[number + 1].steps} steps",
            )


def _check_evaluation(run: RunConfig) -> None:
    """Check that evaluations have validation data and happen during the run, and that validation data is used."""
    every, steps = run.evaluation.every_steps, run.optim.steps
    if every and not run.data.validation:
        raise ConfigError(
            "evaluation.every_steps needs data.validation", fix="data.validation.val.path=/data/shards/val"
        )
    if run.data.validation and not every and not run.log.pictures_every_steps:
        raise ConfigError(
            "data.validation has no effect", where="evaluation.every_steps: 0", fix="set it, e.g. to 1000"
        )
    if every > steps:
        raise ConfigError(
            f"the run has {steps} steps: nothing would ever be evaluated",
            where=f"evaluation.every_steps: {every}",
            fix=f"evaluation.every_steps={steps} or less",
        )
