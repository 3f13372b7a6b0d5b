"""Live bytes, and a heap by glibc's rules."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.scale.plan.ledger import Heap, Ledger


def test_the_peak_is_split_into_parts():
    ledger = Ledger(heap=False)
    first = ledger.take("activations", 100)
    ledger.take("parameters", 50)
    ledger.give(first)
    ledger.take("gradients", 20)
    assert ledger.peak == 150
    assert ledger.at_peak == {"activations": 100, "parameters": 50}
    assert ledger.live == 70


def test_a_tensor_may_change_its_part():
    ledger = Ledger(heap=False)
    handle = ledger.take("activations", 100)
    ledger.move(handle, "gradients")
    assert ledger.parts["gradients"] == 100
    assert ledger.parts["activations"] == 0
    ledger.give(handle)
    assert ledger.live == 0


def test_a_hole_is_taken_again_and_one_that_is_too_small_stays():
    heap = Heap()
    chunk = heap.take(2**20)
    heap.take(2**20)
    top = heap.top
    heap.give(*chunk)
    chunk = heap.take(2**20)
    assert heap.top == top
    heap.give(*chunk)
    heap.take(2**20 + 4096)
    assert heap.top > top + 2**20


def test_what_a_thread_of_its_own_takes_lies_outside_the_heap():
    ledger = Ledger(heap=True)
    ledger.take("parameters", 2**20)
    before = ledger.peak
    ledger.pass_by("collectives", 2**20, apart=True)
    assert ledger.peak == before + 2**20
    ledger.take("parameters", 2**10)
    assert ledger.peak == before + 2**20


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 2**22)), max_size=80))
def test_chunks_of_a_heap_never_overlap(actions):
    heap, held = Heap(), []
    for takes, number in actions:
        if takes or not held:
            held.append(heap.take(number))
        else:
            heap.give(*held.pop(number % len(held)))
        spans = sorted((start, start + size) for start, size in held)
        assert all(one[1] <= two[0] for one, two in pairwise(spans))
        assert not spans or spans[-1][1] <= heap.top


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=30))
def test_a_heap_is_never_smaller_than_what_lies_in_it(sizes):
    ledger = Ledger(heap=True)
    for size in sizes:
        ledger.take("activations", size)
    assert ledger.peak >= sum(sizes)
    assert sum(ledger.at_peak.values()) == ledger.peak
