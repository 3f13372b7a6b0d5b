"""`python -m m3i_scale`, so that launchers can start the command as a module."""

import os
import sys

from m3i_scale.cli import main

try:
    main()
    code: object = 0
except SystemExit as stop:
    code = stop.code
# Whatever is open has been closed by now. What is left is an engine that DeepSpeed's hooks keep alive, with threads of
# the process group: an interpreter that goes down under them is aborted now and then, after the run has finished.
sys.stdout.flush()
sys.stderr.flush()
os._exit(code if isinstance(code, int) else int(code is not None))
