"""Whether calling a module does more than its class says."""

from torch import nn

from ecanet.private_torch import has_any_global_hook


def called_differently(module: nn.Module, known_hooks: int = 0) -> bool:
    """Whether calling the module does more than its class says: hooks, its own or global, or another ``forward``.

    Args:
        module: The module.
        known_hooks: Number of forward hooks that the caller already accounts for.
    """
    return bool(
        len(module._forward_hooks) > known_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or has_any_global_hook()
    )


def is_identity(module: nn.Module | None) -> bool:
    """Whether a call of the module can be skipped: it returns its input, and no hook observes it."""
    return module is None or (type(module) is nn.Identity and not called_differently(module))
