"""Entry point of `python -m m3i_scale`, `m3i-scale` and launchers."""

import os
import sys

from m3i_scale.host.processes import end_with_parent
from m3i_scale.rank_variables import limit_threads, ranks_on_host

_STARTERS = ["launch"], ["doctor"]
"""Commands that start ranks, which set their thread counts themselves."""

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as in a shell; typer uses it too."""


def run() -> None:
    """Run the command line and end the process without interpreter shutdown.

    DeepSpeed's hooks keep an engine alive, with threads of the process group, and after an error a thread may still
    write a checkpoint. Normal shutdown sometimes aborts on these threads or waits for them. Open files are closed
    before.
    """
    end_with_parent()  # before the imports, which take seconds in which the parent may end
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
