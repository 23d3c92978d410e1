"""Whether calling a module does what its class is known for, and if not, why."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ecanet.private_torch import has_any_global_hook

_KNOWN: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish,
)  # fmt: skip
#: The methods, at import, of classes that the library computes itself: user code may replace them later.
_METHODS: dict[type, tuple[tuple[str, Callable[..., Any]], ...]] = {
    cls: tuple((name, getattr(cls, name)) for name in ("forward", "_conv_forward") if hasattr(cls, name))
    for cls in _KNOWN
}


def why_called(module: nn.Module, known_hooks: int = 0) -> str | None:
    """Why a call of the module does something other than its class is known for; None if it does not.

    Args:
        module: The module.
        known_hooks: Number of forward hooks that the caller already accounts for.

    Returns:
        A verb and what follows, such as ``"has a hook"``.
    """
    if (
        len(module._forward_hooks) > known_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has a hook"
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own:
        return "has a forward of its own, not its class's"
    cls = type(module)
    if cls.__call__ is not nn.Module.__call__:
        return f"is a {cls.__name__}, whose __call__ is not torch's"
    for name, method in _METHODS.get(cls, ()):
        if getattr(cls, name) is not method:
            return f"is a {cls.__name__}, whose {name} was replaced"
    return "is seen by a hook on all modules" if has_any_global_hook() else None


def called_differently(module: nn.Module, known_hooks: int = 0) -> bool:
    """Whether a call of the module does something other than its class is known for: see :func:`why_called`."""
    return why_called(module, known_hooks) is not None


def is_identity(module: nn.Module | None) -> bool:
    """Whether a call of the module can be skipped: it returns its input, and no hook observes it."""
    return module is None or (type(module) is nn.Identity and not called_differently(module))
