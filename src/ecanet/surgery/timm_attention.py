"""timm's attention modules as gates of this library, for the fused tail, with the same parameters and keys."""

from typing import Any

from torch import Tensor, nn

from ecanet.nn import ECA, Gate
from ecanet.nn.hooks import called_differently
from ecanet.nn.inner_layers import is_plain
from ecanet.nn.norms import qualified_name
from ecanet.ops import reference


class SEModule(Gate):
    """timm's squeeze-and-excitation: 1 x 1 convolutions with biases, any activations, an optional norm between them.

    Args:
        channels: Number of channels C.
        timm: timm's module; this one takes over its layers.

    Source:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """

    def __init__(self, channels: int, timm: nn.Module) -> None:
        super().__init__(channels)
        self.fc1, self.bn, self.act, self.fc2 = (timm.get_submodule(name) for name in ("fc1", "bn", "act", "fc2"))
        self.scale_activation = timm.get_submodule("gate")

    def logits(self, s: Tensor) -> Tensor:
        """The layers one after another, ``(N, C)`` to ``(N, C)``."""
        x = s.to(next(self.fc1.parameters()).dtype)[:, :, None, None]
        return self.fc2(self.act(self.bn(self.fc1(x))))[:, :, 0, 0].to(s.dtype)

    def gate(self, s: Tensor) -> Tensor:
        """Gates from channel means, ``(N, C)`` to ``(N, C)``."""
        return self.scaled(self.scale_activation(self.logits(reference.check_means(s, self.channels))))


def as_gate(attention: nn.Module, channels: int | None) -> nn.Module:
    """The same attention as a gate that the fused tail takes; attention that has no such gate is returned as it is.

    Args:
        attention: A module of timm; its parameters are shared, its keys kept.
        channels: Number of channels C.
    """
    if channels is None or any(called_differently(module) for module in attention.modules()):
        return attention
    name = qualified_name(type(attention))
    gate: Gate | None = None
    if name in ("timm.layers.eca.EcaModule", "timm.layers.eca.CecaModule"):
        gate = _eca(attention, channels)
    elif name == "timm.layers.squeeze_excite.SEModule" and not attention.add_maxpool:
        gate = SEModule(channels, attention)
    return attention if gate is None else gate.train(attention.training)


def _eca(attention: nn.Module, channels: int) -> ECA | None:
    conv: Any = attention.get_submodule("conv")
    experiment = getattr(attention, "conv2", None) is not None
    if experiment or not isinstance(conv, nn.Conv1d) or type(attention.get_submodule("gate")).__name__ != "Sigmoid":
        return None
    k = conv.kernel_size[0]
    if not is_plain(conv, nn.Conv1d, (1, 1, k)):
        return None
    circular = type(attention).__name__ == "CecaModule"  # it pads before the convolution
    if (conv.stride, conv.padding, conv.dilation) != ((1,), (0 if circular else (k - 1) // 2,), (1,)):
        return None
    eca = ECA(channels, k, circular=circular)
    eca.conv.weight = conv.weight
    return eca
