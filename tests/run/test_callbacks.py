"""What is written beside the training step, read back from where it was written."""

from __future__ import annotations

import json
import math
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from callback_records import REWIND, info, picture, record
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import m3i_scale
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.host.rank_record import PHASES
from m3i_scale.run.callbacks import Callback, CallbackList, Picture, RunInfo, StepRecord, flatten
from m3i_scale.run.callbacks.loggers import MetricsWriter, TensorBoardWriter, WandbWriter


def lines(path: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def train(output_dir: Path, start: int, stop: int, status: str | None = "finished") -> None:
    writer = MetricsWriter()
    writer.on_start(info(output_dir, start))
    for step in range(start + 1, stop + 1):
        writer.on_step(record(step))
    if status:
        writer.on_end(status)


# ------------------------------------------------------------------ base


def test_a_record_has_one_name_for_every_figure() -> None:
    assert record(10).figures == {
        "loss": 3.5,
        "lr": 1e-3,
        "grad_norm": 0.9,
        "ema_decay": 0.996,
        "samples": 640,
        "quarantined": 0,
        "skipped_nonfinite": 0,
        "information": 2.0,
        "loss/text": 1.5,
        "mi/text": 2.0,
        "loss/intra": 2.0,
        "health/dense_std": 0.5,
        "health/pooled_rank": 12.0,
        "time/step": 2.0,
        "time/data_wait": 0.5,
        "time/data_wait_share": 0.25,
        "throughput/samples_per_s": 32.0,
        "throughput/tokens_per_s": 3136.0,
        "perf/flops_per_s": 2e12,
        "perf/mfu": 0.25,
        "time/backward": 1.2,
        "time/other": 0.8,
        "memory_gib": 1.25,
    }
    without = record(10, {"grad_norm": None, "ema_decay": None, "perf/flops_per_s": None, "perf/mfu": None}).figures
    assert without.keys().isdisjoint({"grad_norm", "ema_decay", "perf/flops_per_s", "perf/mfu"})


def test_every_figure_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    for name in record(10).figures:
        documented = re.sub("/(text|intra)$", "/NAME", name)
        assert f"`{documented}`" in page, name


def test_every_phase_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    for name in PHASES:
        assert f"\n| `time/{name}` |" in page, name


class Recorder(Callback):
    def __init__(self, name: str, log: list[str], fails: bool = False) -> None:
        self.name, self.log, self.fails = name, log, fails

    def on_end(self, status: str) -> None:
        self.log.append(f"{self.name} {status}")
        if self.fails:
            raise UserError(f"{self.name} failed")


def test_all_callbacks_are_ended_although_one_raises() -> None:
    log: list[str] = []
    callbacks = CallbackList([Recorder("a", log), Recorder("b", log, fails=True), Recorder("c", log)])
    callbacks.on_step(record(1))  # methods may be left out
    with pytest.raises(UserError):
        callbacks.on_end("preempted")
    assert log == ["c preempted", "b preempted", "a preempted"]


def test_callbacks_hear_of_everything_in_order(tmp_path: Path) -> None:
    heard: list[tuple[Any, ...]] = []

    class Listener(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_start(self, run_info: RunInfo) -> None:
            heard.append((self.name, run_info))

        def on_step(self, record: StepRecord) -> None:
            heard.append((self.name, record))

        def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
            heard.append((self.name, step, values))

        def on_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
            heard.append((self.name, step, pictures))

    both = CallbackList([Listener("a"), Listener("b")])
    both.on_start(info(tmp_path))
    both.on_step(record(1))
    both.on_evaluation(1, {"loss": 2.0})
    both.on_pictures(1, [])
    events = [(info(tmp_path),), (record(1),), (1, {"loss": 2.0}), (1, [])]
    assert heard == [(name, *event) for event in events for name in "ab"]


def test_flatten_refuses_what_is_no_number() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2.5}}}, "evaluation") == {"evaluation/a/b": 1, "evaluation/a/c/d": 2.5}
    with pytest.raises(TypeError):
        flatten({"a": "x"}, "evaluation")


# ------------------------------------------------------------------ metrics.jsonl


def test_metrics_are_one_line_a_record(tmp_path: Path) -> None:
    writer = MetricsWriter()
    writer.on_start(info(tmp_path))
    writer.on_step(record(10))
    writer.on_evaluation(10, {"text": {"loss": 1.25}})
    assert len(lines(tmp_path / "metrics.jsonl")) == 3  # flushed, not only when closed
    writer.on_end("finished")
    start, step, evaluation, end = lines(tmp_path / "metrics.jsonl")
    assert (start["kind"], start["step"], start["name"], start["world_size"]) == ("run", 0, "demo", 2)
    assert start["versions"]["torch"] == version("torch")
    assert start["versions"]["python"] == platform.python_version()
    checkout = Path(m3i_scale.__file__).parent.parent
    if (checkout / ".git").exists():
        head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert head.stdout.startswith(start["commit"])
    assert (step["kind"], step["step"]) == ("train", 10)
    assert {name: step[name] for name in record(10).figures} == record(10).figures
    assert (evaluation["kind"], evaluation["step"], evaluation["evaluation/text/loss"]) == ("evaluation", 10, 1.25)
    assert (end["kind"], end["step"], end["status"]) == ("end", 10, "finished")


def test_numbers_that_json_has_not_are_words(tmp_path: Path) -> None:
    writer = MetricsWriter()
    writer.on_start(info(tmp_path))
    writer.on_step(record(1, {"loss": math.nan, "grad_norm": math.inf}, groups={"text": {"loss": -math.inf}}))
    writer.on_end("failed")
    step = lines(tmp_path / "metrics.jsonl")[1]
    assert (step["loss"], step["grad_norm"], step["loss/text"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(step["loss"]))
    assert float(step["loss/text"]) == -math.inf


def test_a_resumed_run_writes_no_step_twice_and_keeps_what_it_replaces(tmp_path: Path) -> None:
    train(tmp_path, 0, 25, status=None)  # killed
    train(tmp_path, 20, 30)
    kept, replaced = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "metrics.replaced.jsonl")
    assert [line["step"] for line in kept if line["kind"] == "train"] == list(range(1, 31))
    assert [line["step"] for line in kept if line["kind"] == "run"] == [0, 20]
    assert [line["step"] for line in replaced] == [21, 22, 23, 24, 25]


def test_a_rewind_stands_in_the_file_in_place_of_the_steps_that_it_undoes(tmp_path: Path) -> None:
    writer = MetricsWriter()
    writer.on_start(info(tmp_path))
    for step in range(1, 26):
        writer.on_step(record(step))
    writer.on_rewind(20, REWIND)
    for step in range(21, 23):
        writer.on_step(record(step))
    train(tmp_path, 20, 30)  # after a kill
    kept, replaced = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "metrics.replaced.jsonl")
    assert [line["step"] for line in kept if line["kind"] == "train"] == list(range(1, 31))
    (rewind,) = (line for line in kept if line["kind"] == "rewind")
    assert {key: rewind[key] for key in ("step", "rewound_from", "skipped_samples", "loss", "limit")} == {
        "step": 20,
        "rewound_from": 25,
        "skipped_samples": 320,
        "loss": "nan",
        "limit": 4.5,
    }
    assert [line["step"] for line in replaced] == [21, 22, 23, 24, 25, 21, 22]


def test_a_run_that_starts_anew_begins_an_empty_file(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    train(tmp_path, 0, 2)
    assert [line["kind"] for line in lines(tmp_path / "metrics.jsonl")] == ["run", "train", "train", "end"]
    assert [line["kind"] for line in lines(tmp_path / "metrics.replaced.jsonl")] == ["run", *["train"] * 3, "end"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_torn_anywhere_is_mended_on_resume(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        train(Path(folder), 0, 6, status=None)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n") - 1  # train lines before the tear
        start = data.draw(st.integers(1, 6))
        train(Path(folder), start, 8)
        steps = [line["step"] for line in lines(path) if line["kind"] == "train"]
        assert steps == [*range(1, min(max(complete, 0), start) + 1), *range(start + 1, 9)]
        if (Path(folder) / "metrics.replaced.jsonl").exists():
            replaced = lines(Path(folder) / "metrics.replaced.jsonl")
            torn = [line["text"] for line in replaced if line["kind"] == "torn"]
            assert torn == [text.decode() for text in [whole[:cut].rpartition(b"\n")[2]] if text]


def test_kill_9_loses_no_line(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from callback_records import info, record
from m3i_scale.run.callbacks.loggers import MetricsWriter
writer = MetricsWriter()
writer.on_start(info(Path({str(tmp_path)!r})))
for step in (1, 2, 3):
    writer.on_step(record(step))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    writer = MetricsWriter()
    writer.on_start(info(tmp_path))
    writer._file = Path("/dev/full").open("w")  # noqa: SIM115 (the writer closes it)
    for attempt in (lambda: writer.on_step(record(1)), lambda: writer.on_end("failed")):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(caught.value.where).endswith("/metrics.jsonl")
        assert "No space left" in caught.value.what
    (tmp_path / "sub").write_text("a file")
    with pytest.raises(UserError) as caught:
        MetricsWriter().on_start(info(tmp_path / "sub"))
    assert str(caught.value.where).endswith("/sub/metrics.jsonl")


def test_an_end_before_the_start_is_no_fault(tmp_path: Path) -> None:
    MetricsWriter().on_end("failed")
    with pytest.raises(RuntimeError):
        MetricsWriter().on_step(record(1))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ TensorBoard


def test_tensorboard_is_read_back_and_a_resume_hides_what_is_written_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        writer = TensorBoardWriter()
        writer.on_start(info(tmp_path, start))
        for step in range(start + 1, stop + 1):
            writer.on_step(record(step, {"loss": loss}))
        writer.on_evaluation(stop, {"text": {"loss": 0.5}})
        writer.on_pictures(stop, [picture()])
        writer.on_end("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*record(1).figures, "evaluation/text/loss"}
    shown = [(event.step, event.width, event.height) for event in events.Images("pictures/dense_pca")]
    assert shown == [(6, 12, 8)]
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    writer = TensorBoardWriter()
    writer.on_start(info(tmp_path / "rewound"))
    for step in range(1, 26):
        writer.on_step(record(step, {"loss": 1.0}))
    writer.on_rewind(20, REWIND)
    writer.on_step(record(21, {"loss": 2.0}))
    writer.on_end("finished")
    rewound = EventAccumulator(str(tmp_path / "rewound" / "tensorboard"))
    rewound.Reload()
    assert [(event.step, event.value) for event in rewound.Scalars("loss")][-2:] == [(20, 1.0), (21, 2.0)]
    assert [event.value for event in events.Scalars("mi/text")][-1] == 2.0
    everything = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"@host/x.tar" in everything
    assert b"hunter2" not in everything
    assert b"abc" not in everything


@pytest.mark.parametrize(
    ("package", "make", "setting"),
    [
        ("tensorboard", TensorBoardWriter, "log.tensorboard"),
        ("wandb", lambda: WandbWriter("offline"), "log.wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, make: Any, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # the import system's own word for "not there"
    with pytest.raises(ConfigError) as caught:
        make()
    assert f"pip install -e '.[{package}]'" in str(caught.value)
    assert caught.value.where == setting


# ------------------------------------------------------------------ Weights & Biases


def test_wandb_offline_writes_a_run_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # a busy machine may need more than its 30 s and 90 s
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    for start in (0, 3):
        writer = WandbWriter("offline")
        writer.on_start(info(tmp_path, start))
        for step in range(start + 1, start + 4):
            writer.on_step(record(step))
        writer.on_evaluation(start + 3, {"text": {"loss": 0.5}})
        writer.on_pictures(start + 3, [picture()])
        writer.on_end("finished")
    run_id = (tmp_path / "wandb-run-id").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert runs
    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"mi/text" in everything
    assert b"pictures/dense_pca" in everything
    (image, *_) = (tmp_path / "wandb").rglob("dense_pca*.png")
    assert Image.open(image).size == (12, 8)
    assert b"@host/x.tar" in everything
    assert b"hunter2" not in everything
    assert b"signature=abc" not in everything


def test_wandb_online_without_a_key_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError) as caught:
        WandbWriter("online").on_start(info(tmp_path))
    assert caught.value.where == "log.wandb"
    assert "log.wandb=offline" in str(caught.value)
