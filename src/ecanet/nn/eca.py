"""Efficient Channel Attention: a band matrix over the channel means, shared (ECA) or not (ECA-NS)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ecanet.nn.activations import Activation
from ecanet.nn.gate import Gate, LinearGate, has_own_maths
from ecanet.nn.inner_layers import call_on_means, is_plain, is_zero
from ecanet.nn.kernel_size import adaptive_kernel_size, check_channels, check_kernel_size
from ecanet.nn.tail.maths import GateMaths
from ecanet.ops import reference

#: Kernels up to this size are allowed for any number of channels: they cost nothing.
_ALWAYS_ALLOWED = 255


class _BandGate(LinearGate):
    def __init__(
        self,
        channels: int,
        kernel_size: int | Literal["adaptive"],
        circular: bool,
        activation: Activation | None,
        factor: float,
    ) -> None:
        super().__init__(channels, activation=activation, factor=factor)
        if kernel_size == "adaptive":
            kernel_size = adaptive_kernel_size(channels)
        elif isinstance(kernel_size, str):
            raise ValueError(f"kernel_size must be 'adaptive' or a positive odd integer, got {kernel_size!r}")
        check_kernel_size(kernel_size)
        if kernel_size > max(2 * channels - 1, _ALWAYS_ALLOWED):
            raise ValueError(
                f"kernel_size must be at most {2 * channels - 1} for {channels} channels, got {kernel_size}: taps "
                "further away see only padding"
            )
        if circular and kernel_size > channels:
            raise ValueError(
                f"kernel_size must not exceed channels={channels} with circular padding, got {kernel_size}: "
                "a channel would be its own neighbour"
            )
        self.kernel_size = kernel_size
        self.circular = circular

    def _options(self) -> list[str]:
        return [f"kernel_size={self.kernel_size}", *(["circular=True"] if self.circular else [])]


class ECA(_BandGate):
    """Efficient Channel Attention: ``x * sigmoid(C1D_k(channel means))`` (Eq. 8, 9). k parameters.

    The weight is ``conv.weight`` of shape ``(1, 1, k)``, the key and shape of the official ``eca_layer``, of timm's
    ``EcaModule`` and (with ``circular=True``) ``CecaModule``, and of the ``ECA(c1, c2, k_size)`` that YOLO users
    paste (:meth:`from_yolo`): state dicts load both ways. As long as ``conv`` is exactly the layer that is made here,
    only its weight is read. If it is hooked, pruned, adapted, sharded, quantised or replaced, the layer is called.

    Args:
        channels: Number of channels C.
        kernel_size: k, odd: how many neighbouring channels each gate value depends on. ``"adaptive"`` is
            :func:`~ecanet.nn.adaptive_kernel_size` of C.
        circular: Make the first and the last channel neighbours instead of padding with zeros: channels have no order.
        activation: ``"sigmoid"`` or ``"hard_sigmoid"``. The kernels only have a derivative for the sigmoid; with the
            hard sigmoid, autograd goes through the gate, as through any other.
        factor: Multiplies every gate value; 2 undoes the sigmoid of 0.

    Raises:
        TypeError: ``channels`` or ``kernel_size`` is not an integer, ``factor`` is not a number.
        ValueError: ``kernel_size`` is even or not positive, above both 2 ``channels`` - 1 and 255, or with circular
            padding above ``channels``; unknown ``activation``; ``factor`` is not finite and above 0.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151. The listing in Figure 3 lacks the sigmoid of Eq. (9).

    Example:
        >>> eca = ECA(256)
        >>> eca
        ECA(
          256, kernel_size=5
          (conv): Conv1d(1, 1, kernel_size=(5,), stride=(1,), padding=(2,), bias=False)
        )
        >>> eca(torch.randn(8, 256, 56, 56)).shape
        torch.Size([8, 256, 56, 56])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Literal["adaptive"] = "adaptive",
        *,
        circular: bool = False,
        activation: Activation = "sigmoid",
        factor: float = 1.0,
    ) -> None:
        super().__init__(channels, kernel_size, circular, activation, factor)
        k = self.kernel_size
        padding_mode: Literal["circular", "zeros"] = "circular" if circular else "zeros"
        self.conv = nn.Conv1d(1, 1, k, padding=(k - 1) // 2, padding_mode=padding_mode, bias=False)
        self._as_built = (1, 1, k), (1,), ((k - 1) // 2,), (1,), padding_mode

    @classmethod
    def from_yolo(cls, c1: int, c2: int | None = None, k_size: int = 3) -> "ECA":
        """Build from the arguments of the module that YOLO users paste, ``ECA(c1, c2, k_size=3)``.

        Args:
            c1: Number of input channels.
            c2: Number of output channels as the model's YAML gives it; must equal ``c1``.
            k_size: Kernel size, odd.

        Raises:
            ValueError: ``c2`` differs from ``c1``.

        Example:
            >>> ECA.from_yolo(64, 64).kernel_size
            3
        """
        check_channels(c1)
        if c2 is not None and c2 != c1:
            raise ValueError(f"c2 must equal c1={c1}, got {c2}: attention does not change the number of channels")
        return cls(c1, k_size)

    def logits(self, s: Tensor) -> Tensor:
        """The 1-D convolution over the channels, ``(N, C)`` to ``(N, C)``."""
        conv = self.conv
        if self._can_read_weight(conv):
            return reference.band(s, conv.weight, self.circular)
        return call_on_means(lambda means: conv(means.unsqueeze(1)).squeeze(1), s, conv)

    def _can_read_weight(self, conv: nn.Module) -> bool:
        """Whether reading the weight of ``conv`` is the same as calling it."""
        shape, stride, padding, dilation, padding_mode = self._as_built
        own = conv.__dict__
        return (
            is_plain(conv, nn.Conv1d, shape)
            and own["stride"] == stride
            and own["padding"] == padding
            and own["dilation"] == dilation
            and own["padding_mode"] == padding_mode
        )

    def maths(self) -> GateMaths | None:
        """ECA's own maths, whose derivative the kernels know, unless the gate was changed."""
        own, cls = self.__dict__, type(self)
        conv = own["_modules"].get("conv")  # attribute access on a module is slow compared with a small map
        changed = (cls.scale_and_shift, cls.gate, cls.activate, cls.scaled, cls.logits) != _KNOWN_METHODS
        if changed or has_own_maths(own) or self.activation != "sigmoid":
            return super().maths()
        if not self._can_read_weight(conv):
            return None
        return GateMaths(self.scale_and_shift, (conv._parameters["weight"],), True, self.circular, self.factor)

    def weights_on_means(self) -> tuple[Tensor, ...]:
        """The kernel."""
        return (self.conv.weight,) if self._can_read_weight(self.conv) else ()

    def is_neutral(self) -> bool:
        """Whether the kernel is 0."""
        return is_zero(self.conv, nn.Conv1d)


#: The methods that the kernels implement.
_KNOWN_METHODS = Gate.scale_and_shift, Gate.gate, Gate.activate, Gate.scaled, ECA.logits


class ECANS(_BandGate):
    """ECA-NS: ECA with k weights for every channel instead of shared ones (Eq. 6, 7). k C parameters.

    Eq. (6) as printed starts the band at the diagonal. Here, as in the released code, the band is centred on it.

    Args:
        channels: Number of channels C.
        kernel_size: As in :class:`ECA`.
        circular: As in :class:`ECA`.
        activation: As in :class:`ECA`.
        factor: As in :class:`ECA`.

    Raises:
        TypeError, ValueError: as :class:`ECA`.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Table 2.

    Example:
        >>> sum(p.numel() for p in ECANS(256, kernel_size=3).parameters())
        768
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Literal["adaptive"] = "adaptive",
        *,
        circular: bool = False,
        activation: Activation = "sigmoid",
        factor: float = 1.0,
    ) -> None:
        super().__init__(channels, kernel_size, circular, activation, factor)
        self.weight = nn.Parameter(torch.empty(channels, self.kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights like those of ``torch.nn.Conv1d(1, 1, k)``: uniform within 1 / sqrt(k)."""
        bound = 1 / math.sqrt(self.kernel_size)
        nn.init.uniform_(self.weight, -bound, bound)
        super().reset_parameters()

    def logits(self, s: Tensor) -> Tensor:
        """The band matrix times the channel means, ``(N, C)`` to ``(N, C)``."""
        return reference.band_non_shared(s, self.weight, self.circular)
