"""Gates of the means relative to one another: LCT and the Gaussian context transformer."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ecanet.nn.activations import Activation
from ecanet.nn.gate import Gate
from ecanet.nn.inner_layers import zero_
from ecanet.nn.moments import check_eps
from ecanet.nn.se import check_groups
from ecanet.ops import reference

#: Number of groups in the paper's networks, whose gates have 256 channels or more, and their fewest channels per group.
_PAPER_GROUPS, _MIN_CHANNELS_PER_GROUP = 64, 4


class LCT(Gate):
    """Linear Context Transform: ``sigmoid(w v + b)`` per channel, v the mean normalised in its group. 2 C parameters.

    ``v = (s - mean of the group) / sqrt(variance of the group + eps)``. At the start w is 0 and b is 1, as in the
    authors' code: the gate is sigmoid(1) = 0.73.

    Args:
        channels: Number of channels C.
        groups: Number of groups, a divisor of C. By default the largest one, up to 64 as in the paper, that leaves each
            group at least 4 channels.
        eps: Added to the variance of a group.
        activation: ``"sigmoid"`` or ``"hard_sigmoid"``.
        factor: Multiplies every gate value; 2 undoes the sigmoid of 0.

    Attributes:
        w: ``(C,)``, 0 at the start.
        b: ``(C,)``, 1 at the start.

    Raises:
        TypeError: ``channels`` or ``groups`` is not an integer, ``eps`` or ``factor`` is not a number.
        ValueError: ``groups`` does not divide ``channels``, ``eps`` not above 0, unknown ``activation``, ``factor`` not
            finite and above 0.

    Source:
        Ruan et al., Linear Context Transform Block, AAAI 2020, arXiv:1909.03834.

    Example:
        >>> lct = LCT(256)
        >>> lct
        LCT(256, groups=64)
        >>> lct.gate(torch.randn(2, 256))[0, 0].item() == torch.tensor(1.0).sigmoid().item()
        True
    """

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        *,
        eps: float = 1e-5,
        activation: Activation = "sigmoid",
        factor: float = 1.0,
    ) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        self.groups = check_groups(_default_groups(channels) if groups is None else groups, channels)
        self.eps = check_eps(eps)
        self.w, self.b = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set w to 0 and b to 1, as the authors do."""
        nn.init.zeros_(self.w)
        nn.init.ones_(self.b)
        super().reset_parameters()

    def logits(self, s: Tensor) -> Tensor:
        """The normalised means times w, plus b."""
        grouped = s.reshape(-1, self.groups, self.channels // self.groups)
        d = grouped - grouped.mean(2, keepdim=True)
        v = (d / (d.square().mean(2, keepdim=True) + self.eps).sqrt()).reshape(-1, self.channels)
        return v * self.w.to(s.dtype) + self.b.to(s.dtype)

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set w and b to 0; every gate value becomes 1/2."""
        zero_(self, "w", "b")
        return 0.5

    def is_neutral(self) -> bool:
        """Whether w and b are 0."""
        return not bool(self.w.any()) and not bool(self.b.any())

    def _options(self) -> list[str]:
        return [f"groups={self.groups}", *([] if self.eps == 1e-5 else [f"eps={self.eps:g}"])]


def _default_groups(channels: int) -> int:
    most = max(1, min(_PAPER_GROUPS, channels // _MIN_CHANNELS_PER_GROUP))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class GaussianGCT(Gate):
    """Gaussian Context Transformer: ``exp(-v^2 / (2 c^2))``, v the mean normalised over the channels. 0 parameters.

    ``v = (s - mean over channels) / (deviation over channels + eps)``, the deviation biased: a channel as active as the
    average passes unchanged, and the further it is from that, above or below, the less of it passes. No choice of c
    makes the gate constant, so it has no neutral start.

    This follows the paper's equations. Public code differs from them: some has ``exp(-c v^2 / 2)``, some the unbiased
    deviation, some eps under the root.

    Args:
        channels: Number of channels C.
        c: Standard deviation of the Gaussian (the paper's GCT-B0), or ``"learnable"``: ``c = 3 sigmoid(theta) + 1``,
            with theta the one parameter, 0 at the start (GCT-B1).
        eps: Added to the deviation.
        factor: Multiplies every gate value.

    Attributes:
        c: Standard deviation of the Gaussian, or ``"learnable"``.
        theta: ``(1,)`` with ``c="learnable"``, otherwise None.

    Raises:
        TypeError: ``channels`` is not an integer; ``c``, ``eps`` or ``factor`` is not a number.
        ValueError: ``channels`` below 1; ``c``, ``eps`` or ``factor`` not finite and above 0.

    Source:
        Ruan et al., Gaussian Context Transformer, CVPR 2021: the normalisation, the Gaussian of amplitude 1 and mean 0,
        and ``c = alpha sigmoid(theta) + beta``.

    Example:
        >>> GaussianGCT(3).gate(torch.tensor([[-1.0, 0.0, 1.0]]))
        tensor([[0.8290, 1.0000, 0.8290]])
    """

    activation = "exp"
    #: A learnable c is between beta and alpha + beta.
    alpha: ClassVar[float] = 3.0
    beta: ClassVar[float] = 1.0

    def __init__(
        self, channels: int, c: float | Literal["learnable"] = 2.0, *, eps: float = 1e-5, factor: float = 1.0
    ) -> None:
        super().__init__(channels, factor=factor)
        if isinstance(c, str) and c != "learnable":
            raise ValueError(f"c must be a number or 'learnable', got {c!r}")
        self.c = c if isinstance(c, str) else check_eps(c, "c", 2)
        self.eps = check_eps(eps)
        self.theta = nn.Parameter(torch.empty(1)) if c == "learnable" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set theta to 0, as the authors do."""
        if self.theta is not None:
            nn.init.zeros_(self.theta)
        super().reset_parameters()

    def logits(self, s: Tensor) -> Tensor:
        """The exponent, ``-v^2 / (2 c^2)``, 0 or below."""
        d = s - s.mean(1, keepdim=True)
        v = d / (reference.root(d.square().mean(1, keepdim=True)) + self.eps)
        c: Any = self.c if self.theta is None else self.alpha * torch.sigmoid(self.theta.to(s.dtype)) + self.beta
        return v.square() / (-2 * c**2)

    def _options(self) -> list[str]:
        return [f"c={self.c!r}", *([] if self.eps == 1e-5 else [f"eps={self.eps:g}"])]
