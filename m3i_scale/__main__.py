"""`python -m m3i_scale`, so that launchers can start the command as a module."""

from m3i_scale.cli import main

main()
