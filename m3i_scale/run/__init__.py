"""One run from start to end: checks before step 1, the loop with its hooks and callbacks, resume, and plan."""
