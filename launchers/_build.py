"""Build the DeepSpeed extensions that training needs on this machine, so that the first step does not wait for them."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from m3i_scale.scale.extensions import sweep_stale_locks


def main() -> None:
    """The optimizer's, and on a CPU that of the shared-memory collectives."""
    sweep_stale_locks()
    accelerator = get_accelerator()
    names = ["FusedAdamBuilder"] + (["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else [])
    for name in names:
        accelerator.create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    main()
