"""Names of the previous format of config files, checkpoints and metrics files, so that they can still be read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

KEYS: dict[str, str] = {
    "recipe.momentum": "ema",
    "data.sources": "datasets",
    "data.datasets.*.shards": "path",
    "data.validation.*.shards": "path",
    "data.workers": "num_workers",
    "data.max_bad_fraction": "max_corrupt_fraction",
    "data.read_attempts": "max_read_attempts",
    "data.stall_timeout_s": "timeout_s",
    "data.changed_sources": "changed_datasets",
    "phases": "stages",
    "timeouts.join_s": "rendezvous_s",
    "timeouts.start_s": "startup_s",
    "timeouts.step_s": "collective_s",
    "recipe.inputs.*.mask.hidden": "masked",
}
"""Old keys of a config file in order of renaming; `*` is any key or index. The value replaces the last component."""

_VALUES: dict[str, dict[str, str]] = {
    "recipe.targets.*.encoder": {"momentum": "ema"},
    "recipe.inputs.*.mask.masked": {"dropped": "drop", "token": "mask_token"},
    "backbone.attention": {"own": "within_image", "mixed": "across_images"},
}
"""Old values by (new) key."""

_METRICS: dict[str, str] = {
    r"group/(.+)/loss": r"loss/\1",
    r"group/(.+)/nats": r"mi/\1",
    r"group/(.+)/weight": r"loss_weight/\1",
    r"group/(.+)/grad_norm": r"grad_norm/\1",
    r"group/(.+)/count": r"loss_samples/\1",
    r"group/(.+)/top_1": r"top_1/\1",
    r"group/(.+)": r"loss/\1",
    r"source/(.+)": r"dataset/\1",
    "momentum": "ema_decay",
    "phases/fetch": "time/data",
    "phases/target": "time/teacher",
    "phases/decoder": "time/heads",
    "phases/step": "time/optimizer",
    "phases/momentum": "time/ema",
    r"phases/(.+)": r"time/\1",
    "speed/step_s": "time/step",
    "speed/data_wait_s": "time/data_wait",
    "speed/data_wait_share": "time/data_wait_share",
    r"speed/(samples_per_s|tokens_per_s)": r"throughput/\1",
    "speed/flop_per_s": "perf/flops_per_s",
    "speed/mfu": "perf/mfu",
}
"""Old names of metrics; the first match counts."""


def upgrade_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of the values of a config file, or part of them, with current keys and no removed one."""
    upgraded: dict[str, Any] = copy.deepcopy(dict(values))
    for path, name in KEYS.items():
        *parents, last = path.split(".")
        upgraded = _change(upgraded, parents, partial(_rename, old=last, new=name))
    upgraded = _change(upgraded, ["data"], lambda data: {key: data[key] for key in data if key != "allow_shell"})
    for path, names in _VALUES.items():
        *parents, last = path.split(".")
        upgraded = _change(upgraded, parents, partial(_replace, key=last, names=names))
    return upgraded


def upgrade_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of a recipe with current keys."""
    recipe: dict[str, Any] = upgrade_config({"recipe": values})["recipe"]
    return recipe


def upgrade_meta(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of a checkpoint's meta.json with current keys: its stages and the identity of its run."""
    meta = upgrade_config(values)
    identity = meta.get("identity")
    if isinstance(identity, dict):
        meta["identity"] = upgrade_config(identity)  # its `recipe`
        if "attention" in identity:
            backbone = {"attention": identity["attention"]}
            meta["identity"]["attention"] = upgrade_config({"backbone": backbone})["backbone"]["attention"]
    return meta


def upgrade_weights(name: Any) -> Any:
    """Return the current name of an export's weights."""
    return "ema" if name == "momentum" else name


@lru_cache(maxsize=10_000)
def upgrade_metric(name: str) -> str:
    """Return the current name of a metric."""
    for old, new in _METRICS.items():
        if re.fullmatch(old, name):
            return re.sub(old, new, name, count=1)
    return name


def upgrade_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics under their current names: of one line, or as arrays over many lines. Old files have the sections
    of a step (`phases/…`) as fractions of its time, current files in seconds (`time/…`)."""
    step_s = values.get("speed/step_s")
    upgraded: dict[str, Any] = {}
    for name, value in values.items():
        new, current = upgrade_metric(name), value
        if name.startswith("phases/"):
            if any(number is None or isinstance(number, str) for number in (step_s, value)):
                continue  # not a number of seconds
            current = value * step_s
        upgraded[new] = current
    return upgraded


def upgrade_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl with its current kind and names."""
    return upgrade_metrics(line) | ({"kind": upgrade_kind(line["kind"])} if "kind" in line else {})


def upgrade_kind(kind: Any) -> Any:
    """Return the current kind of a line in metrics.jsonl."""
    return "stage" if kind == "phase" else kind


def _change(node: Any, parents: list[str], change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if not parents:
        return change(node) if isinstance(node, dict) else node
    first, *others = parents
    if isinstance(node, list) and first == "*":
        return [_change(item, others, change) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _change(value, others, change) if first in ("*", key) else value for key, value in node.items()}


def _rename(section: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Rename a key, which keeps its position. If both exist, keep both: the old one is an unknown key then."""
    return section if new in section else {new if key == old else key: value for key, value in section.items()}


def _replace(section: dict[str, Any], key: str, names: dict[str, str]) -> dict[str, Any]:
    value = section.get(key)
    return section | {key: names[value]} if isinstance(value, str) and value in names else section
