"""Start the command as a module, for `python -m m3i_scale`, `m3i-scale` and launchers."""

import os
import sys

from m3i_scale.cores import limit_threads
from m3i_scale.launch.processes import end_with_parent
from m3i_scale.rank_variables import ranks_on_host

_STARTERS = ["launch"], ["doctor"]
"""Commands that start ranks, which choose their threads themselves."""

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it; typer ends commands with it too."""


def run() -> None:
    """Run the command line, and end the process.

    Whatever is open has been closed by then. What is left is an engine that DeepSpeed's hooks keep alive, with threads
    of the process group, and, after an error, a thread that still writes a checkpoint: an interpreter that goes down
    under them is aborted now and then, or waits for them.
    """
    end_with_parent()  # before seconds of imports, in which the parent may end
    if sys.argv[1:2] not in _STARTERS:
        limit_threads(os.environ, ranks_on_host(os.environ) or 1)
    try:
        from m3i_scale.cli import main

        main()
        code: object = 0
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        sys.stderr.write("interrupted\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    run()
