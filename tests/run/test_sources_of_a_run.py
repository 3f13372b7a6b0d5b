"""Two ranks: sources that come to an end, are told in the metrics, and change on purpose at a resume."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from shapes import metrics, train, write_run
from tokenizers import normalizers
from transformers import AutoTokenizer

from m3i_scale.config import load_run
from m3i_scale.data.state import merge_states
from m3i_scale.data.stream import Account
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import CheckpointError, DataError
from m3i_scale.run import data_supply
from m3i_scale.run.check import resolve_run
from m3i_scale.run.resume import check_resume

pytestmark = pytest.mark.slow

WAIT_S = 600


def test_a_run_ends_with_its_sources_and_goes_on_with_others(shards: Path, tmp_path: Path) -> None:
    both = {
        "shapes": {"path": str(shards / "train"), "epochs": 1, "weight": 2},
        "val": {"path": str(shards / "val"), "epochs": 1},
    }
    sources = json.dumps(both)
    run_file = write_run(
        tmp_path, shards, "mae", f"data.datasets={sources}", "optim.steps=30", "log.pictures_every_steps=100"
    )
    job = train(run_file, world=2)
    assert job.wait(WAIT_S) == [0, 0], job.text()[-4000:]
    told = re.search(r"the datasets are exhausted after step (\d+) of 30", job.text())
    assert told, job.text()[-4000:]
    end = int(told[1])
    assert 8 <= end <= 12  # 96 samples in batches of 8, of streams that are not quite equal
    assert re.search(rf"the datasets end after step {end} of 30", job.text())  # said before step 1: no sample is bad
    lines = metrics(run_file)
    assert sorted(lines) == list(range(1, end + 1))
    first = lines[1]
    assert first["dataset/shapes/share"] + first["dataset/val/share"] == pytest.approx(1)
    assert first["dataset/shapes/recent_asked"] == pytest.approx(2 / 3)
    for line in lines.values():
        assert line["dataset/shapes/share"] == pytest.approx(line["dataset/shapes/asked"], abs=0.5)
    assert lines[end]["dataset/val/epoch"] == pytest.approx(1, abs=0.2)
    drawn = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert drawn == ["step-00000000", f"step-{end:08d}"]
    newest = tmp_path / "out" / "checkpoints" / f"step-{end:08d}"
    states = [json.loads(file.read_text()) for file in sorted((newest / "data").glob("rank-*.json"))]
    assert {stream["taken"] for stream in merge_states(states)["streams"].values()} == {2 * end}

    on = [f"data.datasets={{shapes: {{path: {shards / 'train'}}}}}", f"optim.steps={end + 2}"]
    job = train(run_file, *on, "data.changed_datasets=[shapes, val]", world=2, logs="on")
    assert job.wait(WAIT_S) == [0, 0], job.text()[-4000:]
    assert re.search(r"dataset val: removed \(\d+ shards, \d+ samples\)", job.text())
    assert re.search(r"dataset shapes: .*epochs.*weight", job.text())
    assert sorted(metrics(run_file)) == list(range(1, end + 3))


class Ends:
    """A stream of a few micro-batches, and its state."""

    can_end = True

    def __init__(self, batches: int) -> None:
        self.at, self.batches = 0, batches

    def __iter__(self):
        while self.at < self.batches:
            self.at += 1
            yield self.at

    def state_dict(self):
        return {"at": self.at, "streams": {"0": {"taken": self.at}}}

    def load_state_dict(self, state):
        self.at = state["at"]

    account = Account(0, 3, 30)

    @property
    def quarantined(self):
        return {"label out of range": 3}

    def stop_if_bad(self, account, reasons, *, begun):
        assert account == self.account
        if not begun:
            raise DataError(f"over before the first step: {reasons()}")


@pytest.mark.parametrize(("batches", "others", "steps"), [(9, 4, 4), (8, 4, 4), (7, 4, 3), (9, 2, 2)])
def test_all_ranks_end_at_the_same_whole_step(monkeypatch, batches, others, steps) -> None:
    """This rank has so many micro-batches, two to a step, and the other ranks whole steps."""
    stream, asked = Ends(batches), count(1)
    monkeypatch.setattr(data_supply, "agree", lambda ended, failed: (ended or next(asked) > others, failed))
    batches_of = data_supply.StepBatches(stream, iter(stream), 2)
    taken = []
    while not batches_of.ended():
        taken += [next(batches_of), next(batches_of)]
    assert taken == list(range(1, 2 * steps + 1))
    assert stream.at == 2 * steps  # what it was after the last whole step


def test_sources_that_end_before_the_first_step_are_no_finished_run(monkeypatch) -> None:
    """Though every source may be read to its end: one stream has no good sample left."""
    monkeypatch.setattr(data_supply, "agree", lambda *flags: flags)
    with pytest.raises(DataError, match=r"before the first step: .*label out of range"):
        data_supply.StepBatches(Ends(1), iter(Ends(1)), 2).ended()


def test_data_that_fail_before_a_step_end_all_ranks(monkeypatch) -> None:
    """Also the ranks that have all they need, and before anybody is told that the datasets are exhausted."""

    def fails():
        yield 1
        raise DataError("the shard is gone")

    votes = []
    monkeypatch.setattr(data_supply, "agree", lambda *flags: votes.append(flags) or flags)
    with pytest.raises(DataError, match="the shard is gone"):
        data_supply.StepBatches(Ends(9), fails(), 2).ended()
    assert votes == [(True, True)]


def test_pixels_and_tokens_of_another_kind_are_refused(shards: Path, tmp_path: Path) -> None:
    def plan(*overrides: str):
        run_file = write_run(tmp_path, shards, "clip", f"text.tokenizer={shards / 'tokenizer'}", *overrides)
        return resolve_run(load_run(str(run_file)), 1)

    tokenizer = AutoTokenizer.from_pretrained(shards / "tokenizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.save_pretrained(tmp_path / "cased")
    one = plan()
    shape = {"world_size": 1, "zero_stage": 3, "compared": 4, "precision": precision(one.deepspeed.config)}
    (tmp_path / "meta.json").write_text(json.dumps({"identity": one.identity, "step": 8, **shape}))
    one.tokenizer(["a caption"], truncation=True, max_length=2)  # says nothing about it
    assert check_resume(one, tmp_path, 1) == check_resume(plan(), tmp_path, 1) == []
    assert check_resume(plan("description=another"), tmp_path, 1) == []
    for override, where in (
        (f"text.max_tokens={one.run.text.max_tokens - 1}", "max_tokens"),
        (f"text.tokenizer={tmp_path / 'cased'}", "tokenizer.normalizer.lowercase"),
        ("data.augment.mean=[0.5, 0.5, 0.5]", "pixels.mean"),
        ("data.augment.std=[0.25, 0.25, 0.25]", "pixels.std"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check_resume(plan(override), tmp_path, 1)
        assert where in caught.value.why


def test_label_sets_in_another_order_are_refused(shards: Path, tmp_path: Path) -> None:
    def plan(*names: str):
        own = ", ".join(f"{name}: {{path: {shards / name}}}" for name in names)
        run_file = write_run(tmp_path, shards, "supervised", f"data.datasets={{{own}}}")
        return resolve_run(load_run(str(run_file)), 1)

    one, other = plan("train", "val"), plan("val", "train")
    meta = {
        "identity": one.identity,
        "world_size": 1,
        "zero_stage": 3,
        "step": 2,
        "precision": precision(one.deepspeed.config),
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    check_resume(one, tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        check_resume(other, tmp_path, 1)
    assert caught.value.where == str(tmp_path)


def test_recent_shares_are_those_since_the_last_record() -> None:
    def counts(photos: float, drawings: float) -> dict[str, dict[str, float]]:
        served = {"photos": photos, "drawings": drawings}
        return {name: {"served": of, "asked": of, "read": of, "pass": 10.0} for name, of in served.items()}

    answers = {"now": counts(3e10, 3e10)}
    shares = data_supply.Shares(SimpleNamespace(source_counts=lambda: answers["now"]))
    shares.start()
    for photos, drawings, share in ((1, 3, 0.25), (3, 5, 0.5)):
        answers["now"] = counts(3e10 + photos, 3e10 + drawings)
        recent = shares.record()["photos"]
        assert (recent["recent_share"], recent["recent_asked"]) == (share, share)
