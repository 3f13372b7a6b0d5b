"""Any shards, sizes, weights, ranks, workers and stops: the same batches in the same order, pixels included."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3i_scale.data.batch import Batch
from m3i_scale.data.state import merge_states

pytestmark = pytest.mark.slow

STREAMS, GLOBAL, STEPS = 12, 24, 12


@st.composite
def sources(draw):
    """Sizes of the shards of every source, and settings: schedules, passes, samples that do not decode."""
    found = {}
    for name in draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(1, 3))]:
        weight = draw(
            st.one_of(
                st.floats(0.1, 4),
                st.tuples(st.floats(0.1, 4), st.integers(1, 300), st.floats(0, 4)).map(
                    lambda drawn: [(0, drawn[0]), (drawn[1], drawn[2])]
                ),
            )
        )
        found[name] = {
            "sizes": draw(st.lists(st.integers(2, 5), min_size=STREAMS, max_size=STREAMS + 4)),
            "bad": draw(st.sampled_from([1000, 1000, 7])),  # every 7th
            "settings": {"weight": weight, "epochs": draw(st.sampled_from([None, None, 1, 2]))},
        }
    always = draw(st.sampled_from(sorted(found)))  # one without an end and always with a weight
    found[always]["settings"] = {"weight": draw(st.floats(0.1, 4)), "epochs": None}
    return found


@st.composite
def stops(draw):
    """(ranks, workers, steps) until STEPS are done."""
    left, found = STEPS, []
    while left:
        steps = draw(st.integers(1, left))
        ranks = draw(st.sampled_from([4, 2, 3, 1, 6, 12]))
        workers = draw(st.sampled_from([0, 0, 0, 3] if ranks == 1 else [0, 0, 0, 1] if ranks == 2 else [0]))
        found.append((ranks, workers, steps))
        left -= steps
    return found


def run(tools, folders, own, cache, plan):
    """Global batches of a plan, each part resumed from the state that the one before left behind."""
    state, batches = None, []
    for ranks, workers, steps in plan:
        parts, states = [], []
        for rank in range(ranks):
            loader = tools.make_loader(
                folders, cache, streams=STREAMS, world=ranks, rank=rank, micro=GLOBAL // ranks, workers=workers,
                settings=own, shuffle_shards=2, max_corrupt_fraction=1.0,
            )  # fmt: skip
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            parts.append(list(itertools.islice(loader, steps)))
            states.append(loader.state_dict())
        state = merge_states(states)
        batches += [Batch.cat(list(each)) for each in zip(*parts, strict=True)]
    return batches, state


def check_passes(batches, made):
    """Only good samples come, none more often than there are passes; without bad ones all come equally often."""
    for name, source in made.items():
        good = {number for number in range(sum(source["sizes"])) if number % source["bad"] != 4}
        keys = (key for batch in batches for key in batch.keys)
        seen = Counter(int(key[-4:]) for key in keys if key.startswith(f"{name}/"))
        assert set(seen) <= good
        if source["settings"]["epochs"]:
            assert max(seen.values(), default=0) <= source["settings"]["epochs"]
        if len(good) == sum(source["sizes"]):
            counts = [seen[number] for number in good]
            assert max(counts) - min(counts) <= 1


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=sources(), plan=stops())
def test_ranks_workers_and_stops_change_nothing(tools, tmp_path_factory, made, plan):
    root = tmp_path_factory.mktemp("elastic")
    folders = {}
    for name, source in made.items():

        def spoil(number, members, bad=source["bad"]):
            return {**members, "png": members["png"][:50]} if number % bad == 4 else members

        folders[name] = tools.write_folder(root / name, source["sizes"], change=spoil)
    own = {name: source["settings"] for name, source in made.items()}
    wanted, end = run(tools, folders, own, root / "cache", [(1, 0, STEPS)])
    turned = {name: folders[name] for name in reversed(folders)}  # the order in the run file says nothing
    got, reached = run(tools, turned, own, root / "cache", plan)
    assert reached["streams"] == end["streams"]
    check_passes(wanted, made)
    for one, other in zip(got, wanted, strict=True):
        assert one.keys == other.keys
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor) and name != "label_sets_B":  # numbered in the order of the run file
                assert torch.equal(value, getattr(other, name)), name


def test_micro_batches_of_another_size_hold_the_same_samples_in_every_step(tools, folder, cache):
    def steps(ranks, micro):
        """Samples of every stream by step, on so many ranks with so many micro-batches a step."""
        found = []
        for rank in range(ranks):
            loader = tools.make_loader({"s": folder}, cache, streams=4, world=ranks, rank=rank, micro=micro)
            count, each = 16 // (micro * ranks), micro * ranks // 4
            keys = [batch.keys for batch in itertools.islice(loader, 3 * count)]
            for stream in range(4 // ranks):
                own = [key for part in keys for key in part[stream * each : (stream + 1) * each]]
                found.append([own[:4], own[4:8], own[8:]])
        return found

    assert steps(4, 4) == steps(1, 4) == steps(2, 2) == steps(1, 16)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ranks_and_workers_lose_and_repeat_nothing(seed):
    """The benchmark at the size of a test: real ranks and workers, ended by SIGKILL. In a process of its own, since
    ranks are forked from it and tests leave threads behind."""
    benchmark = Path(__file__).resolve().parents[2] / "benchmarks" / "elastic.py"
    command = [sys.executable, str(benchmark), "--json", "--plans", "1", "--steps", "18", "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert (found["lost"], found["repeated"]) == (0, 0)
    assert found["order_identical"]
    assert found["pixels_identical"]
    assert sum(segment["done"] for plan in found["plans"] for segment in plan["segments"]) == 18
