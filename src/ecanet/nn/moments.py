"""Gates of the mean and the variance of every channel: SRM, GCT and GRN.

A map's sum of squares is ``S (v + s^2)``, with mean s, biased variance v and S positions. The pass that finds the means
finds the variances as well, so these gates cost what ECA costs.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ecanet.nn.gate import Gate, has_own_maths
from ecanet.nn.inner_layers import has_plain_tensors, zero_
from ecanet.nn.tail.maths import GateGradients, GateMaths, ScaleAndShift, Statistics
from ecanet.nn.tail.shared_norm import call_norm_in_type_of
from ecanet.ops import reference


class MomentGate(Gate):
    """A gate that sees means and variances: ``out = scale * x + shift``.

    A subclass defines :meth:`scale_and_shift`; everything else is as in :class:`Gate`.
    """

    needs_variances = True

    @abstractmethod
    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """What a map is multiplied by, and what is added to it."""

    def logits(self, s: Tensor) -> Tensor:
        """Not available: the gate is not a function of the means alone.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} sees variances as well as means: call scale_and_shift(gate.statistics(x)) instead"
        )


class _ClosedFormGate(MomentGate):
    """A gate that is 1 at the start and knows its own gradient: autograd's graph would cost more than the gate."""

    neutral_value = 1.0
    #: All parameters, in the order in which :meth:`gradients` takes them; those that make the gate 1 when they are 0.
    parameter_names: ClassVar[tuple[str, ...]] = ()
    zero_for_identity: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def gradients(
        self, statistics: Statistics, parameters: tuple[Tensor, ...], grad_scale: Tensor, grad_shift: Tensor
    ) -> GateGradients:
        """Gradients of what :meth:`scale_and_shift` computed from the same statistics, in closed form.

        Args:
            statistics: What :meth:`scale_and_shift` got.
            parameters: Those of the forward pass, in the order of ``parameter_names``; the gate may have others by now.
            grad_scale: ``(N, C)``, gradient of the scale without the factor.
            grad_shift: ``(N, C)``.
        """

    def maths(self) -> GateMaths | None:
        """The gate and its closed form, unless it was changed or has other parameters, as a pruned one has."""
        cls = type(self)
        base: Any = next(c for c in cls.__mro__ if "gradients" in vars(c))
        is_known = cls.scale_and_shift is base.scale_and_shift and cls.scaled is Gate.scaled
        if not is_known or tuple(self._parameters) != self.parameter_names:
            return super().maths()
        if has_own_maths(vars(self)) or not has_plain_tensors(self):
            return None
        parameters: Any = tuple(self._parameters.values())
        return GateMaths(
            self.scale_and_shift, parameters, factor=self.factor, needs_variances=True, backward=self.gradients
        )

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Make the gate 1 for every map."""
        zero_(self, *self.zero_for_identity)
        return 1.0

    def is_neutral(self) -> bool:
        """Whether the gate is 1 for every map."""
        return not any(getattr(self, name).any() for name in self.zero_for_identity)


def _squares(statistics: Statistics) -> Tensor:
    """The sum of squares over the positions of every map, ``(N, C)``."""
    means, variances, positions = statistics
    assert variances is not None
    return (variances + means.square()) * positions


class GCT(_ClosedFormGate):
    """Gated Channel Transformation: channels compete or cooperate by their l2 norms. 3 C parameters.

    With ``e = alpha sqrt(sum of x^2 + eps)`` per channel:
    ``out = x (1 + tanh(gamma e / sqrt(mean over channels of e^2 + eps) + beta))``. At the start gamma and beta are 0,
    and the gate is 1. State dicts of the authors' module, ``(1, C, 1, 1)``, load.

    Args:
        channels: Number of channels C.
        eps: Added under both roots.
        factor: Multiplies every gate value.

    Attributes:
        alpha: ``(C,)``, 1 at the start.
        gamma: ``(C,)``, 0 at the start.
        beta: ``(C,)``, 0 at the start.

    Raises:
        TypeError: ``channels`` is not an integer, ``eps`` or ``factor`` is not a number.
        ValueError: ``channels`` below 1, ``eps`` not above 0, ``factor`` not finite and above 0.

    Source:
        Yang et al., Gated Channel Transformation for Visual Recognition, CVPR 2020, arXiv:1909.11519, Eq. (1) to (5);
        eps as in the authors' code.

    Example:
        >>> gct, x = GCT(64), torch.randn(8, 64, 7, 7)
        >>> torch.equal(gct(x), x)
        True
    """

    parameter_names = ("alpha", "gamma", "beta")
    zero_for_identity = ("gamma", "beta")

    def __init__(self, channels: int, *, eps: float = 1e-5, factor: float = 1.0) -> None:
        super().__init__(channels, factor=factor)
        self.eps = check_eps(eps)
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.empty(channels)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to 1, and gamma and beta to 0, as the authors do."""
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)
        super().reset_parameters()

    def _embedding(self, statistics: Statistics, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The channels' l2 norms; e, which is these times alpha; and the root mean square of e, ``(N, 1)``."""
        norm = (_squares(statistics) + self.eps).sqrt()
        e = norm * alpha.to(norm.dtype)
        return norm, e, (e.square().mean(1, keepdim=True) + self.eps).sqrt()

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """``1 + tanh(gamma e / rms(e) + beta)``, and no shift."""
        _, e, root = self._embedding(statistics, self.alpha)
        return self.scaled(1 + torch.tanh(e * self.gamma.to(e.dtype) / root + self.beta.to(e.dtype))), None

    def gradients(
        self, statistics: Statistics, parameters: tuple[Tensor, ...], grad_scale: Tensor, grad_shift: Tensor
    ) -> GateGradients:
        """See the base class."""
        alpha, gamma, beta = (t.to(grad_scale.dtype) for t in parameters)
        norm, e, root = self._embedding(statistics, alpha)
        relative = e / root
        at_tanh = grad_scale * (1 - torch.tanh(relative * gamma + beta).square())
        at_relative = at_tanh * gamma
        grad_e = (at_relative - relative * (at_relative * relative).mean(1, keepdim=True)) / root
        per_square = grad_e * alpha * (0.5 * statistics.positions) / norm
        of_parameters = (grad_e * norm).sum(0), (at_tanh * relative).sum(0), at_tanh.sum(0)
        return GateGradients(2 * statistics.means * per_square, per_square, of_parameters)

    def _options(self) -> list[str]:
        return [] if self.eps == 1e-5 else [f"eps={self.eps:g}"]


class GRN(_ClosedFormGate):
    """Global Response Normalisation of ConvNeXt V2: ``out = x + weight x n + bias``. 2 C parameters.

    n is a channel's l2 norm, divided by the mean of these norms over the channels. At the start weight and bias are 0,
    and the map passes unchanged. Keys are those of timm's ``GlobalResponseNorm``.

    Args:
        channels: Number of channels C.
        eps: Added to the mean of the norms.
        factor: Multiplies every gate value; not the bias.

    Attributes:
        weight: ``(C,)``, 0 at the start.
        bias: ``(C,)``, 0 at the start.

    Raises:
        TypeError: ``channels`` is not an integer, ``eps`` or ``factor`` is not a number.
        ValueError: ``channels`` below 1, ``eps`` not above 0, ``factor`` not finite and above 0.

    Source:
        Woo et al., ConvNeXt V2, CVPR 2023, arXiv:2301.00808, Eq. (1) to (3) and Algorithm 1; eps as in timm.

    Example:
        >>> grn, x = GRN(64), torch.randn(8, 64, 7, 7)
        >>> torch.equal(grn(x), x)
        True
    """

    parameter_names = zero_for_identity = ("weight", "bias")

    def __init__(self, channels: int, *, eps: float = 1e-6, factor: float = 1.0) -> None:
        super().__init__(channels, factor=factor)
        self.eps = check_eps(eps)
        self.weight, self.bias = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to 0, as the authors do."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        super().reset_parameters()

    def _relative(self, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        """The channels' l2 norms, these divided by their mean, and that mean with eps, ``(N, 1)``."""
        norm = reference.root(_squares(statistics))
        mean = norm.mean(1, keepdim=True) + self.eps
        return norm, norm / mean, mean

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """``1 + weight n``, and the bias."""
        _, relative, _ = self._relative(statistics)
        scale = self.scaled(1 + self.weight.to(relative.dtype) * relative)
        return scale, self.bias.to(relative.dtype).expand_as(scale)

    def gradients(
        self, statistics: Statistics, parameters: tuple[Tensor, ...], grad_scale: Tensor, grad_shift: Tensor
    ) -> GateGradients:
        """See the base class."""
        norm, relative, mean = self._relative(statistics)
        at_relative = grad_scale * parameters[0].to(norm.dtype)
        grad_norm = (at_relative - (at_relative * relative).mean(1, keepdim=True)) / mean
        per_square = (grad_norm * (0.5 * statistics.positions) / norm).where(norm != 0, 0)
        of_parameters = (grad_scale * relative).sum(0), grad_shift.sum(0)
        return GateGradients(2 * statistics.means * per_square, per_square, of_parameters)

    def _options(self) -> list[str]:
        return [] if self.eps == 1e-6 else [f"eps={self.eps:g}"]


class SRM(MomentGate):
    """Style-based Recalibration: ``sigmoid(bn(cfc[:, 0] mean + cfc[:, 1] deviation))`` per channel. 4 C parameters.

    ``bn`` is a BatchNorm over the N values of each channel: in training it needs more than one sample, and several
    processes share its statistics when it is converted to SyncBatchNorm. The deviation is
    ``sqrt(variance S / (S - 1) + eps)``, as in the authors' code: unbiased (for a map of one position, 0).

    Args:
        channels: Number of channels C.
        eps: Added to the variance.
        factor: Multiplies every gate value; 2 undoes the sigmoid of 0.

    Attributes:
        cfc: ``(C, 2)``, 0 at the start, as in the authors' code.
        bn: A BatchNorm1d of C channels.

    Raises:
        TypeError: ``channels`` is not an integer, ``eps`` or ``factor`` is not a number.
        ValueError: ``channels`` below 1, ``eps`` not above 0, ``factor`` not finite and above 0; torch's
            BatchNorm, in training on one sample.

    Source:
        Lee et al., SRM: A Style-based Recalibration Module for Convolutional Neural Networks, ICCV 2019,
        arXiv:1903.10829, Eq. (1) to (6); the deviation, eps and the start as in the authors' code.

    Example:
        >>> srm = SRM(64)
        >>> srm(torch.randn(8, 64, 7, 7)).shape
        torch.Size([8, 64, 7, 7])
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, factor: float = 1.0) -> None:
        super().__init__(channels, factor=factor)
        self.eps = check_eps(eps)
        self.cfc = nn.Parameter(torch.empty(channels, 2))
        self.bn = nn.BatchNorm1d(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set cfc to 0 and reset the BatchNorm, as the authors do."""
        nn.init.zeros_(self.cfc)
        super().reset_parameters()

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """The sigmoid of the normalised styles, and no shift."""
        means, variances, positions = statistics
        assert variances is not None
        deviations = (reference.unbiased(variances, positions) + self.eps).sqrt()
        cfc = self.cfc.to(means.dtype)
        styles = means * cfc[:, 0] + deviations * cfc[:, 1]
        return self.scaled(self.activate(call_norm_in_type_of(styles, self.bn))), None

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set cfc, the norm's bias and its running mean to 0; every gate value becomes 1/2."""
        zero_(self, "cfc")
        zero_(self.bn, "bias", "running_mean")
        return 0.5

    def is_neutral(self) -> bool:
        """Whether cfc, the norm's bias and its running mean are 0."""
        tensors = (self.cfc, getattr(self.bn, "bias", None), getattr(self.bn, "running_mean", None))
        return not any(t.any() for t in tensors if isinstance(t, Tensor))

    def _options(self) -> list[str]:
        return [] if self.eps == 1e-5 else [f"eps={self.eps:g}"]


def check_eps(eps: float, name: str = "eps", usual: float = 1e-5) -> float:
    """Return a number, such as an eps, as a float if it is finite and above 0.

    Args:
        eps: The number.
        name: Name of the argument, for the error.
        usual: A usual value, for the error.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite and above 0.
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{name} must be a number, got {eps!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"{name} must be finite and above 0, got {eps!r}: such as {usual:g}")
    return float(eps)
