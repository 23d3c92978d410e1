"""The contract of every gate: means in, gates out, and a feature map scaled by them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ecanet.nn import fused
from ecanet.nn.kernel_size import check_channels
from ecanet.ops import reference


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody put a forward hook on a layer that a gate holds for its weights, and does not call else."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks)


class Gate(nn.Module, ABC):
    """A channel-attention module: ``x * sigmoid(logits(channel means of x))``.

    A subclass says what its logits are; everything else is here. All modules of the paper's Table 2 differ in the
    logits alone.

    Attributes:
        channels: Number of channels C.
        scale: A factor on every gate, or None: a buffer that a gate has only where :func:`ecanet.insert_gates_` found
            no norm to undo a neutral gate.
    """

    scale: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_channels(channels)
        self.channels = channels
        self.register_buffer("scale", None)

    @abstractmethod
    def logits(self, s: Tensor) -> Tensor:
        """What goes into the sigmoid, ``(N, C)``, from channel means ``(N, C)`` in the type to compute in."""

    def gate(self, s: Tensor) -> Tensor:
        """Gates from channel means.

        Args:
            s: Channel means ``(N, C)``; N may be 0.

        Returns:
            Gates ``(N, C)`` in (0, 1), times ``scale`` if there is one; float32 for half types, float64 for float64.

        Raises:
            TypeError: ``s`` is not floating point.
            ValueError: ``s`` is not ``(N, C)``.
        """
        g = torch.sigmoid(self.logits(reference.check_means(s, self.channels)))
        return g if self.scale is None else g * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of a feature map by its gate.

        Args:
            x: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions; N may be 0. Without a spatial dimension x is
                its own channel mean.

        Returns:
            The shape, type, memory format and device of ``x``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: wrong rank or number of channels, or a spatial size of 0.
        """
        if fused.kernels_run(x) and x.shape[1] == self.channels:
            return fused.tail(x, None, self.maths(), None, 0)
        return reference.scale(x, self.gate(reference.squeeze(x, self.channels)))

    def maths(self) -> fused.GateMaths:
        """The gate as the fused kernels see it: a function of the channel means, and the parameters behind it."""
        return fused.GateMaths(self.gate, tuple(self.parameters()))

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set the weights so that the gate is the same constant for every input; training can go on from there.

        A norm before the gate whose weight and bias are divided by that constant makes the pair equal to the norm
        alone: this is how :mod:`ecanet.models` loads plain pretrained weights without changing the function.

        Returns:
            The constant: 1/2, the sigmoid of 0, without ``scale``.

        Raises:
            ValueError: the gate has no weights that could make it constant.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be made neutral: no choice of its weights gives a constant gate"
        )

    def constant(self) -> float | None:
        """The gate's value where its weights make it the same for every input, as neutral ones do; otherwise None.

        Weights on the device ``"meta"`` have no values, and none here.
        """
        if any(weight.is_meta for weight in self.parameters()) or not self.is_neutral():
            return None
        return 0.5 if self.scale is None else 0.5 * self.scale.item()

    def is_neutral(self) -> bool:
        """Whether the weights are such as :meth:`make_neutral_` sets them."""
        return False

    def extra_repr(self) -> str:
        """Constructor arguments for ``repr``."""
        return f"{self.channels}"


class LinearGate(Gate):
    """A gate whose logits are W s for a C x C matrix W: every module of Table 2 except SE."""

    def matrix(self) -> Tensor:
        """The matrix W of Eq. (4) to (6), ``(C, C)``, so that ``sigmoid(W @ y)`` equals ``gate(y[None])[0]``.

        Differentiable in the gate's weights.
        """
        like = next(self.parameters(), torch.empty(()))
        dtype = reference.accumulation_dtype(like.dtype)
        # Row j of the result of the identity is what channel j adds to every logit: column j of W.
        return self.logits(torch.eye(self.channels, dtype=dtype, device=like.device)).T

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set W = 0; every gate becomes sigmoid(0) = 1/2."""
        if next(self.parameters(), None) is None:
            return super().make_neutral_()
        for weight in self.parameters():
            weight.zero_()
        return 0.5

    def is_neutral(self) -> bool:
        """Whether W = 0."""
        weights = list(self.parameters())
        return bool(weights) and not any(weight.any() for weight in weights)
