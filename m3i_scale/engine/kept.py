"""Mark frozen parameters that are saved in checkpoints."""

from __future__ import annotations

from torch import nn

_KEPT = "kept_in_checkpoints"


def keep_in_checkpoints(module: nn.Module) -> None:
    """Mark the frozen parameters of a module to be saved in checkpoints, in their compute dtype."""
    for parameter in module.parameters():
        setattr(parameter, _KEPT, True)


def saved_frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen parameters that are saved in checkpoints, by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if getattr(parameter, _KEPT, False) and not parameter.requires_grad
    }
