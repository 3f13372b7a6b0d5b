"""Run `torchrun` with the exit code of its ranks: `python -m m3i_scale.launch.torchrun_agent …`. torchrun itself always
exits with 1, so a run that was stopped on request and has saved (75) looks like a crash. It ends its ranks half a
minute after a signal, whether they have saved or not. Its ranks survive if it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

import psutil

from m3i_scale.host.processes import TIED, end_with_parent, signals_to_note
from m3i_scale.output import print_line
from m3i_scale.rank_variables import limit_threads

_STORE_STAYS_S = 3.0


def main(arguments: list[str]) -> int:
    """Run torchrun; return the exit code of the first failed rank, as a shell reports it."""
    end_with_parent()  # first, because the parent may end during the slow imports
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
    from torch.distributed.run import determine_local_world_size, parse_args, run

    def shutdown(self: StaticTCPRendezvous) -> bool:
        """Keep the master node's store open a little longer. Otherwise, agents of other hosts print a stack trace."""
        if self.rank == 0 and self.world_size > 1:
            time.sleep(_STORE_STAYS_S)
        return True

    StaticTCPRendezvous.shutdown = shutdown  # type: ignore[method-assign]

    options = parse_args(arguments)
    limit_threads(os.environ, determine_local_world_size(options.nproc_per_node))  # otherwise torchrun sets 1
    options.signals_to_handle = "SIGQUIT"  # SIGQUIT still ends everything at once
    for number in signals_to_note():
        signal.signal(number, _ask_ranks)
    os.environ[TIED] = str(os.getpid())
    try:
        run(options)
    except ChildFailedError as error:
        print_line(str(error), stderr=True)
        _rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        return 128 - code if code < 0 else code
    return 0


def _ask_ranks(number: int, frame: FrameType | None) -> None:
    """Ask the ranks to save and exit; torchrun waits for them."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGUSR2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
