"""Which modules of a third-party network are norms, and whether their weight and bias can take a factor."""

from typing import Any

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ecanet.nn.attached import attached_gate
from ecanet.private_torch import NormBase

_NORMS: Any = (NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)
_KNOWN_NORMS = (
    "torch.nn.modules.batchnorm.",
    "torch.nn.modules.instancenorm.",
    "torch.nn.modules.normalization.",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "torchvision.models.convnext.LayerNorm2d",
    "timm.layers.norm.",
    "timm.layers.norm_act.",
)


def qualified_name(cls: type) -> str:
    """Module and name of a class, in the form that the library's tables of classes use."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_with_forward(module: nn.Module) -> str:
    """The class that defines the ``forward`` of a module: for a subclass that adds only a constructor, its base.

    For a block that :func:`ecanet.fuse_tails_` fused, it is the original class.
    """
    candidates = (
        cls for cls in type(module).__mro__ if "forward" in vars(cls) and not cls.__module__.startswith("ecanet.")
    )
    return qualified_name(next(candidates))


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm, including timm's norms with an activation inside."""
    return isinstance(module, _NORMS)


def activation_inside(norm: nn.Module) -> bool:
    """Whether a norm also applies an activation, as some of timm's do."""
    inside = getattr(norm, "act", None)
    return isinstance(inside, nn.Module) and not isinstance(inside, nn.Identity)


def affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a norm, if they scale and shift its output and can be written to; otherwise None.

    It is None for norms of unknown code, with a hook, or with computed weights (parametrized, pruned).
    """
    known = class_with_forward(norm).startswith(_KNOWN_NORMS) and is_norm(norm) and not activation_inside(norm)
    has_other_hooks = len(norm._forward_hooks) > (attached_gate(norm) is not None)
    if not known or has_other_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return None
    weight, bias = ((norm._parameters | norm._buffers).get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or not all(t.is_contiguous() and not t.is_inference() for t in (weight, bias)):
        return None
    return weight, bias
