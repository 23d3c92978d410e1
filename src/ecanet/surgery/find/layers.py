"""What a layer of any network is: activation, attention, convolution, or one that returns its input."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from ecanet.nn import Gate
from ecanet.nn.norms import class_with_forward, is_norm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, StochasticDepth)
_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
_ACTIVATION_FILES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
#: Activations that are called as functions or methods.
ACTIVATION_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
        *(
            F.relu,
            F.relu_,
            F.relu6,
            F.leaky_relu,
            F.elu,
            F.selu,
            F.celu,
            F.gelu,
            F.silu,
            F.mish,
            F.hardswish,
            F.hardtanh,
        ),
        *("relu", "relu_", "sigmoid", "tanh"),
    }
)

#: Packages whose convolutions and norms return as many channels as their attributes say.
_KNOWN_LAYERS = ("torch.nn.modules.", "torchvision.ops.misc.", "timm.layers.")

#: Attention that scales channels, by class, and the layer to read the number of channels from; None if none has it.
ATTENTION: dict[str, str | None] = {
    "torchvision.ops.misc.SqueezeExcitation": "fc1",
    "timm.layers.squeeze_excite.SEModule": "fc1",
    "timm.layers.squeeze_excite.EffectiveSEModule": "fc",
    "timm.layers.eca.EcaModule": None,
    "timm.layers.eca.CecaModule": None,
    "timm.layers.cbam.CbamModule": "channel.fc1",
    "timm.layers.cbam.LightCbamModule": "channel.fc1",
    "timm.layers.gather_excite.GatherExcite": None,
    "timm.layers.global_context.GlobalContext": None,
    "timm.models._efficientnet_blocks.SqueezeExcite": "conv_reduce",
    "timm.models.senet.SEModule": "fc1",
    "timm.models.hgnet.EseModule": "conv",
    "segmentation_models_pytorch.base.modules.SCSEModule": "cSE.1",
}


def is_attention(module: nn.Module) -> bool:
    """Whether the module is channel attention: one of this library's gates, or one of :data:`ATTENTION`."""
    return isinstance(module, Gate) or class_with_forward(module) in ATTENTION


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation."""
    return type(module).__module__ in _ACTIVATION_FILES and not isinstance(module, _NO_ACTIVATIONS)


def is_transparent(module: nn.Module) -> bool:
    """Whether a module returns its input, apart from what it drops at random in training."""
    return isinstance(module, _TRANSPARENT) or type(module).__name__ in ("DropPath", "DropBlock2d") or is_empty(module)


def is_empty(module: nn.Module | None) -> bool:
    """Whether it is None or an empty sequence, which returns its input."""
    return module is None or (type(module) is nn.Sequential and not len(module))


def count_convolutions(module: nn.Module) -> int:
    """Number of convolutions in the module, without those inside attention."""
    if is_attention(module):
        return 0
    return int(isinstance(module, CONVOLUTIONS)) + sum(count_convolutions(child) for child in module.children())


def out_channels(module: nn.Module) -> int | None:
    """Number of channels that a module returns, read from its last layer that has one; None if none has."""
    if is_attention(module):
        return None
    for attribute in ("out_channels", "num_features", "num_channels", "out_features"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1]) if len(module.normalized_shape) == 1 else None
    if isinstance(module, FrozenBatchNorm2d):
        return module.weight.numel()
    return next((c for child in reversed(list(module.children())) if (c := out_channels(child)) is not None), None)


def certain_channels(module: nn.Module) -> int | None:
    """Number of channels that a module returns if its class leaves no doubt: a convolution, a norm, a sequence."""
    if type(module).__module__.startswith(_KNOWN_LAYERS) and (isinstance(module, CONVOLUTIONS) or is_norm(module)):
        return out_channels(module)
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return None
    for child in reversed(list(module)):
        if not (is_transparent(child) or is_activation(child) or type(child).__module__ == "torch.nn.modules.pooling"):
            return certain_channels(child)
    return None


def resolve(module: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Name and module at a path in which ``-1`` is the last child.

    Example:
        >>> resolve(nn.Sequential(nn.ReLU(), nn.Tanh()), "-1")
        ('1', Tanh())
    """
    names = []
    for part in path.split("."):
        names.append(next(reversed(module._modules)) if part == "-1" else part)
        module = module.get_submodule(names[-1])
    return ".".join(names), module


def folds_later(module: nn.Module) -> bool:
    """Whether the module can merge its layers for deployment, which would lose a gate that is attached to one."""
    return hasattr(module, "fuse") or merges_branches(module)


#: Why a module that can merge its layers is left out.
MERGES = "it can merge its layers for deployment (fuse, reparameterize), and a gate inside would be lost"


def merges_branches(module: nn.Module) -> bool:
    """Whether the module can become one convolution for deployment, as RepVGG's can: no gate can be inside it."""
    return any(hasattr(module, name) for name in ("forward_fuse", "reparameterize", "switch_to_deploy"))


def attention_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every attention module of a network by name; attention inside attention does not count."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and is_attention(module) and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            yield name, module


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name under which each module is registered."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names
