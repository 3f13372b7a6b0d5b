"""Nothing half is left behind, and nothing secret goes along."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest
from safetensors import SafetensorError

from m3i_scale.errors import ExportError
from m3i_scale.exports import export as export_module
from m3i_scale.exports import source
from m3i_scale.exports import tensors as tensors_module
from m3i_scale.exports.export import export
from m3i_scale.run.callbacks import RunInfo, StepRecord
from m3i_scale.run.callbacks.loggers import MetricsWriter
from m3i_scale.text import redact

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(run_dir, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(tensors_module, "save_file", full)
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "out")
    assert str(caught.value.where).endswith("/out")
    assert "free space" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_interrupted(run_dir, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run_dir[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_goes_with_the_next(run_dir, tmp_path, same_process):
    gone = int(Path("/proc/sys/kernel/pid_max").read_text())  # all are below it: that of a process could come again
    here = socket.gethostname()
    dead, alive, remote = (
        tmp_path / f".out@{host}.{pid}.partial"
        for host, pid in ((here, gone), (here, os.getppid()), ("another-host", gone))
    )
    for path in (dead, alive, remote):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    export(run_dir[0], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, remote.name, "out"])


def test_the_target_is_a_file_or_cannot_be_made(run_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "file")
    assert str(caught.value.where).endswith("/file")
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "file" / "below")
    assert str(caught.value.where).endswith("/file/below")


def test_secrets_stay_behind(make_run, shards, tmp_path, same_process, monkeypatch):
    folder, _ = make_run(tmp_path / "run")
    manifest = json.loads((shards / "train" / "manifest.json").read_text())
    secret = "https://user:passw0rd@host/data.tar?X-Amz-Signature=deadbeef"
    manifest |= {"source": secret, "licenses": {f"see {secret} with {TOKEN}": 3}}
    monkeypatch.setattr(source, "read_file", lambda path: json.dumps(manifest).encode())
    export(folder, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        for word in (b"passw0rd", b"deadbeef", TOKEN.encode()):
            assert word not in content, path
    assert "https://…@host/data.tar?…" in (tmp_path / "out" / "export.json").read_text(encoding="utf-8")


def test_masks():
    assert redact({"a": ["s3://key:word@bucket/x", 1, None, ("hf_abcdefghij1",)]}) == {
        "a": ["s3://…@bucket/x", 1, None, ["…"]]
    }
    assert redact("a question? 3 and hf_short") == "a question? 3 and hf_short"


def write_metrics(folder, *, world_size, start, steps, device=None):
    """As a run does it: seconds of a step by the step of the record."""
    writer = MetricsWriter()
    writer.on_start(RunInfo("tiny", folder, 12, start, world_size, {}, {"flop_per_step": 2e12, "device": device}))
    for step, step_s in steps.items():
        writer.on_step(StepRecord(step, (), {"samples": step, "time/step": step_s}))
    writer.on_end("finished")


@pytest.mark.parametrize(
    ("device", "told"),
    [("cpu", "rank-hours on a CPU"), ("A100", "GPU-hours (A100)"), (None, "rank-hours (device not recorded)")],
)
def test_compute_on_the_card(make_run, tmp_path, same_process, device, told):
    folder, _ = make_run(tmp_path / "run")
    write_metrics(folder, world_size=4, start=0, steps={4: 90.0}, device=device)
    write_metrics(folder, world_size=8, start=4, steps={10: 30.0, 12: 30.0}, device=device)  # one after the checkpoint
    result = export(folder, tmp_path / "out")
    found = {"steps": 10, "samples": 40_960, "flop": 2e13, "rank_hours": 0.8, "device": device}
    assert result["compute"] == found
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {told} | 0.8 |" in card
    assert ("GPU" in card) is (device == "A100")
    assert "| floating-point operations of the model | 2e+13 |" in card


def test_a_given_evaluation_must_be_there(run_dir, tmp_path):
    with pytest.raises(ExportError) as caught:
        export(run_dir[0], tmp_path / "out", evaluation_file=tmp_path / "none.json")
    assert str(caught.value.where).endswith("/none.json")
    assert list(tmp_path.iterdir()) == []
