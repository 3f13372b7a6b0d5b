"""Terminal output of `m3i-scale checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from m3i_scale.text import duration_text, short, size_text

_SHOWN, _SHOWN_FILES = 20, 12


def listing(document: Mapping[str, Any]) -> RenderableType:
    """Return the output of `checkpoint list`."""
    good = "good" if document["checked"] == "contents" else "good by sizes"
    table = _table("checkpoint", "samples", "age", "size", good, "figures", "kept by")
    for row in document["checkpoints"]:
        name = Text(row["name"] + ("  ← latest" if row["latest"] else ""))
        known = (
            f"{key.removeprefix('evaluation/')} {float(row['metrics'][key]):.5g}" for key in _figures(document, row)
        )
        kept = Text(
            "\n".join(row["kept_by"]) or ("" if document["rules"] is None else "nothing: goes at the next save")
        )
        samples = "?" if row["samples"] is None else f"{row['samples']:,}"
        mark = Text("yes", "green") if row["good"] else Text("no", "bold red")
        age = "?" if row["age_s"] is None else duration_text(row["age_s"])
        table.add_row(name, samples, age, size_text(row["bytes"]), mark, Text("\n".join(known)), kept)
    notes = [Text(f"{document['root']}: {len(document['checkpoints'])} checkpoints, {size_text(document['bytes'])}")]
    if document["rules"] is None:
        notes.append(Text("no run file beside them, so no rules are known", "yellow"))
    for left in document["temporary"]:
        text = f"{left['name']} ({size_text(left['bytes'])}): being written or removed, or left by a killed job"
        notes.append(Text(text, "yellow"))
    return Group(table, *notes)


def _figures(document: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Return the loss and the metric that selects the best checkpoint."""
    best = (document["rules"] or {}).get("keep_best") or {}
    wanted = {"evaluation/loss", best.get("metric")}
    return [name for name in row["metrics"] if name in wanted]


def verification(document: Mapping[str, Any]) -> RenderableType:
    """Return the output of `checkpoint verify`."""
    lines = []
    for row in document["checkpoints"]:
        if row["good"]:
            lines.append(Text(f"{row['checkpoint']}: good", "green"))
        for fault in row["faults"]:
            lines.append(Text(f"{row['checkpoint']}/{fault['file']}: {fault['what']}", "bold red"))
    return Group(*lines)


def inspection(document: Mapping[str, Any]) -> RenderableType:
    """Return the output of `checkpoint inspect`."""
    facts = Table("", "", box=None, show_header=False)
    told = ("name", "step", "samples", "recipe", "backbone", "world_size", "zero_stage", "precision", "vocab_size")
    for key in told:
        if document[key] is not None:
            value = document[key]
            facts.add_row(key.replace("_", " "), Text(f"{value:,}" if isinstance(value, int) else str(value)))
    facts.add_row("size", size_text(document["bytes"]))
    facts.add_row("data", Text("\n".join(document["data_in_words"])))
    facts.add_row("random states", Text(f"of {len(document['random_states'])} ranks"))
    versions = document["versions"] or {}
    facts.add_row("versions", Text(", ".join(f"{name} {number}" for name, number in versions.items()) or "not known"))
    for fault in document["faults_by_size"]:
        facts.add_row(Text("fault", "bold red"), Text(fault))
    table = _table("kind", "tensors", "fragments", "size", "files", "types")
    for kind, row in document["tensors"].items():
        counts = (f"{row['tensors']:,}", f"{row['fragments']:,}", size_text(row["bytes"]), f"{row['files']:,}")
        table.add_row(kind, *counts, " ".join(row["dtypes"]))
    return Group(Text(document["checkpoint"], "bold"), facts, table)


def comparison(document: Mapping[str, Any]) -> RenderableType:
    """Return the output of `checkpoint diff`."""
    parts: list[RenderableType] = [Text(f"a: {document['a']}\nb: {document['b']}")]
    for title in ("settings", "facts", "model", "data"):
        if document[title]:
            table = _table(title, "a", "b")
            for row in document[title]:
                table.add_row(Text(row["key"]), Text(short(row["a"], 60)), Text(short(row["b"], 60)))
            parts.append(table)
    parts += _tensors(document["tensors"])
    if document["same"]:
        compared = "" if "values" in document["tensors"] else " (values not compared: --values)"
        parts.append(Text("no difference" + compared, "green"))
    return Group(*parts)


def _tensors(tensors: Mapping[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(f"{tensors['both']:,} tensors in both")]
    for what in ("missing", "added"):
        if tensors[what]:
            parts.append(Text(f"{len(tensors[what])} {what} in b: {_some(tensors[what])}"))
    for what in ("shape", "dtype"):
        for name, (before, now) in list(tensors[what].items())[:_SHOWN]:
            parts.append(Text(f"{what} of {name}: {before} → {now}"))
        if len(tensors[what]) > _SHOWN:
            parts.append(Text(f"… and {len(tensors[what]) - _SHOWN} more of another {what}"))
    if tensors["cut_otherwise"]:
        parts.append(Text(f"{len(tensors['cut_otherwise'])} of the same shape, shared out over ranks otherwise"))
    values = tensors.get("values", {})
    apart = {name: found for name, found in values.items() if found.get("max_abs") != 0}
    if values:
        parts.append(Text(f"{len(values) - len(apart):,} of them with the same values"))
    if apart:
        table = _table("tensor", "max |b − a|", "‖b − a‖ / ‖a‖")
        for name, found in sorted(apart.items(), key=_farthest_first)[:_SHOWN]:
            if "not_compared" in found:
                table.add_row(Text(name), found["not_compared"], "")
            else:
                table.add_row(Text(name), f"{float(found['max_abs']):.3g}", f"{float(found['relative']):.3g}")
        parts.append(table)
    if len(apart) > _SHOWN:
        parts.append(Text(f"… and {len(apart) - _SHOWN} more, all of them with --json"))
    return parts


def _farthest_first(item: tuple[str, Mapping[str, Any]]) -> float:
    relative = float(item[1].get("relative", "inf"))
    return -math.inf if math.isnan(relative) else -relative


def pruning(document: Mapping[str, Any]) -> RenderableType:
    """Return the output of `checkpoint prune`."""
    table = _table("checkpoint", "", "why")
    for name, reasons in document["kept"].items():
        table.add_row(name, Text("stays", "green"), Text("\n".join(reasons)))
    for name in document["removed"]:
        table.add_row(name, Text("would go" if document["dry_run"] else "removed", "red"), "no rule keeps it")
    word = "would be freed" if document["dry_run"] else "freed"
    rules = Text(f"rules, from {document['rules_from']}: {_rules(document['rules'])}")
    return Group(rules, table, Text(f"{document['root']}: {size_text(document['bytes_removed'])} {word}"))


def consolidation(document: Mapping[str, Any]) -> RenderableType:
    """Return the output of `checkpoint consolidate`."""
    table = Table("", "")
    for key, value in document.items():
        if key != "files":
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    for file, count in list(document["files"].items())[:_SHOWN_FILES]:
        table.add_row(file, f"{count:,} bytes")
    if (more := len(document["files"]) - _SHOWN_FILES) > 0:
        table.add_row(f"… and {more:,} more files", "")
    return table


def _rules(rules: Mapping[str, Any]) -> str:
    best = rules["keep_best"]
    told = {**rules, "keep_best": None if best is None else f"{best['metric']}:{best['mode']}:{best['count']}"}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" … ({len(names)})" if len(names) > 8 else "")


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold")
    table.columns[0].no_wrap = True
    return table
