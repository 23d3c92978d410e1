"""Squeeze-and-Excitation, its variants from the paper's Table 2, effective SE, and SE with a shift."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ecanet.nn.activations import Activation
from ecanet.nn.gate import Gate, LinearGate, has_own_maths
from ecanet.nn.inner_layers import call_on_means, is_plain, is_zero
from ecanet.nn.kernel_size import check_channels
from ecanet.nn.tail.maths import GateMaths, ScaleAndShift, Statistics
from ecanet.ops import reference


class SE(Gate):
    """Squeeze-and-Excitation: ``sigmoid(W2 relu(W1 s))`` (Eq. 1, 2). 2 C^2 / r parameters, no biases.

    As long as ``fc1`` and ``fc2`` are exactly the layers that are made here, only their weights are read. If one is
    hooked, pruned, adapted, sharded, quantised or replaced, the layers are called.

    Args:
        channels: Number of channels C.
        reduction: r; the hidden layer has C // r channels, at least 1. The paper uses 16 for ResNets and 8 for
            MobileNetV2.
        activation: ``"sigmoid"``, or ``"hard_sigmoid"`` as in MobileNetV3.
        factor: Multiplies every gate value; 2 undoes the sigmoid of 0.

    Raises:
        TypeError: ``channels`` or ``reduction`` is not an integer, ``factor`` is not a number.
        ValueError: ``channels`` or ``reduction`` below 1, unknown ``activation``, ``factor`` not finite and above 0.

    Source:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018; parameter counts as in ECA-Net's Tables 2 and 3.

    Example:
        >>> SE(256)(torch.randn(2, 256, 7, 7)).shape
        torch.Size([2, 256, 7, 7])
    """

    #: Whether the layers have biases, and how many values the second gives a channel.
    _biases: ClassVar[bool] = False
    _outputs: ClassVar[int] = 1

    def __init__(
        self, channels: int, reduction: int = 16, *, activation: Activation = "sigmoid", factor: float = 1.0
    ) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        self.reduction = check_reduction(reduction)
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden, bias=self._biases)
        self.fc2 = nn.Linear(hidden, self._outputs * channels, bias=self._biases)

    def logits(self, s: Tensor) -> Tensor:
        """Two fully connected layers with a ReLU between them, ``(N, C)`` to ``(N, C)``."""
        return self._layers(s)

    def _layers(self, s: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if not self._can_read_weights(fc1, fc2):
            return call_on_means(lambda means: fc2(torch.relu(fc1(means))), s, fc1)
        return _apply(fc2, torch.relu(_apply(fc1, s)))

    def _can_read_weights(self, fc1: nn.Module, fc2: nn.Module) -> bool:
        """Whether reading the layers' weights is the same as calling the layers."""
        hidden, outputs = max(1, self.channels // self.reduction), self._outputs * self.channels
        return is_plain(fc1, nn.Linear, (hidden, self.channels), self._biases) and is_plain(
            fc2, nn.Linear, (outputs, hidden), self._biases
        )

    def maths(self) -> GateMaths | None:
        """The gate with its two weights, unless it was changed."""
        own, cls = self.__dict__, type(self)
        changed = (cls.scale_and_shift, cls.gate, cls.logits) != (Gate.scale_and_shift, Gate.gate, SE.logits)
        if changed or has_own_maths(own):
            return super().maths()
        fc1, fc2 = own["_modules"].get("fc1"), own["_modules"].get("fc2")
        if not self._can_read_weights(fc1, fc2):
            return None
        return GateMaths(self.scale_and_shift, (fc1._parameters["weight"], fc2._parameters["weight"]))

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set W2 and its bias, if there is one, to 0, and keep W1; every gate value becomes 1/2.

        Because W1 is not 0, W2 gets gradients from the start.
        """
        for weight in self.fc2.parameters():  # of a pruned weight, this is what it is computed from
            weight.zero_()
        return 0.5

    def weights_on_means(self) -> tuple[Tensor, ...]:
        """W1: the ReLU after it preserves positive factors."""
        return (self.fc1.weight,) if self._can_read_weights(self.fc1, self.fc2) else ()

    def is_neutral(self) -> bool:
        """Whether W2 = 0."""
        return is_zero(self.fc2, nn.Linear)

    def _options(self) -> list[str]:
        return [f"reduction={self.reduction}"]


class SEShift(SE):
    """SE that also shifts: ``x * sigmoid(l) + b``, with ``(l, b) = W2 relu(W1 s + b1) + b2``, 2 C values.

    3 C h + 2 C + h parameters, with h = C // r. In networks of this kind the gate follows the last norm of a residual
    branch, and addition and ReLU follow it.

    Args:
        channels: Number of channels C.
        reduction: r; the hidden layer has C // r channels, at least 1. Leela Chess Zero uses 32 for 256 channels.
        activation: That of the scale, ``"sigmoid"`` or ``"hard_sigmoid"``.
        factor: Multiplies every gate value; not the shift.

    Raises:
        TypeError, ValueError: as :class:`SE`.

    Source:
        Leela Chess Zero, after Hu et al., CVPR 2018: lczero.org/dev/backend/nn, "SE layer". Its scales come first among
        the 2 C values.

    Example:
        >>> gate, x = SEShift(64), torch.randn(2, 64, 8, 8)
        >>> scale, shift = gate.scale_and_shift(gate.statistics(x))
        >>> torch.allclose(gate(x), x * scale[:, :, None, None] + shift[:, :, None, None], atol=1e-6)
        True
    """

    _biases = True
    _outputs = 2

    def __init__(
        self, channels: int, reduction: int = 8, *, activation: Activation = "sigmoid", factor: float = 1.0
    ) -> None:
        super().__init__(channels, reduction, activation=activation, factor=factor)

    def logits(self, s: Tensor) -> Tensor:
        """The logits of the scale, ``(N, C)`` to ``(N, C)``."""
        return self._layers(s)[:, : self.channels]

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """The sigmoid of the first C values, and the others."""
        both = self._layers(reference.check_means(statistics.means, self.channels))
        return self.scaled(self.activate(both[:, : self.channels])), both[:, self.channels :]


class ESE(Gate):
    """Effective SE: ``hard_sigmoid(W s + b)``, one full layer instead of SE's two. C^2 + C parameters.

    Keys are those of timm's ``EffectiveSEModule``; its weight, ``(C, C, 1, 1)``, loads.

    Args:
        channels: Number of channels C.
        activation: ``"hard_sigmoid"``, or ``"sigmoid"``.
        factor: Multiplies every gate value; 2 undoes the hard sigmoid of 0.

    Raises:
        TypeError: ``channels`` is not an integer, ``factor`` is not a number.
        ValueError: ``channels`` below 1, unknown ``activation``, ``factor`` not finite and above 0.

    Source:
        Lee and Park, CenterMask: Real-Time Anchor-Free Instance Segmentation, CVPR 2020, arXiv:1911.06667, where it is
        part of VoVNetV2; the hard sigmoid is that of the authors' code.

    Example:
        >>> ESE(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    activation = "hard_sigmoid"

    def __init__(self, channels: int, *, activation: Activation = "hard_sigmoid", factor: float = 1.0) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        self.fc = nn.Linear(channels, channels)

    def logits(self, s: Tensor) -> Tensor:
        """One fully connected layer with a bias, ``(N, C)`` to ``(N, C)``."""
        fc = self.fc
        return _apply(fc, s) if self._can_read_weights(fc) else call_on_means(fc, s, fc)

    def _can_read_weights(self, fc: nn.Module) -> bool:
        return is_plain(fc, nn.Linear, (self.channels, self.channels), bias=True)

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set W and b to 0; every gate value becomes 1/2."""
        for weight in self.fc.parameters():
            weight.zero_()
        return 0.5

    def weights_on_means(self) -> tuple[Tensor, ...]:
        """W."""
        return (self.fc.weight,) if self._can_read_weights(self.fc) else ()

    def is_neutral(self) -> bool:
        """Whether W and b are 0."""
        return is_zero(self.fc, nn.Linear)


class SEVar1(LinearGate):
    """SE-Var1: W = I, ``sigmoid(s)``. No parameters, so it cannot be made neutral.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Table 2.

    Example:
        >>> SEVar1(2).gate(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, channels: int, *, activation: Activation = "sigmoid", factor: float = 1.0) -> None:
        super().__init__(channels, activation=activation, factor=factor)

    def logits(self, s: Tensor) -> Tensor:
        """The channel means themselves."""
        return s


class SEVar2(LinearGate):
    """SE-Var2: W diagonal, every channel on its own (Eq. 4). C parameters.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Table 2.

    Example:
        >>> SEVar2(3).matrix().count_nonzero().item()
        3
    """

    def __init__(self, channels: int, *, activation: Activation = "sigmoid", factor: float = 1.0) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights uniformly from (-1, 1), like those of a layer with one input."""
        nn.init.uniform_(self.weight, -1, 1)
        super().reset_parameters()

    def logits(self, s: Tensor) -> Tensor:
        """Every channel mean times its own weight."""
        return s * self.weight.to(s.dtype)


class SEGroup(LinearGate):
    """SE-GC: W block diagonal with G blocks; the channels of a group interact (Eq. 5). C^2 / G parameters.

    Args:
        channels: Number of channels C.
        groups: G, a divisor of C. Table 2: SE-GC1 has G = 16, SE-GC2 C / 16, SE-GC3 C / 8.
        activation: As in :class:`SE`.
        factor: As in :class:`SE`.

    Raises:
        TypeError: ``channels`` or ``groups`` is not an integer, ``factor`` is not a number.
        ValueError: ``groups`` does not divide ``channels``, unknown ``activation``, ``factor`` is not finite and above
            0.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Table 2.

    Example:
        >>> SEGroup(64, groups=64 // 16).weight.numel() == 16 * 64
        True
    """

    def __init__(
        self, channels: int, groups: int = 16, *, activation: Activation = "sigmoid", factor: float = 1.0
    ) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        self.groups = check_groups(groups, channels)
        self.weight = nn.Parameter(torch.empty(groups, channels // groups, channels // groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights like those of ``torch.nn.Linear``: uniform within 1 / sqrt(inputs of a block)."""
        bound = 1 / math.sqrt(self.channels // self.groups)
        nn.init.uniform_(self.weight, -bound, bound)
        super().reset_parameters()

    def logits(self, s: Tensor) -> Tensor:
        """The block-diagonal matrix times the channel means, ``(N, C)`` to ``(N, C)``."""
        return reference.grouped_linear(s, self.weight)

    def _options(self) -> list[str]:
        return [f"groups={self.groups}"]


class SEVar3(SEGroup):
    """SE-Var3: W full, one group in which all channels interact (Eq. 4). C^2 parameters.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Table 2.

    Example:
        >>> SEVar3(8).weight.shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, channels: int, *, activation: Activation = "sigmoid", factor: float = 1.0) -> None:
        super().__init__(channels, groups=1, activation=activation, factor=factor)

    def _options(self) -> list[str]:
        return []


def se_gc2(channels: int, *, activation: Activation = "sigmoid", factor: float = 1.0) -> SEGroup:
    """SE-GC2 of Table 2: C / 16 groups of 16 channels. 16 C parameters."""
    return _groups_of(channels, 16, activation, factor)


def se_gc3(channels: int, *, activation: Activation = "sigmoid", factor: float = 1.0) -> SEGroup:
    """SE-GC3 of Table 2: C / 8 groups of 8 channels. 8 C parameters."""
    return _groups_of(channels, 8, activation, factor)


def _groups_of(channels: int, size: int, activation: Activation, factor: float) -> SEGroup:
    check_channels(channels)
    if channels % size:
        raise ValueError(f"channels must be a multiple of {size} for groups of {size} channels, got {channels}")
    return SEGroup(channels, groups=channels // size, activation=activation, factor=factor)


def check_reduction(reduction: int) -> int:
    """Return ``reduction`` if it is an integer of at least 1.

    Raises:
        TypeError: ``reduction`` is not an integer.
        ValueError: ``reduction`` below 1.
    """
    if isinstance(reduction, bool) or not isinstance(reduction, int):
        raise TypeError(f"reduction must be an integer, got {reduction!r}")
    if reduction < 1:
        raise ValueError(f"reduction must be 1 or more, got {reduction}: the paper uses 16")
    return reduction


def check_groups(groups: int, channels: int) -> int:
    """Return ``groups`` if it divides the channels into groups of equal size.

    Raises:
        TypeError: ``groups`` is not an integer.
        ValueError: ``groups`` does not divide ``channels``.
    """
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    if groups < 1 or channels % groups:
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ValueError(f"groups must divide channels={channels}, got {groups}: try one of {divisors}")
    return groups


def _apply(layer: nn.Linear, s: Tensor) -> Tensor:
    """The output of a plain layer, computed in the type of ``s``, ``(N, inputs)`` to ``(N, outputs)``."""
    out = reference.grouped_linear(s, layer.weight.unsqueeze(0))
    bias = layer.bias
    return out if bias is None else out + bias.to(s.dtype)
