"""Train by a run file, and print in which order processes were forked, the run was checked and the ranks joined."""

import sys

from m3i_scale.config import load_run
from m3i_scale.run import train

moments = []
sys.addaudithook(lambda event, _: moments.append("fork") if event == "os.fork" else None)


def noting(name):
    function = getattr(train, name)

    def call(*arguments):
        moments.append(name)
        return function(*arguments)

    setattr(train, name, call)


noting("check_first")  # it asks the accelerator what it can do
noting("start_ranks")
train.start(load_run(sys.argv[1], sys.argv[2:]))
print("moments:", *moments)
