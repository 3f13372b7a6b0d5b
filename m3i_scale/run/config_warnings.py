"""Warnings about valid settings that are probably mistakes: they have no effect, or an unintended one (wrong unit). A
setting that cannot work is an error instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeAlias

from m3i_scale.config import DistortionConfig, OptimConfig, RunConfig
from m3i_scale.config.data import AugmentConfig
from m3i_scale.config.optim import MultiStep
from m3i_scale.config.views import ViewSpec, each_view
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.schedule import values_of
from m3i_scale.objective.targets.text import BernoulliPairs

_DAY_S = 86_400.0


Keyed: TypeAlias = tuple[tuple[str, ...], str]
"""A warning, after the config keys that it depends on."""


def config_warnings(run: RunConfig, recipe: Recipe | None, faulty: Collection[str] = ()) -> list[str]:
    """Return warnings about a config, which has default values in place of values with errors. `faulty` has their
    dotted keys. `recipe` is None if it has errors."""
    warnings = [*_optim(run), *_timeouts(run), *_published(run)]
    if recipe is not None:
        warnings += [*_targets(recipe), *_augmentation(run, recipe)]
    return [text for keys, text in warnings if not any(_overlap(key, other) for key in keys for other in faulty)]


def _overlap(key: str, other: str) -> bool:
    """Return whether one of two dotted keys is the other one, or a part of its value."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _optim(run: RunConfig) -> Iterator[Keyed]:
    optim = run.optim
    if not _as_sgd(optim):
        yield from _adamw(optim, dense=run.task is not None and run.task.dense)
    first, second = optim.betas
    if first > second:
        yield (
            ("optim.betas",),
            f"optim.betas is [{first:g}, {second:g}]: the first moment is averaged longer than the second. Fix: "
            f"optim.betas=[{second:g},{first:g}]",
        )
    if optim.weight_decay > 1:
        yield (
            ("optim.weight_decay",),
            f"optim.weight_decay is {optim.weight_decay:g}: published runs use 0 to 0.3. Fix: optim.weight_decay=0.05",
        )
    if isinstance(optim.schedule, MultiStep) and optim.schedule.milestones[0] < optim.warmup_steps:
        yield (
            ("optim.schedule", "optim.warmup_steps", "optim.steps"),
            f"optim.schedule.milestones has {optim.schedule.milestones[0]}, and optim.warmup_steps is "
            f"{optim.warmup_steps}: the learning rate falls before it reaches optim.lr. Fix: later milestones, or "
            "fewer optim.warmup_steps",
        )


def _as_sgd(optim: OptimConfig) -> bool:
    """Return whether eps far above the second moment turns AdamW into SGD, which has other learning rates."""
    return not optim.momentum_correction and optim.eps >= 1


def _adamw(optim: OptimConfig, *, dense: bool) -> Iterator[Keyed]:
    if optim.lr >= 1 or (dense and optim.lr >= 0.01):
        yield (
            ("optim.lr", "optim.eps", "optim.momentum_correction", "task"),
            f"optim.lr is {optim.lr:g}: the optimizer is AdamW, which moves each weight by about lr per step, and not "
            f"SGD. Fix: optim.lr={'1e-4' if dense else '1e-3'}",
        )
    if optim.eps >= 1e-2:
        yield (
            ("optim.eps", "optim.momentum_correction"),
            f"optim.eps is {optim.eps:g}: it is added to the square root of the second moment, which is far smaller, "
            "so that steps are nearly zero. Fix: optim.eps=1e-8",
        )


def _timeouts(run: RunConfig) -> Iterator[Keyed]:
    waits = {f"timeouts.{name}": limit_s for name, limit_s in run.timeouts}
    waits |= {f"data.{name}": limit_s for name, limit_s in run.data if name.endswith("timeout_s")}
    for key, limit_s in waits.items():
        if limit_s > _DAY_S:
            yield (
                (key,),
                f"{key} is {limit_s:g}: it is in seconds, so a run that hangs waits for {limit_s / _DAY_S:.1f} days. "
                f"Fix: {key}={limit_s / 1000:g} if this is in milliseconds",
            )


def _published(run: RunConfig) -> Iterator[Keyed]:
    published = run.protocol.published if run.protocol is not None else None
    for name in ("number", "mask_ap") if published is not None else ():
        value = getattr(published, name)
        if value is not None and 0 < value <= 1:
            yield (
                (f"protocol.published.{name}",),
                f"protocol.published.{name} is {value:g}: it is in percent. Fix: protocol.published.{name}="
                f"{100 * value:g}",
            )


def _targets(recipe: Recipe) -> Iterator[Keyed]:
    for number, target in enumerate(recipe.targets):
        place = f"recipe.targets.{number}"
        for name in dict.fromkeys(name for name in target.inputs if target.inputs.count(name) > 1):
            yield (
                (f"{place}.inputs",),
                f"{place}.inputs lists '{name}' {target.inputs.count(name)} times, so it counts that often in the "
                f"mean of '{target.name}'. Fix: list it once",
            )
        for section in ("distribution", "regularizer"):
            for key, value in getattr(target, section):
                if key.endswith("temperature") and max(values_of(value)) > 1:
                    most = max(values_of(value))
                    yield (
                        (f"{place}.{section}.{key}",),
                        f"{place}.{section}.{key} is {most:g}: it divides cosines, so that the softmax is nearly "
                        f"uniform. Fix: {1 / most:.2g} if this is a scale, which multiplies them",
                    )
        if isinstance(target.distribution, BernoulliPairs) and target.distribution.bias > 0:
            key = f"{place}.distribution.bias"
            yield (
                (key,),
                f"{key} is {target.distribution.bias:g}: nearly all pairs are no match, so the first bias is negative. "
                f"Fix: {key}={-target.distribution.bias:g}",
            )


def _augmentation(run: RunConfig, recipe: Recipe) -> Iterator[Keyed]:
    views = each_view(recipe.drawn_views)
    usual = AugmentConfig()
    named: list[tuple[str, DistortionConfig]] = [("data.augment", run.data.augment)]
    named += [
        (f"data.datasets.{name}.augment", source.augment)
        for name, source in run.data.datasets.items()
        if source.augment is not None
    ]
    for place, augment in named:
        for name in ("blur", "solarize"):
            count = len(getattr(augment, name))
            if count > len(views):
                yield (
                    (f"{place}.{name}", "recipe.views"),
                    f"{place}.{name} has {count} values, and the recipe has {len(views)} views: the last ones have no "
                    "effect. Fix: one value per view",
                )
        for name in DistortionConfig.model_fields:
            if name not in ViewSpec.model_fields:
                continue
            changed = getattr(augment, name) != getattr(usual, name)
            if changed and all(getattr(view, name) is not None for view in views):
                yield _overridden(f"{place}.{name}")
        if augment.scale_jitter is not None and all(view.crop_scale or view.crop_ratio for view in views):
            yield _overridden(f"{place}.scale_jitter")
        for_views = [view.color_jitter_p for view in views]
        probabilities = [augment.color_jitter_p if chosen is None else chosen for chosen in for_views]
        if augment.color_jitter != usual.color_jitter and not any(probabilities):
            yield _without_probability(place, "recipe.views")
    for number, spec in enumerate(recipe.views or []):
        never = spec.color_jitter_p == 0 or (spec.color_jitter_p is None and run.data.augment.color_jitter_p == 0)
        if spec.color_jitter is not None and never:
            yield _without_probability(f"recipe.views.{number}", "data.augment")


def _overridden(key: str) -> Keyed:
    return ((key, "recipe.views"), f"{key} has no effect: each of recipe.views has its own. Fix: leave one of them out")


def _without_probability(place: str, also: str) -> Keyed:
    return (
        (f"{place}.color_jitter", f"{place}.color_jitter_p", also),
        f"{place}.color_jitter has no effect: color_jitter_p is 0. Fix: {place}.color_jitter_p=0.8, or leave it out",
    )
