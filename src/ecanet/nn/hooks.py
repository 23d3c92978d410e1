"""Whether calling a module does more than its class says."""

from torch import nn

from ecanet.private_torch import has_any_global_hook


def called_differently(module: nn.Module, known_hooks: int = 0) -> bool:
    """Whether calling the module does more than its class says: hooks, its own or global, or another ``forward``.

    Args:
        module: The module.
        known_hooks: So many forward hooks are known and accounted for.
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
    """Whether a module may as well not be called: it returns its input, and nobody looks on."""
    return module is None or (type(module) is nn.Identity and not called_differently(module))
