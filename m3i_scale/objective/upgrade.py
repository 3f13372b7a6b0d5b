"""Convert older recipes, in which targets, distributions and regularizers had no kinds, to the current format.

In the older format, all fields were in the target (`unigrad_lambda`, `target_temperature`, …), and `queue` and
`state_momentum` in its head. Even older recipes had a single `teacher` instead of several.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

_MOVED = {
    "temperature": ("distribution", "temperature"),
    "bias": ("distribution", "bias"),
    "direction": ("distribution", "direction"),
    "label_smoothing": ("distribution", "label_smoothing"),
    "sigma2": ("distribution", "sigma2"),
    "candidates": ("regularizer", "candidates"),
    "target_temperature": ("regularizer", "target_temperature"),
    "unigrad_lambda": ("regularizer", "strength"),
    "entropy_weight": ("regularizer", "weight"),
    "offdiagonal_weight": ("regularizer", "offdiagonal_weight"),
    "variance_weight": ("regularizer", "variance_weight"),
    "covariance_weight": ("regularizer", "covariance_weight"),
}
"""Maps fields of a target to their section and name in the current format."""


def upgraded(recipe: dict[str, Any]) -> dict[str, Any]:
    """Convert a recipe of any format to the current one. A field in its old position overrides the same field in the
    new one, so that overrides in the old format still work."""
    recipe = copy.deepcopy(recipe)
    if "teacher" in recipe:
        _name_teacher(recipe, recipe.pop("teacher"))
    targets, heads = recipe.get("targets"), recipe.get("heads")
    moved: list[tuple[dict[str, Any], str]] = []
    for target in targets if isinstance(targets, list) else []:
        if not isinstance(target, dict) or "." in str(target.get("kind", "")):
            continue
        _upgrade(target)
        name = target.get("head")
        head = heads.get(name) if isinstance(heads, dict) and isinstance(name, str) else None
        if isinstance(head, dict):
            moved += [(head, field) for field in _move_from_head(target, head)]
    for head, field in moved:
        head.pop(field, None)
    return recipe


def _name_teacher(recipe: dict[str, Any], teacher: Any) -> None:
    """Move the single teacher of a recipe to `teachers` under the default name. `null` removes an inherited teacher."""
    teachers = recipe.get("teachers")
    named = dict(teachers) if isinstance(teachers, dict) else {}
    below = named.pop("teacher", None)
    if teacher is not None:
        both = isinstance(below, dict) and isinstance(teacher, dict)
        named["teacher"] = {**below, **teacher} if both else teacher
    recipe["teachers"] = named


def _upgrade(target: dict[str, Any]) -> None:
    if "modality" in target and "kind" not in target:
        kind = _kind_of_target(target)
        if kind in ("pooled", "prototypes"):
            target.pop("tokens", None)
        target.pop("modality")
        target["kind"] = kind
    for field, (section, name) in _MOVED.items():
        if field in target:
            _put(target, section, name, target.pop(field))


def _move_from_head(target: dict[str, Any], head: dict[str, Any]) -> Iterator[str]:
    """Move a head's memory settings to the regularizer of the target. Yield the moved fields."""
    kind = _kind_in(target, "regularizer")
    if kind in ("negatives", "queued_negatives") and "queue" in head:
        if head["queue"]:
            _put(target, "regularizer", "kind", "queued_negatives")
            _put(target, "regularizer", "size", head["queue"])
        elif kind == "queued_negatives":
            _put(target, "regularizer", "kind", "negatives")
            target["regularizer"].pop("size", None)
        yield "queue"
    if kind in ("centering", "unigrad") and "state_momentum" in head:
        _put(target, "regularizer", "momentum", head["state_momentum"])
        yield "state_momentum"


def _kind_of_target(target: dict[str, Any]) -> Any:
    if target["modality"] != "image":
        return target["modality"]
    if target.get("tokens") == "pooled":
        return "prototypes" if _kind_in(target, "regularizer") in ("centering", "mean_entropy") else "pooled"
    return "dense_negatives" if _kind_in(target, "distribution") == "boltzmann" else "dense"


def _kind_in(target: dict[str, Any], section: str) -> Any:
    """Return the kind of a section, which may be a string with only the kind."""
    there = target.get(section)
    return there.get("kind") if isinstance(there, dict) else there


def _put(target: dict[str, Any], section: str, name: str, value: Any) -> None:
    """Write a field into a section, which may be a string with only the kind."""
    there = target.get(section)
    target[section] = there = dict(there) if isinstance(there, dict) else {} if there is None else {"kind": there}
    there[name] = value
