"""Gates that see the map itself: CBAM and SimAM. The tail calls them, and fuses the rest."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ecanet.nn.activations import Activation
from ecanet.nn.gate import Gate
from ecanet.nn.inner_layers import call_on_means, is_plain, is_zero
from ecanet.nn.moments import check_eps
from ecanet.nn.se import check_reduction
from ecanet.nn.tail.maths import GateMaths, ScaleAndShift, Statistics
from ecanet.nn.tail.shared_norm import call_norm_in_type_of
from ecanet.ops import reference


class MapGate(Gate):
    """A gate that statistics are not enough for: it may scale every position of a map by a different number.

    Factor, neutral start, files and surgery are those of every :class:`Gate`. A subclass defines :meth:`scale_map`.
    A channel has no single gate value, so :meth:`gate`, :meth:`logits` and :meth:`scale_and_shift` raise an error.
    """

    sees_map = True

    @abstractmethod
    def scale_map(self, x: Tensor) -> Tensor:
        """A checked map times the gate, without :attr:`factor`; float32 for half types: the base class rounds it."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale a feature map.

        Args:
            x: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions; N may be 0.

        Returns:
            The shape, type, memory format and device of ``x``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: wrong rank or number of channels, or a spatial size of 0.
        """
        return self.scaled(self.scale_map(reference.check_map(x, self.channels))).to(x.dtype)

    def logits(self, s: Tensor) -> Tensor:
        """Not available: the gate is not a function of the means.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} needs more of a map than statistics: call the module on the map")

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """Not available: a channel has no single scale.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} needs more of a map than statistics: call the module on the map")

    def answer(self, x: Tensor) -> ScaleAndShift:
        """For every channel, the mean over its positions of the number that they are multiplied by; no shift.

        Positions where x is 0 do not show it and are left out; a channel of zeros is NaN.
        """
        x = reference.check_map(x, self.channels).to(reference.accumulation_dtype(x.dtype))
        ratios = (self.scaled(self.scale_map(x)) / x).reshape(*x.shape[:2], -1)  # 0 / 0 is NaN
        return ratios.nanmean(2), None

    def maths(self) -> GateMaths | None:
        """None: statistics are not enough."""
        return None

    def constant(self) -> float | None:
        """As :meth:`Gate.constant`; None if a subclass has its own :meth:`scale_map` but inherits ``is_neutral``."""
        base = next(c for c in type(self).__mro__ if "is_neutral" in vars(c))
        is_known = getattr(base, "scale_map", None) is type(self).scale_map and "scale_map" not in vars(self)
        return super().constant() if is_known else None


class CBAM(MapGate):
    """Convolutional Block Attention Module: a gate for every channel, then one for every position.

    ``y = x sigmoid(mlp(means of x) + mlp(maxima of x))`` with ``mlp(s) = W2 relu(W1 s)``, means and maxima over the
    positions; ``out = y sigmoid(bn(conv(means of y, maxima of y)))``, over the channels, with a 7 x 7 convolution.
    2 C h + 100 parameters, with h = C / r rounded.

    A map of one dimension counts as one of width 1; a map of three is a stack of slices, each convolved by itself.

    Keys are those of timm's ``CbamModule``: state dicts load both ways. A layer that is more than torch's plain one is
    called, as in every gate.

    Args:
        channels: Number of channels C.
        reduction: r; the hidden layer has C / r channels, rounded, at least 1.
        activation: Of both gates, ``"sigmoid"`` or ``"hard_sigmoid"``.
        factor: Multiplies every gate value; 4 undoes two sigmoids of 0.

    Raises:
        TypeError: ``channels`` or ``reduction`` is not an integer, ``factor`` is not a number.
        ValueError: ``channels`` or ``reduction`` below 1, unknown ``activation``, ``factor`` not finite and above 0;
            torch's BatchNorm, in training on a single position.

    Source:
        Woo et al., CBAM, ECCV 2018, arXiv:1807.06521, Eq. (1) to (3); the norm after the convolution as in the authors'
        code.

    Example:
        >>> cbam, x = CBAM(64), torch.randn(2, 64, 14, 14)
        >>> cbam.make_identity_()
        >>> cbam.factor, torch.equal(cbam(x), x)
        (4.0, True)
    """

    neutral_value = 0.25

    def __init__(
        self, channels: int, reduction: int = 16, *, activation: Activation = "sigmoid", factor: float = 1.0
    ) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        self.reduction = check_reduction(reduction)
        self.channel = _ChannelHalf(channels, max(1, int(channels / reduction + 0.5)))
        self.spatial = _SpatialHalf()

    def reset_parameters(self) -> None:
        """Draw the layers' weights again, as torch does."""
        for layer in (self.channel.fc1, self.channel.fc2, self.spatial.conv.conv, self.spatial.conv.bn):
            layer.reset_parameters()
        super().reset_parameters()

    def scale_map(self, x: Tensor) -> Tensor:
        """Both halves, one after the other."""
        channel_gates = self.activate(self.channel(reference.squeeze(x, self.channels), reference.maxima(x)))
        y = reference.scale_exactly(x, channel_gates)
        return reference.scale_positions(y, self.activate(self.spatial(reference.over_channels(y))))

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set W2 to 0, and the norm's weight and bias; every gate value becomes 1/2 times 1/2."""
        bn = self.spatial.conv.bn
        for weight in (*self.channel.fc2.parameters(), *bn.parameters()):
            weight.zero_()
        return 0.25

    def is_neutral(self) -> bool:
        """Whether W2, and the norm's weight and bias are 0."""
        norm_weights = list(self.spatial.conv.bn.parameters())
        is_norm_zero = bool(norm_weights) and not any(bool(t.any()) for t in norm_weights)
        return is_zero(self.channel.fc2, nn.Conv2d) and is_norm_zero

    def _options(self) -> list[str]:
        return [f"reduction={self.reduction}"]


class _ChannelHalf(nn.Module):
    """W2 relu(W1 means) + W2 relu(W1 maxima), ``(N, C)`` each."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)
        self._shapes = (hidden, channels, 1, 1), (channels, hidden, 1, 1)

    def forward(self, means: Tensor, maxima: Tensor) -> Tensor:
        both = self._layers(torch.cat([means, maxima]))  # one call, so that a weight's gradient is rounded once
        return both[: means.shape[0]] + both[means.shape[0] :]

    def _layers(self, s: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if not all(is_plain(fc, nn.Conv2d, shape) for fc, shape in zip((fc1, fc2), self._shapes, strict=True)):
            return call_on_means(lambda t: fc2(torch.relu(fc1(t[:, :, None, None])))[:, :, 0, 0], s, fc1)
        hidden = torch.relu(reference.grouped_linear(s, fc1.weight.flatten(1).unsqueeze(0)))
        return reference.grouped_linear(hidden, fc2.weight.flatten(1).unsqueeze(0))


class _ConvNorm(nn.Module):
    """A 7 x 7 convolution and its norm, ``(N, 2, H, W)`` to ``(N, 1, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, pooled: Tensor) -> Tensor:
        conv = self.conv
        as_built = (conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((1, 1), (3, 3), (1, 1), "zeros")
        if as_built and is_plain(conv, nn.Conv2d, (1, 2, 7, 7)):
            y = reference.conv_over_positions(pooled, conv.weight)
        else:
            y = call_on_means(conv, pooled, conv)
        return call_norm_in_type_of(y, self.bn)


class _SpatialHalf(nn.Module):
    """Wraps the convolution and its norm as timm does: their keys begin with ``spatial.conv``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _ConvNorm()

    def forward(self, pooled: Tensor) -> Tensor:
        return self.conv(pooled)


class SimAM(MapGate):
    """SimAM: a gate for every single value, by its distance from its channel's mean. No parameters, no neutral start.

    ``x sigmoid(d / (4 (sum of d / (S - 1) + e_lambda)) + 1/2)`` with ``d = (x - mean)^2`` over the S positions.

    Args:
        channels: Number of channels C.
        e_lambda: Added to the variance.
        factor: Multiplies every gate value.

    Raises:
        TypeError: ``channels`` is not an integer, ``e_lambda`` or ``factor`` is not a number.
        ValueError: ``channels`` below 1, ``e_lambda`` or ``factor`` not finite and above 0.

    Source:
        Yang et al., SimAM, ICML 2021, Eq. (5) and (6), and the authors' code.

    Example:
        >>> SimAM(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(self, channels: int, *, e_lambda: float = 1e-4, factor: float = 1.0) -> None:
        super().__init__(channels, factor=factor)
        self.e_lambda = check_eps(e_lambda, "e_lambda", 1e-4)

    def scale_map(self, x: Tensor) -> Tensor:
        """Every value times its own gate."""
        return reference.simam(x, self.e_lambda)

    def _options(self) -> list[str]:
        return [] if self.e_lambda == 1e-4 else [f"e_lambda={self.e_lambda:g}"]
