"""`m3i-scale checkpoint …` on the checkpoints of a run of two ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from saved_runs import Done, vouch_for
from typer.testing import CliRunner

from m3i_scale.checkpoint.layout import INDEX, TENSORS, step_name
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.checkpoint_tools import documents
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.cli import app
from m3i_scale.config import load_run
from m3i_scale.errors import UserError
from m3i_scale.files import folder_bytes
from m3i_scale.host.output_dir import lock_directory
from m3i_scale.run.setup import run_yaml
from m3i_scale.run.summary import finished_text

pytestmark = pytest.mark.slow

RANKS = 2


def call(*words: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["checkpoint", *map(str, words)])


def document(*words: Any, code: int = 0) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == code, result.output or result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*words: Any) -> str:
    """The message of a mistake."""
    result = call(*words)
    assert isinstance(result.exception, UserError), result.output or result.exception
    return str(result.exception)


@pytest.fixture
def run_dir(foreground: Done, tmp_path: Path) -> Path:
    """Steps 2, 4 and 6 of a run, of which 4 has the lowest loss; it keeps one, and the best."""
    folder = tmp_path / "out"
    shutil.copytree(foreground.folder / "out", folder)
    rules = ["checkpoint.keep_latest=1", "checkpoint.keep_best={metric: evaluation/loss}", "evaluation.every_steps=2"]
    (folder / "run.yaml").write_text(run_yaml(load_run(str(folder / "run.yaml"), rules)))
    losses = {2: 3.0, 4: 1.0, 6: float("nan")}
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in losses.items():
            file.write(json.dumps({"kind": "evaluation", "step": step, "evaluation/loss": str(loss)}) + "\n")
        file.write('{"kind": "evaluation", "st')
    return folder


def at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


def names(*steps: int) -> list[str]:
    return [step_name(step) for step in steps]


# ------------------------------------------------------------------ list


def test_list_tells_what_stays_and_why(run_dir: Path) -> None:
    (run_dir / "checkpoints/.tmp-step-00000010").mkdir()
    found = document("list", run_dir)
    rows = {row["step"]: row for row in found["checkpoints"]}
    assert list(rows) == [6, 4, 2]
    assert {step: row["kept_by"] for step, row in rows.items()} == {
        6: ["latest 1 of 1"],
        4: ["best 1 of 1: evaluation/loss 1"],
        2: [],
    }
    assert [row["latest"] for row in found["checkpoints"]] == [True, False, False]
    assert rows[4]["samples"] == 32
    assert rows[4]["metrics"] == {"evaluation/loss": 1.0}
    assert rows[6]["metrics"] == {"evaluation/loss": "nan"}
    assert found["temporary"] == [{"name": ".tmp-step-00000010", "bytes": 0}]
    assert found["bytes"] == sum(row["bytes"] for row in rows.values())
    assert all(row["good"] and row["age_s"] >= 0 for row in rows.values())
    text = call("list", run_dir).output
    assert all(word in text for word in (*names(2, 4, 6), "latest", "best 1 of 1", ".tmp-step-00000010"))


def test_list_compares_sizes_and_verify_reads(run_dir: Path) -> None:
    flip(at(run_dir, 6) / "meta.json")
    listed, verified = document("list", run_dir), document("verify", run_dir, code=2)
    assert [row["good"] for row in listed["checkpoints"]] == [True] * 3
    assert [row["good"] for row in verified["checkpoints"]] == [False, True, True]


def test_list_without_a_run_file_knows_no_rules(run_dir: Path) -> None:
    (run_dir / "run.yaml").unlink()
    found = document("list", run_dir / "checkpoints")
    assert found["rules"] is None
    assert "no rules are known" in call("list", run_dir).output
    (run_dir / "run.yaml").write_text("checkpoint: {keep_lates: 1}")
    assert "keep_latest" in refused("list", run_dir)


@pytest.mark.parametrize("command", ["list", "verify", "inspect", "prune"])
def test_a_folder_without_checkpoints_is_named(tmp_path: Path, command: str) -> None:
    assert str(tmp_path) in refused(command, tmp_path)


# ------------------------------------------------------------------ verify


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def linked(path: Path) -> None:
    copy = path.parent.parent.parent / "elsewhere"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def test_verify_names_every_file_that_was_changed(run_dir: Path) -> None:
    final = at(run_dir, 4)
    assert document("verify", final) == {
        "good": True,
        "checkpoints": [{"checkpoint": str(final), "good": True, "errors": []}],
    }
    files = [path for path in sorted(final.rglob("*")) if path.is_file()]
    assert len(files) == 3 * RANKS + 6  # tensors, random, data of every rank; the rest of rank 0
    for path in files:
        kept = path.read_bytes()
        for damage in (cut, linked, Path.unlink):
            damage(path)
            (row,) = document("verify", final, code=2)["checkpoints"]
            assert [fault["file"] for fault in row["errors"]] == [path.relative_to(final).as_posix()], damage
            path.unlink(missing_ok=True)
            path.write_bytes(kept)
    assert call("verify", final).exit_code == 0


def vouched_files(root: Path) -> list[str]:
    """All files of the checkpoints in a folder."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob("step-*/**/*") if path.is_file())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_byte_of_any_file_that_is_flipped_is_noticed_and_named(run_dir: Path, data: st.DataObject) -> None:
    root = run_dir / "checkpoints"
    names_of_files = vouched_files(root)
    assert {"step-00000006/manifest.json", "step-00000006/tensors/index.json"} <= {*names_of_files}
    name = data.draw(st.sampled_from(names_of_files))
    content = (root / name).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    mask = data.draw(st.integers(1, 255))
    changed = content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]
    try:
        (root / name).write_bytes(changed)
        found = document("verify", run_dir, code=2)
        told = [Path(row["checkpoint"], fault["file"]) for row in found["checkpoints"] for fault in row["errors"]]
        assert told == [root / name]
    finally:
        (root / name).write_bytes(content)


def test_verify_of_a_run_reads_all(run_dir: Path) -> None:
    (at(run_dir, 4) / "data/more.json").write_text("{}")
    found = document("verify", run_dir, code=2)
    assert [row["good"] for row in found["checkpoints"]] == [True, False, True]
    assert found["checkpoints"][1]["errors"] == [{"file": "data/more.json", "what": "not in the manifest"}]
    result = call("verify", run_dir)
    assert result.exit_code == 2
    assert f"{step_name(4)}/data/more.json: not in the manifest" in result.output.replace("\n", "")


def test_verify_passes_over_what_the_run_removes_meanwhile(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_errors = documents.find_errors

    def removed(path: Path, **given: Any) -> Any:
        if path == at(run_dir, 2):
            shutil.rmtree(path)
        return find_errors(path, **given)

    monkeypatch.setattr(documents, "find_errors", removed)
    found = document("verify", run_dir)
    assert found["good"]
    assert [Path(row["checkpoint"]).name for row in found["checkpoints"]] == names(6, 4)


# ------------------------------------------------------------------ inspect


def test_inspect_tells_what_is_in_it(run_dir: Path) -> None:
    found = document("inspect", run_dir)
    assert found["checkpoint"].endswith(step_name(6))  # the newest
    assert (found["step"], found["samples"], found["world_size"], found["zero_stage"]) == (6, 48, RANKS, 3)
    assert (found["recipe"], found["precision"], found["errors_by_size"]) == ("m3i", "bf16", [])
    assert found["versions"]["torch"] == torch.__version__
    assert found["backbone"].startswith("vit, vit-ti/16, hidden_size 64")
    (source,) = found["data"].values()
    assert (source["read"], source["served"], source["bad"]) == (48, 48, 0)
    saved = SavedTensors(at(run_dir, 6))
    assert {kind for kind in found["tensors"] if kind.startswith("tensors, ")} == {
        f"tensors, {kind}" for kind in ("weight", "exp_avg", "exp_avg_sq", "average")
    }
    for kind in saved.kinds():
        shapes = [saved.shape(f"{kind}/{name}") for name in saved.names(kind)]
        told = found["tensors"][f"tensors, {kind}"]
        assert (told["tensors"], told["dtypes"]) == (len(shapes), ["F32"])
        assert told["bytes"] == 4 * sum(map(math.prod, shapes))
    assert found["tensors"]["random"]["tensors"] == RANKS
    text = call("inspect", at(run_dir, 6)).output
    position = f"shapes: 48 samples read; it has {source['samples']} in {source['shards']} shards, "
    position += f"{source['passes']:.2f} passes"
    assert all(word in text for word in ("tensors, exp_avg_sq", "probe", position))


def test_nothing_is_unpickled(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", never)
    monkeypatch.setattr("pickle.Unpickler", never)
    monkeypatch.setattr(torch, "load", never)
    assert call("inspect", at(run_dir, 2)).exit_code == 0


@pytest.mark.parametrize("name", ["tensors/rank-00000-00000.safetensors", "probe.safetensors", "tensors/index.json"])
def test_a_file_that_is_none_is_named(run_dir: Path, name: str) -> None:
    path = at(run_dir, 6) / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert name in refused("inspect", run_dir)


def test_what_an_earlier_version_wrote_is_refused(run_dir: Path) -> None:
    """Momentum shards beside DeepSpeed's own files, and no index."""
    final = at(run_dir, 6)
    shutil.move(final / TENSORS, final / "momentum")
    (final / "momentum" / INDEX).unlink()
    vouch_for(final)
    assert "the checkpoint has no tensors that this version reads" in refused("inspect", run_dir)


def test_an_index_that_names_more_than_there_is_is_refused(run_dir: Path) -> None:
    index = at(run_dir, 6) / TENSORS / INDEX
    index.write_text(json.dumps({"shapes": {"weight/more": [2]}}))
    assert str(index) in refused("inspect", at(run_dir, 6))


def test_a_checkpoint_that_lost_a_piece_is_refused(run_dir: Path) -> None:
    (at(run_dir, 6) / TENSORS / "rank-00001-00000.safetensors").unlink()
    assert "rank-00001-00000" in refused("inspect", at(run_dir, 6))


def test_consolidate_writes_what_ranks_hold_together(run_dir: Path, tmp_path: Path) -> None:
    told = document("consolidate", run_dir, "--output", tmp_path / "whole")
    with safe_open(tmp_path / "whole/model.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    wanted = dict(saved_weights(at(run_dir, 6), "student"))
    assert written.keys() == {*wanted}
    assert all(torch.equal(written[name], wanted[name]) for name in written)
    assert told["files"] == {"model.safetensors": (tmp_path / "whole/model.safetensors").stat().st_size}


def test_what_a_job_removes_meanwhile_does_not_end_the_list(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = run_dir / "checkpoints" / ".tmp-step-00000010"
    assert list(documents._sizes([gone])) == []
    folder, walk = at(run_dir, 6), os.walk
    size = folder_bytes(folder)
    monkeypatch.setattr(os, "walk", lambda top: [(here, [], [*files, "gone"]) for here, _, files in walk(top)])
    assert folder_bytes(folder) == size > 0


@pytest.mark.parametrize("command", ["list", "prune"])
def test_figures_that_cannot_be_read_are_explained(run_dir: Path, command: str) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    assert str(run_dir / "metrics.jsonl") in refused(command, run_dir)


# ------------------------------------------------------------------ prune


def left(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def test_prune_goes_by_the_run_file_and_first_only_says_so(run_dir: Path) -> None:
    dry = document("prune", run_dir, "--dry-run")
    assert (dry["removed"], dry["dry_run"]) == (names(2), True)
    assert dry["rules_from"] == str(run_dir / "run.yaml")
    assert set(dry["rules"]) == {"keep_latest", "keep_every_steps", "keep_best", "max_gib"}
    assert left(run_dir) == names(2, 4, 6)
    text = call("prune", run_dir, "--dry-run").output
    assert "would be removed" in text
    told = f"rules, from {run_dir / 'run.yaml'}: keep_latest 1, keep_best evaluation/loss:min:1"
    assert told in text.replace("\n", "")
    done = document("prune", run_dir)
    assert done == {**dry, "dry_run": False}
    assert left(run_dir) == names(4, 6)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    assert document("verify", run_dir)["good"]


def test_the_end_of_a_run_names_the_best_checkpoint(run_dir: Path) -> None:
    run = load_run(str(run_dir / "run.yaml"), [f"output_dir={run_dir}"])
    text = finished_text(run, 6)
    assert f"evaluation/loss (1): {at(run_dir, 4)}" in text
    assert f"m3i-scale export {at(run_dir, 4)}" in text
    cut(at(run_dir, 4) / "meta.json")
    assert f"evaluation/loss (3): {at(run_dir, 2)}" in finished_text(run, 6)


def test_the_best_ema_weights_are_exported_as_such(run_dir: Path) -> None:
    lines = [{"kind": "evaluation", "step": step, "evaluation/ema/knn": step / 10} for step in (2, 4)]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    best = "checkpoint.keep_best={metric: evaluation/ema/knn, mode: max}"
    text = finished_text(load_run(str(run_dir / "run.yaml"), [f"output_dir={run_dir}", best]), 6)
    assert f"m3i-scale export {at(run_dir, 4)} --output {run_dir / 'export'} --weights ema" in text


def test_prune_by_options(run_dir: Path) -> None:
    assert document("prune", run_dir, "--keep-every", 4, "--dry-run")["removed"] == names(2)
    assert document("prune", run_dir, "--keep-best", "evaluation/loss:max", "--dry-run")["removed"] == names(4)
    assert document("prune", run_dir, "--keep-best", "evaluation/loss:min:2", "--dry-run")["removed"] == []
    over = document("prune", run_dir, "--keep-latest", 3, "--max-gib", 1e-9)
    assert over["over_limit"]
    assert left(run_dir) == names(6)


def test_prune_without_a_run_file_says_by_which_rules(run_dir: Path) -> None:
    (run_dir / "run.yaml").unlink()
    found = document("prune", run_dir, "--keep-every", 4, "--dry-run")
    assert found["rules_from"] == "the options"
    assert found["rules"] == {"keep_latest": 1, "keep_every_steps": 4, "keep_best": None, "max_gib": None}
    assert found["kept"] == {step_name(6): ["latest 1 of 1"], step_name(4): ["every 4 steps"]}
    text = call("prune", run_dir, "--keep-every", 4, "--dry-run").output
    assert "rules, from the options: keep_latest 1, keep_every_steps 4" in text


def test_prune_reads_before_it_removes(run_dir: Path) -> None:
    flip(at(run_dir, 6) / "meta.json")
    assert document("prune", run_dir, "--keep-latest", 1)["removed"] == names(2)
    assert left(run_dir) == names(4, 6)


def test_latest_names_none_that_went(run_dir: Path) -> None:
    """What is not good goes first where there is a limit, the newest too."""
    flip(at(run_dir, 6) / "meta.json")
    gib = 1.5 * folder_bytes(at(run_dir, 4)) / 2**30
    assert document("prune", run_dir, "--keep-latest", 1, "--max-gib", gib)["removed"] == names(6, 2)
    assert (run_dir / "checkpoints/latest").read_text() == f"{step_name(4)}\n"
    assert document("verify", run_dir)["good"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep-best", "evaluation/los"], "did you mean 'evaluation/loss'"),
        (["--keep-best", "evaluation/loss:least"], r"METRIC[:min|max][:count]"),
        (["--keep-best", "evaluation/loss:min:0"], r"METRIC[:min|max][:count]"),
        (["--keep-every", 7], "6, 4, 2"),
        (["--keep-latest", 2, "--max-gib", 0], "--max-gib must be > 0"),
        (["--max-gib", 500], "--keep-latest"),
    ],
)
def test_a_rule_that_keeps_nothing_removes_nothing(run_dir: Path, options: list[Any], says: str) -> None:
    assert says in refused("prune", run_dir, *options)
    assert left(run_dir) == names(2, 4, 6)


def test_prune_without_rules_or_of_one_checkpoint_is_refused(run_dir: Path) -> None:
    assert "got one checkpoint" in refused("prune", at(run_dir, 6), "--keep-latest", 1)
    (run_dir / "run.yaml").unlink()
    assert "--keep-latest" in refused("prune", run_dir)
    assert left(run_dir) == names(2, 4, 6)


def test_prune_keeps_out_of_the_way_of_a_job(run_dir: Path) -> None:
    with lock_directory(run_dir):
        assert "another job is writing" in refused("prune", run_dir)
        assert document("prune", run_dir, "--dry-run")["removed"] == names(2)
    assert left(run_dir) == names(2, 4, 6)


def test_a_hostile_checkpoint_does_not_steer_the_terminal(run_dir: Path) -> None:
    hostile = at(run_dir, 4)
    values = yaml.safe_load((hostile / "run.yaml").read_text()) | {"name": "\x1b[2Ja", "\x9b31m": "\x1b]0;b\x07"}
    (hostile / "run.yaml").write_text(yaml.safe_dump(values))
    meta = json.loads((hostile / "meta.json").read_text())
    meta["versions"]["\x1b[31mtorch"] = "\x9b2J"
    (hostile / "meta.json").write_text(json.dumps(meta))
    vouch_for(hostile)
    for words in (["inspect", hostile], ["list", run_dir], ["verify", hostile]):
        result = call(*words)
        assert result.exit_code == 0, result.exception
        assert all(letter.isprintable() or letter == "\n" for letter in result.stdout), words
        assert "\\x1b" in result.stdout or words[0] in ("list", "verify")
