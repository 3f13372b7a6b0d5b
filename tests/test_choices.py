"""Options with a closed set of values: what `--help` shows is what the commands accept."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import typer

from m3i_scale.checkpoint_tools.consolidate import Dtype, Which
from m3i_scale.cli import app
from m3i_scale.evaluation.commands import Baseline
from m3i_scale.evaluation.encoding import Dtype as EvaluationDtype
from m3i_scale.evaluation.features import Pool
from m3i_scale.evaluation.job import MEASURES
from m3i_scale.evaluation.trained_model import MODELS
from m3i_scale.exports.write import FORMATS, TASKS
from m3i_scale.launch_command import LAUNCHERS
from m3i_scale.plan.timing import PRESETS
from m3i_scale.shards.image_folders import Captions, FolderLayout
from m3i_scale.shards.rearrange import Keys

ACCEPTED = {
    "--baseline": get_args(Baseline),
    "--captions": get_args(Captions),
    "--container-runtime": ("pyxis", "apptainer"),
    "--dtype": get_args(Dtype),
    "--format": FORMATS,
    "--hardware": tuple(PRESETS),
    "--keys": get_args(Keys),
    "--layout": get_args(FolderLayout),
    "--pool": get_args(Pool),
    "--task": TASKS,
    "--transport": ("ssh", "srun"),
    "--weights": get_args(Which),
    "--with": LAUNCHERS,
}
OF_COMMAND = {(command, "--dtype"): get_args(EvaluationDtype) for command in ("embed", "evaluate", "compare")}
"""Options of a command with other values than elsewhere."""


def options(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield from ((path, param) for param in command.params if param.param_type_name == "option")
    for name, child in getattr(command, "commands", {}).items():
        yield from options(child, f"{path} {name}".strip())


OPTIONS = list(options(typer.main.get_command(app), ""))


def shown(param: Any) -> set[str]:
    return set((param.metavar or "").replace("\n", "").strip("[]").split("|"))


@pytest.mark.parametrize("option", ACCEPTED)
def test_shown_choices_are_accepted_ones(option: str) -> None:
    found = [(path, param) for path, param in OPTIONS if option in param.opts]
    assert found
    for path, param in found:
        assert shown(param) == set(OF_COMMAND.get((path, option), ACCEPTED[option]))


def test_shown_measures_are_accepted_ones() -> None:
    measures = {path: shown(param) for path, param in OPTIONS if "--measure" in param.opts}
    assert measures["evaluate"] == {*MEASURES, *MODELS}
    assert measures["compare"] == {*MEASURES} - {"classifier"}


def test_flags_have_a_negative_half_only_if_they_are_on_by_default() -> None:
    halves = [(path, param) for path, param in OPTIONS if param.secondary_opts]
    assert {path for path, _ in halves} == {"launch", "stop"}
    assert {name for _, param in halves for name in param.secondary_opts} == {"--no-requeue", "--no-wait"}
