"""Text that a run prints at its start and at its end: the summary, the expected time, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import DEFAULT_PRESET
from m3i_scale.checkpoint.layout import checkpoints, step_of
from m3i_scale.checkpoint.retention import PREFIX, entries_of, evaluations, ranked
from m3i_scale.config import RunConfig
from m3i_scale.data.remote.access import is_remote
from m3i_scale.engine.activations import describe_policy
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.engine.device import compute_dtype
from m3i_scale.engine.peak import Peak, device_name, named_peak
from m3i_scale.run import flops
from m3i_scale.run.check import CheckedRun
from m3i_scale.run.flops import Work
from m3i_scale.run.run_warnings import manifest_counts
from m3i_scale.run.setup import ResolvedRun
from m3i_scale.text import duration_text, redact_text

_WIDTH = len("precision") + 2


def summary_lines(
    resolved: ResolvedRun, counts: Mapping[str, int | None], ranks: int | None, resume_from: Path | None
) -> list[str]:
    """Return the settings of a run, one topic per line.

    Args:
        counts: number of samples by dataset; None if unknown.
        ranks: number of ranks; None if unknown.
        resume_from: checkpoint to resume from.
    """
    run, config = resolved.run, resolved.deepspeed.config
    method = f"recipe {resolved.recipe.name}" if run.task is None else f"task {run.task.kind}"
    origin = "starts at step 0" if resume_from is None else f"resumes from step {step_of(resume_from)}, {resume_from}"
    auto = len(resolved.deepspeed.filled_in)
    return [
        _line("run", f"{run.name}, {method}"),
        _line("data", _data(run, counts)),
        _line("batch", _batch(resolved, ranks)),
        _line("model", _model(resolved)),
        _line(
            "precision",
            f"{precision(config)}, ZeRO-{config['zero_optimization']['stage']}, activation checkpointing: "
            + describe_policy(run.backbone.activation_checkpointing, compiled=run.backbone.compiles),
        ),
        *([_line("deepspeed", resolved.choice)] if resolved.choice is not None else []),
        _line("output", f"{run.output_dir}, {origin}"),
        f'DeepSpeed config {resolved.deepspeed.where}: {auto} "auto" values resolved, see '
        f"{run.output_dir / 'deepspeed.json'}",
    ]


def summary_of_check(checked: CheckedRun, ranks: int | None) -> list[str]:
    """Return the summary of a run that has not started. Its time is only known with a given peak and number of
    ranks."""
    resolved = checked.resolved
    if resolved is None:
        raise ValueError("a run with errors has no summary")
    run = resolved.run
    counts = manifest_counts(run, unpacked=checked.unpacked_counts)
    *lines, _ = summary_lines(resolved, counts, ranks, checked.resume_from)  # deepspeed.json comes later
    if run.hardware.peak_tflops is None or ranks is None:
        return [*lines, _line("time", "measured by the run; `m3i-scale plan` estimates it for known GPUs")]
    peak = named_peak(run.hardware.peak_tflops, compute_dtype(resolved.deepspeed.config))
    stages = [resolved.in_stage(number) for number in range(len(run.stage_starts))]
    work = Work(_flop_of(stages[0]), run.text.max_tokens, peak)
    start = 0 if checked.resume_from is None else step_of(checked.resume_from) or 0
    return [*lines, time_line(stages, work, start, ranks)]


def time_line(stages: Sequence[ResolvedRun], work: Work, start: int, ranks: int) -> str:
    """Return a lower bound of the remaining time: its FLOPs at the peak rate of all devices. If the peak of a CPU was
    measured, return only the FLOPs.

    Args:
        work: result of `count_work` for the first stage.
        start: number of completed steps.
    """
    run, peak = stages[0].run, work.peak
    ends = [*_starts_of(stages)[1:], run.optim.steps]
    flop = 0.0
    for number, (begin, end) in enumerate(zip(_starts_of(stages), ends, strict=True)):
        if (steps := end - max(begin, start)) > 0:
            of_stage = work if number == 0 else Work(_flop_of(stages[number]), work.max_tokens, peak)
            flop += steps * of_stage.step_flop(0)  # without captions, which may be missing or short
    text = f"{work.flop['model'] / 1e12:,.3g} TFLOP/step"
    if peak.source != "measured" or device_name() != "cpu":  # a loaded CPU is measured below what training reaches
        text = f"at least {duration_text(flop / (peak.tflops * 1e12 * ranks))} at {_peak_text(peak)}, {text}"
    if run.log.progress:
        every = run.log.every_steps
        text += f"; measured estimate after step {min((start // every + 1) * every, run.optim.steps):,}"
    return _line("time", text)


def _starts_of(stages: Sequence[ResolvedRun]) -> list[int]:
    """Return the number of completed steps at the start of each stage."""
    steps = [stage.run.stages[0].steps if stage.run.stages else stage.run.optim.steps for stage in stages]
    return [sum(steps[:number]) for number in range(len(steps))]


def finished_text(run: RunConfig, step: int) -> str:
    """Return the message of a run that has finished: the newest and the best checkpoint, and the next command."""
    steps = f"{step:,} steps" if step >= run.optim.steps else f"{step:,} of {run.optim.steps:,} steps, no data is left"
    root, source, best, weights = run.output_dir / "checkpoints", run.output_dir, run.checkpoint.keep_best, ""
    newest = next(iter(checkpoints(root)), None)
    text = f"finished: {steps}" + ("" if newest is None else f". Checkpoint: {newest}")
    if best is not None:
        good = [entry for entry in entries_of(root, evaluations(run.output_dir)) if entry.good]
        for entry in ranked(good, best)[:1]:
            source, weights = entry.path, " --weights ema" if best.metric.startswith(f"{PREFIX}ema/") else ""
            text += f"\nbest checkpoint by {best.metric} ({entry.metrics[best.metric]:.6g}): {source}"
    if run.task is not None or newest is None:  # `finetune` evaluates the model
        return text
    output = shlex.quote(str(run.output_dir / "export"))
    return f"{text}\nnext: m3i-scale export {shlex.quote(str(source))} --output {output}{weights}"


def _line(topic: str, text: str) -> str:
    return f"{topic:<{_WIDTH}}{text}"


def _data(run: RunConfig, counts: Mapping[str, int | None]) -> str:
    number = f"{len(counts)} dataset" + ("" if len(counts) == 1 else "s")
    known = [count for count in counts.values() if count is not None]
    if len(known) < len(counts):
        remote = any(is_remote(run.data.datasets[name].path) for name, count in counts.items() if count is None)
        return f"{number}, number of images unknown: {'remote data not read' if remote else 'no manifest.json'}"
    used = run.optim.steps * run.optim.batch_size
    limits = [source.epochs for source in run.data.datasets.values()]
    if all(limits):
        used = min(used, sum(count * (limit or 0) for count, limit in zip(known, limits, strict=True)))
    epochs = used / max(sum(known), 1)
    return f"{sum(known):,} images in {number}, {epochs:,.{0 if epochs >= 10 else 2}f} epochs" + (
        " on average" if len(counts) > 1 else ""
    )


def _batch(resolved: ResolvedRun, ranks: int | None) -> str:
    optim, accumulation = resolved.run.optim, resolved.accumulation
    devices = f"{accumulation} accumulation × {ranks} device" + ("" if ranks == 1 else "s")
    if ranks is None:
        devices = f"{optim.batch_size // optim.micro_batch_size} (accumulation × devices)"
    return f"{optim.steps:,} steps of {optim.batch_size:,} = {optim.micro_batch_size:,} per device × {devices}"


def _model(resolved: ResolvedRun) -> str:
    run = resolved.run
    config = backbone_config(run.backbone)
    name = run.backbone.from_pretrained or run.backbone.preset or DEFAULT_PRESET
    sizes = [run.in_stage(number).image_size(config.image_size) for number in range(len(run.stage_starts))]
    pixels = ", then ".join(str(size) for size in dict.fromkeys(sizes))
    trainable = f"{resolved.trainable_parameters:,} trainable parameters"
    return f"{redact_text(name)} ({config.model_type}), {pixels} px, {trainable}"


def _flop_of(stage: ResolvedRun) -> dict[str, float]:
    return flops.step_flop(stage.run, stage.label_sets, stage.vocab_size)


def _peak_text(peak: Peak) -> str:
    source = {"given": "the given peak", "measured": "the measured peak"}.get(peak.source, f"the {peak.source} peak")
    sheet = f" (data sheet: {peak.data_sheet_tflops:,.4g})" if peak.data_sheet_tflops else ""
    return f"{source} of {peak.tflops:,.3g} TFLOP/s per device{sheet}"
