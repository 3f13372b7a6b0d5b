"""Two ranks whose saves meet faults: all ranks end with one message, what was committed stays, nothing torn appears."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import small_disk
from saved_runs import Done, call, make_calls, make_run, rewrite, vouch_for
from shapes import metrics

from m3i_scale.checkpoint.layout import INDEX, TENSORS, step_name
from m3i_scale.checkpoint.manifest import list_files
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.config import load_run
from m3i_scale.errors import CheckpointError
from m3i_scale.run.resume import find_resume

pytestmark = pytest.mark.slow

LONG_S = 600
"""A write that nobody waits for."""


def slow(seconds: float, rank: int = 1, step: int = 0) -> dict[str, Any]:
    return {"rank": rank, "at": "write", "what": "sleep", "seconds": seconds, "step": step}


def refused(rank: int, number: int) -> dict[str, Any]:
    return {"rank": rank, "at": "write", "what": "refuse", "errno": number, "step": 4}


def heard(rank: int, *numbers: int, seconds: float = 0) -> dict[str, Any]:
    return {"rank": rank, "at": "write", "what": "signals", "numbers": numbers, "seconds": seconds, "step": 4}


def ends(rank: int, what: str) -> dict[str, Any]:
    return {"rank": rank, "at": "step", "what": what, "step": 5}


FAULTS: dict[str, list[dict[str, Any]]] = {
    "slow disk": [slow(1.5)],
    "broken disk of rank 0": [refused(0, errno.EIO)],
    "read-only disk of rank 1": [refused(1, errno.EROFS)],
    "no memory": [{"rank": 1, "at": "copy"}],
    "SIGTERM": [heard(1, signal.SIGTERM, seconds=0.5)],
    "SIGINT": [heard(0, signal.SIGINT, seconds=0.5)],
    "SIGINT twice": [heard(rank, signal.SIGINT, signal.SIGINT, seconds=LONG_S) for rank in (0, 1)],
    "NaN": [slow(2, step=4), ends(1, "nan")],
    "data of rank 1": [slow(2, step=4), ends(1, "data")],
    "data of rank 1, which may end": [slow(2, step=4), ends(1, "supply")],
    "metrics of rank 0": [slow(LONG_S, rank=0, step=4), ends(0, "metrics")],
}
OVERRIDES = {
    "NaN": ["guard.nonfinite=stop"],
    "data of rank 1, which may end": ["data.datasets.shapes.epochs=9"],
}


@pytest.fixture(scope="module")
def done(shards: Path, foreground: Done, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    root = tmp_path_factory.mktemp("faulty")
    folders = {name: make_run(root / name.replace(" ", "-").replace(",", ""), shards) for name in FAULTS}
    calls = {name: call(folders[name], *OVERRIDES.get(name, []), faults=FAULTS[name]) for name in FAULTS}
    return {"foreground": foreground, **make_calls(calls, folders, root / "results")}


def everything(checkpoint: Path) -> dict[str, bytes]:
    """All tensors, whole, and the position in the data."""
    saved = SavedTensors(checkpoint)
    keys = [f"{kind}/{name}" for kind in saved.kinds() for name in saved.names(kind)]
    found = {key: saved.whole(key).view(torch.uint8).numpy().tobytes() for key in keys if saved.shape(key) != ()}
    small = [path for path in checkpoint.rglob("*") if path.is_file() and path.parent.name in ("data", "random")]
    files = [*small, checkpoint / "buffers.safetensors", checkpoint / "probe.safetensors"]
    found |= {str(path.relative_to(checkpoint)): path.read_bytes() for path in files}
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta.pop("config_sha256")  # of the run file, which names its folder
    return found | {f"meta/{key}": json.dumps(value).encode() for key, value in meta.items()}


# ---------------------------------------------------------------- slow disks


def test_what_is_written_late_is_what_was_there_when_it_was_saved(done: dict[str, Done]) -> None:
    late, at_once = done["slow disk"], done["foreground"]
    assert late.codes == at_once.codes == [0, 0], late.texts + at_once.texts
    assert (late.folder / "out" / "slept").exists()
    assert late.steps() == at_once.steps() == [2, 4, 6]
    for step in (2, 4, 6):
        wanted, found = (everything(one.root / step_name(step)) for one in (at_once, late))
        assert wanted.keys() == found.keys()
        assert [key for key in wanted if wanted[key] != found[key]] == []
    assert metrics(late.folder / "run.yaml") == metrics(at_once.folder / "run.yaml")
    times = [(late.root / step_name(step) / "manifest.json").stat().st_mtime_ns for step in (2, 4, 6)]
    assert times == sorted(times)


# ---------------------------------------------------------------- errors of the thread


@pytest.mark.parametrize(
    ("name", "words"), [("broken disk of rank 0", "Input/output error"), ("read-only disk of rank 1", "is read-only")]
)
def test_what_one_rank_cannot_write_ends_all_at_the_next_step(done: dict[str, Done], name: str, words: str) -> None:
    told = done[name]
    assert told.codes == [2, 2], told.texts
    first = told.texts[0]
    assert words in first
    assert f".tmp-{step_name(4)}/tensors/rank-0000{name[-1]}-00000.safetensors" in first
    assert f"the last good checkpoint is {told.root / step_name(2)}" in first.replace("\n", "")
    assert "(see rank 0)" in told.texts[1]
    for text in told.texts:
        assert "the checkpoint folder cannot be written" in text
        assert "Traceback" not in text
    assert told.steps() == [2]
    assert not list(told.root.glob(".tmp-*"))


def test_a_rank_without_memory_for_its_copy_ends_all(done: dict[str, Done]) -> None:
    told = done["no memory"]
    assert told.codes == [2, 1], told.texts
    assert "MemoryError: no memory for a copy" in told.texts[0]
    assert told.steps() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root, which the pipeline has")
def test_a_disk_that_fills_up_while_a_rank_writes(shards: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        folder = make_run(disk / "run", shards)
        # Both have written or failed when step 5 begins: in step 6 the metrics would have no room, either.
        at = {"at": "write", "step": 4, "awaited": True}
        calls = {"full": call(folder, faults=[at | {"rank": 0, "what": "nothing"}, at | {"rank": 1, "what": "fill"}])}
        told = make_calls(calls, {"full": folder}, tmp_path / "results")["full"]
        assert told.codes == [2, 2], told.texts
        assert all("the disk is full" in text and "Traceback" not in text for text in told.texts)
        assert told.steps() == [2]
        assert not list(told.root.glob(".tmp-*"))


# ---------------------------------------------------------------- ended while a save is being written


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_while_a_save_is_written_both_are_committed(done: dict[str, Done], name: str) -> None:
    told = done[name]
    assert told.codes == [75, 75], told.texts
    steps = told.steps()
    assert steps[:2] == [2, 4]
    assert steps[-1] in (5, 6)
    assert all("Traceback" not in text for text in told.texts)
    assert not list(told.root.glob(".tmp-*"))


def test_interrupted_twice_it_ends_at_once_and_tears_nothing(done: dict[str, Done]) -> None:
    told = done["SIGINT twice"]
    assert 130 in told.codes, told.texts
    # The other rank may see that its peer is gone before it sees its own second signal.
    assert set(told.codes) <= {130, 1}, told.texts
    assert "Traceback" not in told.texts[told.codes.index(130)]
    assert not (told.folder / "out" / "slept").exists()  # nobody has waited for the thread
    assert told.steps() == [2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NaN", "the loss is not finite at step 5"),
        ("data of rank 1", "a shard is gone"),
        ("data of rank 1, which may end", "a shard is gone"),
    ],
)
def test_what_ends_all_ranks_lets_the_save_be_committed_first(done: dict[str, Done], name: str, words: str) -> None:
    told = done[name]
    assert told.codes == [2, 2], told.texts
    assert all(words in text and "Traceback" not in text for text in told.texts)
    assert told.steps() == [2, 4]


def test_what_ends_one_rank_ends_the_process_while_its_thread_writes(done: dict[str, Done]) -> None:
    told = done["metrics of rank 0"]
    assert told.codes[0] == 2, told.texts
    assert told.codes[1] != 0
    assert "cannot write the metrics" in told.texts[0]
    assert not (told.folder / "out" / "slept").exists()
    assert told.steps() == [2]
    assert [path.name for path in told.root.glob(".tmp-*")] == [f".tmp-{step_name(4)}"]  # for the next start to sweep


# ---------------------------------------------------------------- files that were damaged


def damages(checkpoint: Path, older: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """What may have become of every file of a checkpoint: name, what is told, and how."""
    for name in [*list_files(checkpoint), "manifest.json"]:
        torn = "the manifest is corrupt" if name == "manifest.json" else f"{name}: "
        gone = "no manifest" if name == "manifest.json" else f"{name}: missing"
        yield f"{name} flipped", torn, lambda path: path.write_bytes(flipped(path.read_bytes()))
        yield f"{name} cut", torn, lambda path: path.write_bytes(path.read_bytes()[:-1])
        yield f"{name} gone", gone, lambda path: path.unlink()
        if name.startswith(("tensors/rank", "data/rank")):
            before = (older / name).read_bytes()
            yield f"{name} of an older one", torn, lambda path, before=before: path.write_bytes(before)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_any_damage_to_any_file_is_told_and_passed_over(foreground: Done, tmp_path: Path) -> None:
    root = tmp_path / "out" / "checkpoints"
    shutil.copytree(foreground.root, root)
    run = load_run(str(foreground.folder / "run.yaml"), [f"output_dir={tmp_path / 'out'}"])
    (root / "latest").unlink()
    assert find_resume(run) == (root / step_name(6), [])  # `latest` is for people
    kinds = set()
    for what, told, damage in damages(root / step_name(6), root / step_name(4)):
        path = root / step_name(6) / what.split(" ")[0]
        kept = path.read_bytes()
        damage(path)
        found, notes = find_resume(run)
        assert found == root / step_name(4), what
        assert len(notes) == 1, what
        assert notes[0].startswith(f"passed over {step_name(6)}: {told}"), (what, notes)
        path.write_bytes(kept)
        kinds.add(what.split("/")[0].split(" ")[0])
    assert find_resume(run) == (root / step_name(6), [])
    top = {"buffers.safetensors", "probe.safetensors", "meta.json", "run.yaml", "manifest.json"}
    assert kinds == top | {"tensors", "data", "random"}


class Pickled:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_in_the_folder_is_refused_and_not_read(foreground: Done, tmp_path: Path) -> None:
    root = tmp_path / "out" / "checkpoints"
    shutil.copytree(foreground.root, root)
    run = load_run(str(foreground.folder / "run.yaml"), [f"output_dir={tmp_path / 'out'}"])
    trace = tmp_path / "unpickled"
    for place in ("optim.pt", "tensors/rank-00000-00001.safetensors", "data/rank-00002.json"):
        path = root / step_name(6) / place
        path.write_bytes(pickle.dumps(Pickled(trace)))
        found, notes = find_resume(run)
        assert found == root / step_name(4)
        assert notes == [f"passed over {step_name(6)}: {place}: not in the manifest"]
        path.unlink()
    # Also where somebody has vouched for it.
    file = next((root / step_name(6) / TENSORS).glob("rank-*"))
    file.write_bytes(pickle.dumps(Pickled(trace)))
    vouch_for(root / step_name(6))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        everything(root / step_name(6))
    pickle.loads(pickle.dumps(Pickled(trace)))  # it would have left a trace
    assert trace.exists()


@pytest.mark.parametrize("elsewhere", ["../../step-00000004/tensors/rank-00000-00000.safetensors", "/etc/passwd"])
def test_an_index_that_leads_elsewhere_is_refused(foreground: Done, tmp_path: Path, elsewhere: str) -> None:
    checkpoint = tmp_path / step_name(6)
    shutil.copytree(foreground.root / step_name(6), checkpoint)
    index = json.loads((checkpoint / TENSORS / INDEX).read_text())
    key, shape = next(iter(index["shapes"].items()))
    index["pieces"][key] = [[0, math.prod(shape), elsewhere]]
    (checkpoint / TENSORS / INDEX).write_text(json.dumps(index))
    vouch_for(checkpoint)
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        SavedTensors(checkpoint)


# ---------------------------------------------------------------- what is compared after loading


def swap(kind: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        pair = sorted(key for key in tensors if key.startswith(f"{kind}/") and tensors[key].shape == (128, 64))[:2]
        tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]], tensors[pair[0]]

    return change


def scale(kind: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        largest = max((key for key in tensors if key.startswith(f"{kind}/")), key=lambda key: tensors[key].norm())
        tensors[largest] = tensors[largest] * 1.02

    return change


def turn(beginning: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """The rows of one matrix in another order: no norm knows."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = min(key for key in tensors if key.startswith(beginning) and tensors[key].shape == (128, 64))
        tensors[key] = tensors[key].flip(0)

    return change


LOSS = r"the loss of 2 stored samples was \d\S*, and is now \d"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "unchanged": (lambda tensors: None, ""),
    "turned weights": (turn("weight/student"), LOSS),
    "swapped weights": (swap("weight"), r"the norm of 'weight/\S+' was \d\S*, and is now \d"),
    "swapped weights, vouched for": (swap("weight"), LOSS),
    "swapped first moments": (swap("exp_avg"), r"the norm of 'exp_avg/\S+' was \d\S*, and is now \d"),
    "swapped second moments": (swap("exp_avg_sq"), r"the norm of 'exp_avg_sq/\S+' was \d\S*, and is now \d"),
    "swapped averages": (swap("average"), r"the norm of 'average/\S+' was \d\S*, and is now \d"),
    "scaled weights": (scale("weight"), r"the norm of 'weight/\S+' was \d\S*, and is now \d"),
    "scaled first moments": (scale("exp_avg"), r"the norm of 'exp_avg/\S+' was \d\S*, and is now \d"),
    "scaled second moments": (scale("exp_avg_sq"), r"the norm of 'exp_avg_sq/\S+' was \d\S*, and is now \d"),
    "scaled averages": (scale("average"), r"the norm of 'average/\S+' was \d\S*, and is now \d"),
}


@pytest.fixture(scope="module")
def loaded(foreground: Done, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Runs on two ranks that load what somebody has changed, and one whose second rank cannot read."""
    root = tmp_path_factory.mktemp("loaded")
    calls, folders = {}, {}
    for name in [*CHANGES, "unreadable"]:
        folders[name] = folder = root / name.replace(" ", "-").replace(",", "")
        checkpoint = folder / "out" / "checkpoints" / step_name(4)
        shutil.copytree(foreground.root / step_name(4), checkpoint)
        shutil.copyfile(foreground.folder / "run.yaml", folder / "run.yaml")
        faults: list[dict[str, Any]] = []
        if name in CHANGES:
            rewrite(checkpoint, CHANGES[name][0], norms_too="vouched for" in name)
        else:
            faults = [{"rank": 1, "at": "read", "errno": errno.EIO}]
        calls[name] = call(folder, f"output_dir={folder / 'out'}", faults=faults)
    return make_calls(calls, folders, root / "results")


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "unchanged"])
def test_what_was_changed_stops_the_run_before_its_first_step(loaded: dict[str, Done], name: str) -> None:
    told = loaded[name]
    assert told.codes == [2, 2], told.texts
    for text in told.texts:
        assert re.search(CHANGES[name][1], text), text
        assert "Traceback" not in text
    assert not (told.folder / "out" / "metrics.jsonl").exists()


def test_what_was_only_written_anew_is_loaded(loaded: dict[str, Done], foreground: Done) -> None:
    told = loaded["unchanged"]
    assert told.codes == [0, 0], told.texts
    wanted = {step: line for step, line in metrics(foreground.folder / "run.yaml").items() if step > 4}
    losses = {step: line["loss"] for step, line in metrics(told.folder / "run.yaml").items()}
    assert losses == {step: line["loss"] for step, line in wanted.items()}


def test_what_one_rank_cannot_read_ends_all(loaded: dict[str, Done]) -> None:
    told = loaded["unreadable"]
    assert told.codes == [2, 2], told.texts
    assert "rank-00001-00000.safetensors" in told.texts[0]
    assert "(see rank 0)" in told.texts[1]
    for text in told.texts:
        assert "the checkpoint cannot be read: Input/output error" in text
        assert "Traceback" not in text
