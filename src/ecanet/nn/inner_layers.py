"""Layers inside a gate: whether reading their weights is the same as calling them, and whether these are 0."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ecanet.nn.hooks import called_differently
from ecanet.ops import reference
from ecanet.ops.backend import PLAIN_TENSORS


def is_plain(layer: nn.Module, cls: type[nn.Module], shape: tuple[int, ...], bias: bool = False) -> bool:
    """Whether a layer inside a gate is exactly torch's, so that reading its weights is the same as calling it.

    Adapters, sharding, quantisation, pruning and parametrisation wrap layers, hook them or change the kind of their
    tensors. Such a layer is called, and autograd goes through it as through any module.

    Args:
        layer: The layer.
        cls: The class that it must be, not a subclass.
        shape: The shape that its weight must have.
        bias: Whether it must have a bias, of one value for each output; otherwise it must have none.
    """
    if type(layer) is not cls:
        return False
    own = layer.__dict__  # attribute access on a module is slow compared with a small map
    parameters = own["_parameters"]
    weight, held_bias = parameters.get("weight"), parameters.get("bias")
    return (
        type(weight) in PLAIN_TENSORS
        and weight.shape == shape
        and (held_bias is None) != bias
        and (held_bias is None or (type(held_bias) in PLAIN_TENSORS and held_bias.shape == shape[:1]))
        and not called_differently(layer)
        and "bias" not in own
    )


def call_on_means(layers: Callable[[Tensor], Tensor], s: Tensor, like: nn.Module) -> Tensor:
    """Call layers that are not plain on channel means, in the type of their own weights.

    Args:
        layers: A function that calls the layers.
        s: Channel means.
        like: The first layer; its floating-point parameters give the type. Without any, it is that of ``s``.

    Returns:
        The layers' output in the type of ``s``.
    """
    dtype = next((p.dtype for p in like.parameters() if p.is_floating_point()), s.dtype)
    with reference.no_autocast(s.device.type):
        return layers(s.to(dtype)).to(s.dtype)


def has_plain_tensors(module: nn.Module) -> bool:
    """Whether every parameter is a plain tensor, and none is hidden in an attribute."""
    held = module._parameters.values()
    return all(p is None or type(p) in PLAIN_TENSORS for p in held) and not has_unregistered_weights(module)


def is_zero(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a linear layer is known to return zeros for every input."""
    if not isinstance(layer, cls) or type(layer).forward is not cls.forward or "forward" in vars(layer):
        return False
    weights: Any = list(layer.parameters())
    if is_parametrized(layer):
        weights = [t for t in (layer.weight, layer.bias) if t is not None]
    return bool(weights) and all(type(t) in PLAIN_TENSORS and not t.any() for t in weights)


def zero_(module: nn.Module, *names: str) -> None:
    """Write zeros into weights of a module; if one is pruned, into the parameter that it is computed from, too."""
    for name in names:
        for t in (getattr(module, name, None), getattr(module, f"{name}_orig", None)):
            if t is not None:
                t.zero_()


def has_unregistered_weights(module: nn.Module) -> bool:
    """Whether a module has an unregistered weight: FullyShardedDataParallel stores its views that way."""
    return any(isinstance(t, Tensor) and t.requires_grad for t in vars(module).values())
