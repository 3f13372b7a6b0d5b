"""Build the DeepSpeed extensions that training needs on this machine, so that the first step does not wait for them.

`--optimizers` also builds those that the CPU files do without, for tests of the other files.
"""

from __future__ import annotations

import sys

from deepspeed.accelerator import get_accelerator

from m3i_scale.scale.extensions import find_ninja, keep_to_environment, sweep_stale_locks


def main() -> None:
    """On a CPU the collectives, which DeepSpeed builds when ranks join, used or not; on a GPU the optimizer."""
    keep_to_environment()  # where training looks for them
    find_ninja()
    sweep_stale_locks()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    names = ["ShareMemCommBuilder"] if on_cpu else []
    if not on_cpu or "--optimizers" in sys.argv:
        names.append("FusedAdamBuilder")
    for name in names:
        accelerator.create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    main()
