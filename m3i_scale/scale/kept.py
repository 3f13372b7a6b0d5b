"""Mark what checkpoints hold although it does not learn."""

from __future__ import annotations

from torch import nn

_KEPT = "kept_in_checkpoints"


def keep_in_checkpoints(module: nn.Module) -> None:
    """Have checkpoints hold the parameters of a module that do not learn, in the type that is computed in."""
    for parameter in module.parameters():
        setattr(parameter, _KEPT, True)


def kept_frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what does not learn and is in checkpoints all the same, by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if getattr(parameter, _KEPT, False) and not parameter.requires_grad
    }
