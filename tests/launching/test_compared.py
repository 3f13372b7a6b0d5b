"""A larger micro-batch on fewer ranks, until it runs out of memory."""

from m3i_scale.config import load_run
from m3i_scale.elastic.worlds import ComparedSamples, World
from m3i_scale.host.failures import Failure
from m3i_scale.launch.hosts import Host

HOSTS = tuple(Host(f"node{number}", 2) for number in range(4))
SIZES = ["data.streams=24", "optim.batch_size=192", "optim.micro_batch_size=24"]


def test_a_larger_micro_batch_that_ran_out_of_memory_is_not_tried_again():
    losses = ComparedSamples(load_run("m3i", SIZES), HOSTS, 2)
    assert losses.usual == 8 * 24
    half = World(HOSTS[:2], 24)
    assert losses.keep(half)[0].micro_batch_size == 48
    assert not losses.note(Failure(1.0, "node1", 2, 1, "forward", "exception", "ValueError: something else"))
    assert losses.keep(half)[0].micro_batch_size == 48
    assert losses.note(Failure(1.0, "node1", 2, 1, "forward", "exception", "OutOfMemoryError: CUDA out of memory"))
    world, fewer = losses.keep(half)
    assert world == half
    assert "the global contrastive batch is 96, was 192" in str(fewer)
    assert losses.keep(World(HOSTS, 24))[1] is None
