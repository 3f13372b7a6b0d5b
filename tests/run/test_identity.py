"""Settings that change what a checkpoint contains or how it goes on are part of a run's identity."""

import json
from pathlib import Path

import pytest
from tiny import tiny_run

from m3i_scale.errors import CheckpointError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.resume import _check_identity
from m3i_scale.run.setup import ResolvedRun

SGD = ("optim.eps=1e6", "optim.momentum_correction=false", "optim.weight_decay=0")


def resolved(*overrides: str) -> ResolvedRun:
    run = tiny_run("mae", *overrides)
    return ResolvedRun(run, parse_recipe(run.recipe), {}, None, 32, None, 1)


def saved_by(*overrides: str) -> dict:
    return {"identity": json.loads(json.dumps(resolved(*overrides).identity))}


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ((), ("optim.decay_tokens=false",), "decay_tokens"),
        ((), ("backbone.freeze=[]",), "freeze"),
        (SGD, (*SGD, "optim.trust_coefficient=0.001"), "trust_coefficient"),
    ],
)
def test_a_changed_setting_is_another_run(before: tuple[str, ...], now: tuple[str, ...], key: str) -> None:
    _check_identity(resolved(*before), Path("step"), saved_by(*before))
    with pytest.raises(CheckpointError, match=f"from a different run: {key} changed"):
        _check_identity(resolved(*now), Path("step"), saved_by(*before))


def test_checkpoints_from_before_the_settings_existed_go_on() -> None:
    overrides = ("backbone.freeze=[]", "optim.decay_tokens=false")
    saved = saved_by(*overrides)
    for key in ("freeze", "text_freeze", "decay_tokens", "trust_coefficient"):
        assert saved["identity"].pop(key) is None
    _check_identity(resolved(*overrides), Path("step"), saved)


@pytest.mark.parametrize("saves_default", [True, False])
def test_the_final_norm_of_an_older_classifier_is_the_default(saves_default: bool) -> None:
    task = {"kind": "classification", "pool": "mean_pool"}
    saved, now = saved_by(), resolved()
    saved["identity"]["task"] = task | ({"final_norm": True} if saves_default else {})
    now.__dict__["identity"] = now.identity | {"task": task | {"final_norm": True}}
    _check_identity(now, Path("step"), saved)
    now.__dict__["identity"]["task"]["final_norm"] = False
    with pytest.raises(CheckpointError, match="task changed"):
        _check_identity(now, Path("step"), saved)
