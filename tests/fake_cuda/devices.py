"""The device check of CUDA's kernels, by the rule by which torch generates it.

Fake tensors let a number on the CPU (a tensor without dimensions) pass wherever PyTorch lets it pass for some kernels.
Of a kernel with a generated check all tensors must lie on one device, numbers included: `_fused_adamw_`, for example,
does not take its count of steps from the host.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torchgen
import yaml
from clocks import line, machine
from memory import is_on_device, storage_of
from torch import Tensor


@functools.cache
def checked_kernels() -> frozenset[str]:
    """Return the operators whose CUDA kernel has the check, as `aten::name.overload`."""
    listed = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    functions = yaml.load(listed.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {function["func"].partition("(")[0]: function for function in functions}

    def has_kernel(function: dict[str, Any]) -> bool:
        if "structured_delegate" in function:
            return has_kernel(by_name[function["structured_delegate"]])
        keys = ",".join(function.get("dispatch", {})).replace(" ", "").split(",")
        return "CUDA" in keys

    return frozenset(
        f"aten::{name}"
        for name, function in by_name.items()
        if function.get("device_check") != "NoCheck" and has_kernel(function)
    )


def check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Report a kernel with the check that is given tensors of the host beside those of the device."""
    of_host = [tensor for tensor in tensors if not is_on_device(tensor)]
    if not of_host or len(of_host) == len(tensors):
        return
    overload = func._overloadname
    name = func._schema.name + ("" if overload == "default" else f".{overload}")
    if name in checked_kernels():
        made_at = storage_of(of_host[0]).made_at
        machine.faults[f"device: {name} at {line()} is given a tensor of the host, made at {made_at}"] += 1
