"""Validation of a run before it starts, with all errors reported at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from m3i_scale.backbones.build import backbone_config, backbone_source
from m3i_scale.backbones.load_plan import plan_load
from m3i_scale.checkpoint.retention import check_retention
from m3i_scale.config import RunConfig, Stage, find_run_file, run_values, valid_part
from m3i_scale.data.mixing import check_shares
from m3i_scale.engine.activations import check_policy
from m3i_scale.engine.compilation import check_compile
from m3i_scale.engine.deepspeed.choice import BUILT_IN, device_here
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig, check_accelerator, load_ds_config
from m3i_scale.engine.deepspeed.schema import AUTO
from m3i_scale.engine.device import check_deterministic, compute_dtype
from m3i_scale.engine.peak import named_peak
from m3i_scale.errors import ErrorCollector, UserError, error_prefix
from m3i_scale.host.output_dir import check_output_dir
from m3i_scale.objective.build import build_on_meta
from m3i_scale.objective.fit import check_fit
from m3i_scale.objective.information import Objective
from m3i_scale.objective.pretrained import plan_text
from m3i_scale.objective.recipe import Recipe, load_run_and_recipe, parse_recipe
from m3i_scale.objective.teacher import FrozenTeacher
from m3i_scale.run.callbacks.loggers import trackers_of
from m3i_scale.run.data_checks import DataFacts, check_batch, check_text, find_shards, read_facts
from m3i_scale.run.evaluation_checks import check_evaluation, check_online
from m3i_scale.run.resume import check_resume, find_resume
from m3i_scale.run.setup import ResolvedRun, choose_engine, resolve_engine
from m3i_scale.run.spike import check_guard

P = ParamSpec("P")
T = TypeVar("T")

_ANY_WIDTH = 768
"""Backbone width used if the backbone is invalid. It only resolves DeepSpeed bucket sizes, which are then discarded."""


ReadUnpacked = Callable[[RunConfig], DataFacts | None]
"""Returns the properties of a run's data if some of them are not in shards yet, otherwise None."""


@dataclass
class CheckedRun:
    """Result of `examine`."""

    errors: list[UserError]
    resolved: ResolvedRun | None = None
    """None if there are errors."""
    resume_from: Path | None = None
    unpacked_counts: dict[str, int] = field(default_factory=dict)
    """Number of images by path, of datasets that are not in shards yet."""


def errors_of(
    name_or_path: str,
    overrides: list[str] | None = None,
    ranks: int | None = None,
    read_unpacked: ReadUnpacked | None = None,
) -> list[UserError]:
    """Return all errors that `examine` finds."""
    return examine(name_or_path, overrides, ranks, read_unpacked).errors


def examine(
    name_or_path: str,
    overrides: list[str] | None = None,
    ranks: int | None = None,
    read_unpacked: ReadUnpacked | None = None,
) -> CheckedRun:
    """Find all errors that `train` would raise at startup, except errors that only the machines of the run can
    detect. If `ranks` is None, checks that depend on the number of ranks are skipped."""
    errors = ErrorCollector()
    checked = CheckedRun(errors.errors)
    values = errors.collect(run_values, name_or_path, overrides, errors)
    if values is None:
        return checked
    errors.collect(load_run_and_recipe, name_or_path, overrides, values)
    run, broken = valid_part(values)
    if run is not None:
        if ErrorCollector().collect(parse_recipe, run.recipe) is None:  # its errors are already recorded
            broken |= {"recipe"}
        checks = Checks(run, ranks, broken, here=False, errors=errors)
        if read_unpacked is not None:
            before = len(errors.errors)
            checks.unpacked = checks.collect("data", read_unpacked, run)
            checks.broken |= {"data"} if len(errors.errors) > before else set()
            checked.unpacked_counts = {} if checks.unpacked is None else checks.unpacked.sample_counts
        checked.resolved = checks.resolve()
        if ErrorCollector().collect(check_output_dir, run.output_dir) is not None:
            checks.collect("backbone", _check_weights, run)
            if checks.unpacked is None:  # otherwise the tokenizer of the checkpoint is not known yet
                checked.resume_from = checks.collect(
                    "checkpoint data output_dir", _check_checkpoint, run, checked.resolved, ranks or 1
                )
    for error in errors.errors:
        error.where = error.where or str(find_run_file(name_or_path))
    return checked


def _check_weights(run: RunConfig) -> None:
    """Match the local pretrained weights with the parameters of the encoders, reading only file headers."""
    if (run.output_dir / "checkpoints").exists():  # the run resumes
        return
    start, text = run.backbone.from_pretrained, run.text.from_pretrained
    model = ErrorCollector().collect(backbone_config, run.backbone)  # its errors are already recorded
    if start is not None and Path(start).exists() and model is not None:
        plan_load(backbone_source(run.backbone), model)
    if text is not None and Path(text).exists():
        plan_text(run)


def _check_checkpoint(run: RunConfig, resolved: ResolvedRun | None, ranks: int) -> Path | None:
    """Find the checkpoint to resume from, checking file sizes only, and compare the run with it."""
    checkpoint, _ = find_resume(run, contents=False)
    if checkpoint is not None and resolved is not None:
        check_resume(resolved, checkpoint, ranks)
    return checkpoint


def check_run(
    name_or_path: str,
    overrides: list[str] | None = None,
    ranks: int | None = None,
    read_unpacked: ReadUnpacked | None = None,
) -> None:
    """Raise the errors that `errors_of` returns."""
    errors = ErrorCollector()
    errors.errors = errors_of(name_or_path, overrides, ranks, read_unpacked)
    errors.raise_any()


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


def resolve_run(
    run: RunConfig, world_size: int, *, here: bool = True, unpacked: DataFacts | None = None
) -> ResolvedRun:
    """Validate a config against its data, its DeepSpeed config, the number of ranks and this machine. For `here` and
    `unpacked`, see `Checks`."""
    checks = Checks(run, world_size, here=here, unpacked=unpacked)
    resolved = checks.resolve()
    checks.errors.raise_any()
    if resolved is None:
        raise RuntimeError("there is no error, and nothing was resolved")
    return resolved


@dataclass
class Checks:
    """All checks of one run, which add their errors to `errors`."""

    run: RunConfig
    ranks: int | None
    """None: skip checks that depend on the number of ranks."""
    broken: frozenset[str] = frozenset()
    """Sections with errors, which have default values instead. Checks that depend on them are skipped."""
    here: bool = True
    """Whether this machine takes part in the run."""
    unpacked: DataFacts | None = None
    """Properties of data whose shards do not exist yet."""
    errors: ErrorCollector = field(default_factory=ErrorCollector)

    def holds(self, sections: str) -> bool:
        """Return whether none of the sections, separated by spaces, has errors."""
        return not self.broken.intersection(sections.split())

    def collect(self, sections: str, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run a check that depends on these sections, and return its result; None if it fails or is skipped."""
        return self.errors.collect(check, *args, **kwargs) if self.holds(sections) else None

    def resolve(self) -> ResolvedRun | None:
        """Run all checks. Return the resolved run, or None if there are errors."""
        run, before = self.run, len(self.errors.errors)
        recipe = self.collect("recipe", parse_recipe, run.recipe)
        access = None
        if self.holds("data"):
            unpacked = frozenset() if self.unpacked is None else self.unpacked.unpacked
            access = find_shards(run, self.errors, self.ranks if self.holds("optim") else None, unpacked)
        model = self.collect("backbone", backbone_config, run.backbone)
        self.collect("output_dir", check_output_dir, run.output_dir)
        self.collect("log", trackers_of, run.log)
        self.errors.collect(check_policy, run.backbone.activation_checkpointing)
        if run.backbone.compiles:
            self.errors.collect(check_compile)
        if run.task is not None and model is not None:
            self.collect("optim", run.task.check, run, model)
        facts = self.unpacked or DataFacts(run)
        if recipe is not None:
            self._check_without_data(recipe)
            if run.evaluation.online is not None:
                self.collect("evaluation data optim", check_online, run, recipe, model, run.evaluation.online)
            if self.holds("data"):
                read = read_facts(run, recipe, access, self.errors, text=self.holds("text"))
                facts = read if self.unpacked is None else self.unpacked
        run, choice, built = facts.run, None, None
        if recipe is not None and model is not None and self.holds("data text") and len(self.errors.errors) == before:
            of_all_stages = run.model_copy(update={"stages": []})
            vocab_size = None if facts.tokenizer is None else len(facts.tokenizer)
            images = facts.image_counts
            built = self.errors.collect(build_on_meta, of_all_stages, facts.label_sets, vocab_size, image_counts=images)
        if built is not None:
            run, choice = choose_engine(run, built, self.ranks)
        elif run.deepspeed == AUTO:  # the run has errors; the first config shows those of `optim`
            run = run.model_copy(update={"deepspeed": BUILT_IN[device_here(1).kind][0]})
        deepspeed = self._resolve_engine(run, _ANY_WIDTH if model is None else model.hidden_size)
        if recipe is None or model is None or built is None or deepspeed is None:
            return None
        if len(self.errors.errors) > before:
            return None
        targets = recipe.targets if run.data.validation else []
        scored = self.errors.collect(lambda: [target.name for target in targets if target.check_scores(run, access)])
        resolved = ResolvedRun(
            run,
            recipe,
            facts.label_sets,
            facts.tokenizer,
            run.image_size(model.image_size),
            deepspeed,
            accumulation=run.optim.batch_size // (run.optim.micro_batch_size * (self.ranks or 1)),
            choice=choice,
            image_counts=facts.image_counts,
            scored=scored or [],
        )
        trainable = (parameter for parameter in built.parameters() if parameter.requires_grad)
        resolved.trainable_parameters = sum(parameter.numel() for parameter in trainable)
        for number in range(len(run.stages)):
            self.errors.collect(self._check_stage, resolved, number, built)
        return resolved if len(self.errors.errors) == before else None

    def _check_without_data(self, recipe: Recipe) -> None:
        run = self.run
        self.errors.collect(check_text, run, recipe)
        self.collect("evaluation data optim", check_evaluation, run)
        self.collect("evaluation data optim checkpoint", check_retention, run, recipe)
        if self.ranks is not None:
            self.collect("optim", check_batch, run, recipe, self.ranks)

    def _resolve_engine(self, run: RunConfig, width: int) -> ResolvedConfig | None:
        peak = run.hardware.peak_tflops
        deepspeed = self.collect("optim deepspeed", resolve_engine, run, self.ranks, width)
        if not self.holds("optim"):  # its "auto" values are resolved from `optim`
            self.collect("deepspeed", load_ds_config, run.deepspeed)
        if deepspeed is None:
            if not isinstance(peak, str | None):  # the name of a preset depends on the precision
                self.errors.collect(named_peak, peak, torch.float32)
            return None
        if run.task is not None:
            self.errors.collect(run.task.check_engine, run, deepspeed.config)
        if self.here:
            self.errors.collect(check_accelerator, deepspeed)
            if run.hardware.deterministic:
                self.errors.collect(check_deterministic)
        self.collect("guard checkpoint", check_guard, run)
        if peak is not None:
            self.errors.collect(named_peak, peak, compute_dtype(deepspeed.config))
        return deepspeed

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
                    teacher.check_image_size(size)


@contextmanager
def _of_stage(number: int, stage: Stage) -> Iterator[None]:
    """Prefix the location of errors with the stage, and name the stage's micro-batch key if it sets one."""
    with error_prefix(f"stages.{number}"):
        try:
            yield
        except UserError as error:
            if stage.micro_batch_size is not None:
                error.where = error.where and error.where.replace("optim.micro_batch_size", "micro_batch_size")
                key = f"stages.{number}.micro_batch_size"
                error.fix = error.fix and error.fix.replace("optim.micro_batch_size", key)
            raise
