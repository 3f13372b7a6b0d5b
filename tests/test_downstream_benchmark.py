"""The comparison of an export with random weights: who is trained from what, what is kept, what is compared."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from m3i_scale.errors import ConfigError, DataError

pytestmark = pytest.mark.bench
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The benchmark's own modules, as they import each other."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def exports(tmp_path):
    folders = []
    for number in range(2):
        config = Dinov2Config(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        folders.append(tmp_path / f"export-{number}")
        torch.manual_seed(100 + number)
        Dinov2Model(config).save_pretrained(folders[-1])
        (folders[-1] / "preprocessor_config.json").write_text("{}")
    return folders


@pytest.mark.parametrize("name", ["segmentation", "detection"])
def test_both_sides_train_alike_and_once(name, exports, tmp_path, monkeypatch):
    import downstream

    commands = []
    (task,) = downstream.chosen([name])

    def tool(arguments, log, environment):
        commands.append(arguments)
        start, seed = Path(arguments[2]), int(next(a for a in arguments if a.startswith("seed=")).partition("=")[2])
        run = next(a for a in arguments if a.startswith("output_dir=")).partition("=")[2]
        Path(run).mkdir()
        value = 0.1 + 0.01 * seed + (0.2 if start in exports else 0.0)
        return {"figures": {name: {"value": value / 2**place} for place, name in enumerate(task.metrics)}}

    monkeypatch.setattr(downstream, "tool", tool)
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "manifest.json").write_text("{}")
    document = downstream.compare(task, exports, tmp_path / "data", 3, tmp_path / "out", 2)
    assert document["export"]["seeds"] == pytest.approx([30.0, 31.0, 32.0])
    assert document["random"]["seeds"] == pytest.approx([10.0, 11.0, 12.0])
    assert [*document["other_metrics"]] == [*task.metrics[1:]]
    for place, other in enumerate(document["other_metrics"].values(), 1):
        assert other["export"]["mean"] == pytest.approx(31.0 / 2**place)
        assert other["difference"]["mean"] == pytest.approx(20.0 / 2**place)
    assert document["difference"]["mean"] == pytest.approx(20.0)
    assert document["difference"]["low"] < 20.0 < document["difference"]["high"]
    starts = [Path(command[2]) for command in commands]
    assert sorted(start.name for start in starts if start in exports) == ["export-0", "export-0", "export-1"]
    random = [start for start in starts if start not in exports]
    weights = [load_file(start / "model.safetensors")["encoder.layer.0.mlp.fc1.weight"] for start in random]
    assert len(random) == 3
    assert not any(torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))

    def settings(command):
        return [part for part in command if not part.startswith("output_dir=")][3:]

    of_seeds = {}
    for command in commands:
        of_seeds.setdefault(next(a for a in command if a.startswith("seed=")), []).append(settings(command))
    assert all(len(both) == 2 and both[0] == both[1] for both in of_seeds.values())

    commands.clear()
    again = downstream.compare(task, exports, tmp_path / "data", 3, tmp_path / "out", 2)
    assert (again["export"], commands) == (document["export"], [])
    (exports[0] / "model.safetensors").write_bytes((exports[1] / "model.safetensors").read_bytes())
    downstream.compare(task, exports, tmp_path / "data", 3, tmp_path / "out", 2)
    assert [Path(command[2]).name for command in commands] == ["export-0", "export-0"]


def test_tasks_are_chosen_by_what_is_trained():
    import downstream

    assert [task.name for task in downstream.chosen(["classification"])] == [
        "classification",
        "classification_5_per_class",
    ]
    assert downstream.chosen([]) == list(downstream.TASKS)
    with pytest.raises(ConfigError):
        downstream.chosen(["detecting"])


def test_a_task_is_measured_on_data_that_have_its_labels(tmp_path, monkeypatch):
    import downstream

    monkeypatch.setattr(downstream, "emoji_shards", lambda: tmp_path / "emoji")
    monkeypatch.setattr(downstream, "scene_shards", lambda: tmp_path / "scenes")
    built_in = {task.kind: downstream.data_of(task, None).name for task in downstream.TASKS}
    assert built_in == {"segmentation": "emoji", "classification": "emoji", "detection": "scenes"}
    (detection,) = downstream.chosen(["detection"])
    (tmp_path / "given" / "train").mkdir(parents=True)
    with pytest.raises(DataError):
        downstream.data_of(detection, tmp_path / "given")
    (tmp_path / "given" / "train" / "categories.json").write_text("{}")
    assert downstream.data_of(detection, tmp_path / "given") == tmp_path / "given"


def test_every_training_is_a_command_that_exists():
    import downstream
    from typer.main import get_command

    from m3i_scale.config import load_run
    from m3i_scale.tasks.finetune_command import finetune_app

    commands = get_command(finetune_app).commands
    for task in downstream.TASKS:
        known = {option for parameter in commands[task.kind].params for option in parameter.opts}
        options = {part for part in task.command if part.startswith("--")} | {"--data", "--json"}
        assert options | ({"--subset-seed"} if "--per-class" in task.command else set()) <= known
        at = task.command.index("--protocol") + 1 if "--protocol" in task.command else None
        run = load_run("finetune" if at is None else task.command[at], [*task.overrides, "seed=1"])
        assert run.task is not None
        assert run.task.kind == task.kind
