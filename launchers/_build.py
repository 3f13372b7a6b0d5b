"""Build the DeepSpeed extension that training on CPUs needs, so that the first step does not wait for it."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from m3i_scale.engine.extensions import find_ninja, keep_to_environment, sweep_stale_locks


def main() -> None:
    """Build the collectives of CPUs, which DeepSpeed builds when ranks join, used or not; GPUs need nothing."""
    keep_to_environment()  # where training looks for them
    find_ninja()
    sweep_stale_locks()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    main()
